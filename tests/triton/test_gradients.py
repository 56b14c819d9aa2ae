"""gradient_dot and gradient_norm: both ways of computing each, ragged and empty sequences, and which way is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyinf import ops
from pyinf.errors import BackendUnavailableError, ConfigError
from pyinf.ops import costs
from pyinf.ops.triton_gradients import far_columns, workspace_on
from pyinf.triton_kernels import gradients as kernels
from pyinf.triton_kernels.fixed_order import sum_launch
from tests.ops.cases import Layer, make_layer
from tests.triton.harness import DTYPES, any_layer, compare, error, framed, gate, quick

LONG_SUM = 1e-6  # few outputs that are sums of very many terms: plain torch's own error there is chance


def _cast(x: Layer, dtype: torch.dtype) -> Layer:
    return x if x.g.dtype == dtype else Layer(x.g.to(dtype), x.a.to(dtype), x.offsets)


def _norm(x: Layer):
    def call(dtype):
        y = _cast(x, dtype)
        return [torch.ops.pyinf.gradient_norm(y.g, y.a, y.offsets)]

    return call


def _dot(x: Layer, y: Layer):
    def call(dtype):
        u, v = _cast(x, dtype), _cast(y, dtype)
        return [torch.ops.pyinf.gradient_dot(u.g, u.a, u.offsets, v.g, v.a, v.offsets)]

    return call


@quick
@given(any_layer())
def test_norms_of_any_layer(x):
    compare(_norm(x), "gradient_norm", x.g.dtype, LONG_SUM)


@quick
@given(any_layer(), st.lists(st.integers(0, 30), max_size=3), st.integers(0, 99))
def test_dots_of_any_layers(x, lengths, seed):
    more = make_layer(lengths, x.g.shape[1], x.a.shape[1], x.g.dtype, seed=seed + 1000)
    # Side 2 holds side 1 as well: its squared norms give the result a size, which products of chance do not have.
    offsets = torch.cat([x.offsets, more.offsets[1:] + x.offsets[-1]])
    y = Layer(torch.cat([x.g, more.g]), torch.cat([x.a, more.a]), offsets)
    compare(_dot(x, y), "gradient_dot", x.g.dtype, LONG_SUM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_sequence_goes_its_own_way(dtype, monkeypatch):
    """Lengths around the crossover: Gram tiles up to it, gradient tiles above, several tiles and splits of both."""
    taken = []
    original = kernels.norm_launches
    monkeypatch.setattr(kernels, "norm_launches", lambda *args: taken.append(original(*args)) or taken[-1])
    crossover = kernels.norm_crossover(130, 97, 64)
    assert crossover == 2 * 130 * 97 // 227 - 64
    x = make_layer([crossover, crossover + 1, 0, 200, 3], 130, 97, dtype, strided=True)
    compare(_norm(x), "gradient_norm", dtype, LONG_SUM)
    assert [launch.kernel.__name__ for launch in taken[0]] == ["ghost_norm_kernel", "tile_norm_kernel", "sum_kernel"]
    short = make_layer([20, 9], 130, 97, dtype)  # no sequence can be above: one kernel and the sum
    compare(_norm(short), "gradient_norm", dtype, LONG_SUM)
    assert [launch.kernel.__name__ for launch in taken[-1]] == ["ghost_norm_kernel", "sum_kernel"]


def test_norms_over_triangles_of_tiles():
    """Sequences of two, three and four Gram tiles of 64 tokens, shared out over several programs each."""
    x = make_layer([70, 0, 150, 200], 300, 290, torch.float32)
    assert kernels.norm_crossover(300, 290, 64) > 200 and kernels.norm_splits(420, 4) > 1
    compare(_norm(x), "gradient_norm", torch.float32, LONG_SUM)


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("exchanged", [True, False])
def test_both_ways_of_a_product(ghost, exchanged):
    x = make_layer([70, 0, 131], 70, 37, torch.float32)
    y = make_layer([140, 5], 70, 37, torch.float32, seed=2)
    x, y = (Layer(framed(z.g), framed(z.a), z.offsets) for z in (x, y))
    if exchanged:
        x, y = y, x
    out = torch.full((x.offsets.numel() - 1, y.offsets.numel() - 1), float("nan"))
    launches = kernels.dot_launches(
        x.g, x.a, x.offsets, y.g, y.a, y.offsets, out, workspace_on(out.device), "default", ghost=ghost
    )
    name = "ghost_dot_kernel" if ghost else "tile_dot_kernel"
    assert [launch.kernel.__name__ for launch in launches] == [name, "sum_kernel"]
    for launch in launches:
        launch.run()
    with ops.use_backend("torch"):
        [plain] = _dot(x, y)(torch.float32)
    with ops.use_backend("reference"):
        [ref] = _dot(x, y)(torch.float64)
    gate(out, plain, ref, torch.float32, LONG_SUM)


def test_partial_sums():
    """The second kernel by itself: more partial sums than it takes at a time, few results and many."""
    for splits, count in ((300, 21), (40, 4099)):
        partial = torch.randn(splits, count, generator=torch.Generator().manual_seed(splits))
        whole = partial.double().sum(0)
        for root in (False, True):
            out = torch.full((count,), float("nan"))
            sum_launch(partial, out, 0.5, root).run()
            assert error(out, 0.5 * (whole.clamp(min=0).sqrt() if root else whole)) < 1e-6


def test_route_is_a_formula():
    """At equal lengths the crossover is near d_in·d_out / (d_in + d_out); symmetry doubles it for norms."""
    for d_out, d_in in ((768, 3072), (4096, 14336), (64, 64)):
        half = d_out * d_in / (d_out + d_in)
        for count in (1, 8, 64):
            lengths = [t for t in range(1, int(4 * half), max(1, int(half) // 100))]
            ghost = [kernels.dot_is_ghost(t * count, t * count, d_out, d_in, count, count) for t in lengths]
            assert ghost == sorted(ghost, reverse=True), "once materialising is cheaper it stays so"
            turn = lengths[ghost.index(False)]
            # one pair forms two gradients for T² products, many pairs about one gradient for T²
            assert turn == pytest.approx(half * (count + 1) / count, rel=0.05, abs=2)
        assert kernels.norm_crossover(d_out, d_in, 0) == pytest.approx(2 * half, rel=0.01)
    assert kernels.keep_first(10, 1000, 1, 100) and not kernels.keep_first(1000, 10, 100, 1)
    assert kernels.norm_splits(8 * 512, 8) == 36 and kernels.norm_splits(4, 8) == 1
    assert kernels.tile_dot_flops(5, 7, 3, 2, 1, 1) == 2 * 13 * 6
    assert costs.ghost_dot_flops(5, 7, 3, 2) == 2 * 35 * 6


def test_too_many_partial_sums_take_the_gram_tiles(monkeypatch):
    x = make_layer([40, 41], 8, 9, torch.float32)
    out = torch.empty(2, 2)
    arguments = (x.g, x.a, x.offsets, x.g, x.a, x.offsets, out, workspace_on(out.device), "default")
    assert kernels.dot_launches(*arguments)[0].kernel.__name__ == "tile_dot_kernel"
    monkeypatch.setattr(kernels, "_WORKSPACE", 1)
    assert kernels.dot_launches(*arguments)[0].kernel.__name__ == "ghost_dot_kernel"


def test_refusals_give_a_reason():
    x = make_layer([4, 5], 6, 7, torch.float64)
    with ops.use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match=r"torch\.float64"):
            _norm(x)(torch.float64)
        with pytest.raises(BackendUnavailableError, match="one dtype"):
            torch.ops.pyinf.gradient_norm(x.g.float(), x.a.half(), x.offsets)
        far = torch.empty(1 << 32, device="meta").as_strided((2, 1 << 20), (1, 1 << 12))
        assert "contiguous" in far_columns(far) and far_columns(far.T) is None
        with pytest.raises(ConfigError, match="offsets must run"):
            torch.ops.pyinf.gradient_norm(x.g.float(), x.a.float(), torch.tensor([0, 4]))
