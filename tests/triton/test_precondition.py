"""precondition against the float64 reference; precondition_low_rank by what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyinf.errors import BackendUnavailableError
from pyinf.ops import costs, philox, reference, torch_backend, triton_precondition, use_backend
from pyinf.ops.triton_layout import near, padded
from pyinf.triton_kernels import precondition as kernels
from pyinf.triton_kernels import precondition_low_rank as sketches
from pyinf.triton_kernels.tiles import MULTIPROCESSORS
from tests.ops.cases import Layer, basis, make_layer, randn
from tests.triton.harness import DTYPES, any_layer, error, framed, gate, quick, sizes, wider


def four_products(V, U_S, U_A, Lam, damping, dtype):
    """What plain torch makes of it in ``dtype``: each product summed in float32 and rounded to ``dtype``."""

    def rounded(x):
        return x.to(dtype).float()

    x = V.float()
    x = x if U_A is None else rounded(x @ U_A.float())
    x = x if U_S is None else U_S.float().T @ x
    x = rounded(x / (Lam.float() + damping))
    x = x if U_S is None else U_S.float() @ x
    return x if U_A is None else rounded(x) @ U_A.float().T


def check(V, U_S, U_A, Lam, damping, dtype, floor=3e-7):
    with use_backend("triton"):
        out = torch.ops.pyinf.precondition(V, U_S, U_A, Lam, damping)
        again = torch.ops.pyinf.precondition(V, U_S, U_A, Lam, damping)
    with use_backend("reference"):
        double = [None if x is None else x.double() for x in (V, U_S, U_A, Lam)]
        ref = torch.ops.pyinf.precondition(*double, damping)
    assert out.dtype == torch.float32 and out.shape == V.shape and out.is_contiguous()
    assert torch.equal(out, again)
    gate(out, four_products(V, U_S, U_A, Lam, damping, dtype), ref, dtype, floor)
    return out


def problem(d_out, d_in, queries, dtype, seed=0):
    V = randn(queries, d_out, d_in, seed=seed, dtype=dtype)
    Lam = randn(d_out, d_in, seed=seed + 1, dtype=torch.float32).abs()
    return V, basis(d_out, seed + 2, dtype), basis(d_in, seed + 3, dtype), Lam


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_out", "d_in"), [(33, 65), (64, 48), (5, 16), (16, 5)])
def test_sandwich(d_out, d_in, dtype):
    V, U_S, U_A, Lam = problem(d_out, d_in, 3, dtype)
    for left, right in ((U_S, U_A), (None, U_A), (U_S, None), (None, None)):
        check(V, left, right, Lam, 0.3, dtype)
    check(V[:0], U_S, U_A, Lam, 0.3, dtype)
    # transposed and sliced inputs; a half-precision Λ
    strided = wider(V.flatten(0, 1), 3).unflatten(0, (3, d_out))
    check(strided, U_S.T, wider(U_A, 2), Lam.half().T.contiguous().T, 0.3, dtype)
    check(strided, None, None, Lam.T.contiguous().T, 0.3, dtype)


@quick
@given(
    d_out=sizes(70), d_in=sizes(70), queries=st.integers(0, 3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999)
)
def test_sandwich_of_any_shape(d_out, d_in, queries, dtype, seed):
    V, U_S, U_A, Lam = problem(d_out, d_in, queries, dtype, seed)
    check(V, U_S, U_A, Lam, 0.1, dtype)


def test_mixed_dtypes():
    V, U_S, U_A, Lam = problem(20, 33, 2, torch.float16)
    check(V, U_S.float(), U_A.float(), Lam, 0.3, torch.float32)  # float32 products: nothing is rounded
    with use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match="no common dtype"):
            torch.ops.pyinf.precondition(V.bfloat16(), U_S, U_A, Lam, 0.3)
        with pytest.raises(BackendUnavailableError, match=r"no Triton kernel for torch\.float64"):
            torch.ops.pyinf.precondition(V, U_S, U_A, Lam.double(), 0.3)


def test_half_precision_does_not_overflow():
    """Elements of H⁻¹V far above the largest float16, of which small ones must still be right."""
    V, U_S, U_A, Lam = problem(24, 40, 2, torch.float16)
    V, Lam = V * 8, Lam * 1e-7
    with use_backend("triton"):
        out = torch.ops.pyinf.precondition(V, U_S, U_A, Lam, 1e-8)
    with use_backend("reference"):
        ref = torch.ops.pyinf.precondition(V.double(), U_S.double(), U_A.double(), Lam.double(), 1e-8)
    assert not four_products(V, U_S, U_A, Lam, 1e-8, torch.float16).isfinite().all()  # plain torch in float16
    assert ref.abs().max() > 1e6 and error(out, ref) < 1e-3


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_product_tiles(group, divided):
    """Many tiles, the last of each row, column, depth and group cut; operands and outputs of any strides."""
    config = kernels.Config({"BM": 16, "BN": 32, "BK": 16, "GROUP": group})
    x = framed(randn(2, 41, 75, seed=1, dtype=torch.float32)).mT
    y = framed(randn(2, 70, 41, seed=2, dtype=torch.float32)).mT
    Lam = randn(70, 75, seed=3, dtype=torch.float32).abs().T
    buffer = torch.full((2, 71, 80), float("nan")).mT
    out = buffer[:, 2:77, 1:]
    for launch in kernels.product(out, x, y, Lam if divided else None, 0.5, "ieee", config):
        launch.run()
    ref = x.double() @ y.double() / (Lam.double() + 0.5 if divided else 1)
    assert error(out, ref) < 3e-7
    buffer[:, 2:77, 1:] = float("nan")
    assert buffer.isnan().all(), "wrote beyond the output"


def low_rank_problem(x, dtype, seed=0):
    d_out, d_in = x.g.shape[1], x.a.shape[1]
    Lam = randn(d_out, d_in, seed=seed + 1, dtype=torch.float32).abs()
    return x.g, x.a, x.offsets, basis(d_out, seed + 2, dtype), basis(d_in, seed + 3, dtype), Lam


def exact(g, a, offsets, U_S, U_A, Lam, damping):
    with use_backend("reference"):
        G = reference._gradients(g.double(), a.double(), offsets)
        double = [None if x is None else x.double() for x in (U_S, U_A, Lam)]
        return torch.ops.pyinf.precondition(G, *double, damping)


def hold(args, damping, rank, iterations, dtype, seed=0):
    """Shapes; no less energy than torch's narrower sketch; what is lost is what the energy says; factors ordered and
    balanced."""
    with use_backend("triton"):
        L, R, energy = torch.ops.pyinf.precondition_low_rank(*args, damping, rank, iterations, seed)
    with use_backend("torch"):
        torchs = torch.ops.pyinf.precondition_low_rank(*args, damping, rank, iterations, seed)[2]
    full = exact(*args, damping)
    queries, d_out, d_in = full.shape
    r = min(rank, d_out, d_in)
    assert L.shape == (queries, d_out, r) and R.shape == (queries, r, d_in) and energy.shape == (queries,)
    assert all(x.dtype == torch.float32 and x.is_contiguous() and x.isfinite().all() for x in (L, R, energy))
    if queries == 0 or r == 0:
        return
    total = full.square().sum((1, 2))
    # Rounding every operand to half precision leaves 1e-3 of the norm in error. The test matrix begins with torch's
    # columns, so in exact arithmetic its energy cannot be less.
    slack, relative = (5e-3, 4e-3) if dtype == torch.float16 else (2e-5, 3e-6)
    assert (energy >= torchs - slack).all() and (energy <= 1).all()
    lost = (full - L.double() @ R.double()).square().sum((1, 2))
    assert (lost.sqrt() <= ((1 - energy.double()).clamp_min(0) * total).sqrt() + (relative + 2e-3) * total.sqrt()).all()
    if dtype == torch.float32 and r < min(d_out, d_in):
        assert torch.allclose(lost, (1 - energy.double()) * total, atol=2e-5 * float(total.max()))
    empty = args[2].diff() == 0
    assert (L[empty] == 0).all() and (R[empty] == 0).all() and (energy[empty] == 1).all()
    squares = L.square().sum(1)
    tolerance = 5e-3 if dtype == torch.float16 else 1e-4
    scale = squares.amax(1, keepdim=True).clamp_min(1e-30)
    assert ((squares - R.square().sum(2)).abs() <= tolerance * scale).all()
    assert (squares.diff(dim=1) <= tolerance * scale).all()


@pytest.mark.parametrize("route", ["tiles", "written", "gradients first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank(dtype, route, monkeypatch):
    monkeypatch.setattr(costs, "sketch_is_cheaper", lambda *args: route == "tiles")
    monkeypatch.setattr(costs, "rotate_first_is_cheaper", lambda *args: route != "gradients first")
    args = low_rank_problem(make_layer([9, 0, 21], 20, 37, dtype), dtype)
    hold(args, 0.2, 4, 1, dtype)
    hold((*args[:3], None, args[4], args[5]), 0.2, 100, 0, dtype)
    hold((*args[:3], args[3], None, args[5].T.contiguous().T), 0.2, 2, 0, dtype)


@quick
@given(
    x=any_layer(largest=33, longest=9),
    rank=sizes(20),
    iterations=st.integers(0, 1),
    seed=st.integers(0, 999),
    tiles=st.booleans(),
)
def test_low_rank_of_any_shape(x, rank, iterations, seed, tiles):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "sketch_is_cheaper", lambda *args: tiles)
        hold(low_rank_problem(x, x.g.dtype, seed), 0.2, rank, iterations, x.g.dtype, seed)


def test_low_rank_like_torch():
    """The same seed draws the same test matrix, so that also the energy is torch's, where both sketch as wide."""
    args = low_rank_problem(make_layer([10, 15], 32, 48, torch.float32), torch.float32)
    found = {}
    for backend in ("triton", "torch"):
        with use_backend(backend):
            found[backend] = torch.ops.pyinf.precondition_low_rank(*args, 0.2, 8, 0, 5)
    assert torch.allclose(found["triton"][2], found["torch"][2].float(), atol=1e-5)
    product = [L.double() @ R.double() for L, R, _ in found.values()]
    assert error(product[0], product[1]) < 1e-4
    with use_backend("triton"):
        again = torch.ops.pyinf.precondition_low_rank(*args, 0.2, 8, 0, 5)
        other = torch.ops.pyinf.precondition_low_rank(*args, 0.2, 8, 0, 6)
    assert all(torch.equal(x, y) for x, y in zip(found["triton"], again, strict=True))
    assert not torch.allclose(other[2], found["triton"][2], atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that appears, beside views of ``known`` and inside launches (the interpreter copies
    what it is given)."""

    def __init__(self, known):
        super().__init__()
        self.elements, self.paused, self.known = 0, False, known.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not self.paused:
                if tensor.untyped_storage().data_ptr() != self.known:
                    self.elements = max(self.elements, tensor.numel())
        return out


def test_low_rank_never_holds_the_gradient(monkeypatch):
    args = low_rank_problem(make_layer([5, 4], 64, 80, torch.float32), torch.float32)
    largest = Largest(args[5])

    def launch(launches, device):
        largest.paused = True
        run(launches, device)
        largest.paused = False

    run = triton_precondition.run
    monkeypatch.setattr(triton_precondition, "run", launch)
    for module, holds in ((triton_precondition, False), (torch_backend, True)):
        with largest:
            module.precondition_low_rank(*args[:3], None, None, args[5], 0.2, 4, 0, 0)
        assert (largest.elements >= 64 * 80) == holds  # with torch: so the test can fail


@pytest.mark.parametrize(("width", "transposed"), [(16, True), (80, False)])
def test_sketch_tiles(width, transposed):
    """One pass by itself: several splits, tiles cut on every side, an empty query, a matrix for each query."""
    x = make_layer([9, 0, 30], 40, 75, torch.float32)
    x = Layer(framed(x.g), framed(x.a), x.offsets)
    Lam = framed(randn(40, 75, seed=1, dtype=torch.float32).abs())
    left, right, divisor = (x.a, x.g, Lam.T) if transposed else (x.g, x.a, Lam)
    omega = torch.full((3, divisor.shape[1] + 16, width), float("nan"))[:, : divisor.shape[1]]
    omega.copy_(randn(3, divisor.shape[1], width, seed=2, dtype=torch.float32))
    config = sketches.Config({"BM": 16, "BN": 16, "BK": 16})
    tiles = -(-divisor.shape[0] // 16)
    out, energy = torch.full((2, 3, divisor.shape[0], width), float("nan")), torch.full((2, 3, tiles), float("nan"))
    for launch in sketches.sketch(out, energy, left, right, x.offsets, divisor, omega, 0.3, "ieee", config):
        launch.run()
    G = reference._gradients(left.double(), right.double(), x.offsets) / (divisor.double() + 0.3)
    assert error(out.sum(0), G @ omega.double()) < 1e-6
    assert error(energy.sum((0, 2)), G.square().sum((1, 2))) < 1e-6
    assert (out[:, 1] == 0).all()


def test_the_test_matrix_is_the_shared_one():
    out = torch.full((70, 96), float("nan"))[:, :80]
    for launch in sketches.normal_matrix(out, 1 << 40):
        launch.run()
    stream = reference.STREAM_SKETCH
    assert sketches.STREAM_SKETCH == stream
    assert torch.allclose(out, philox.random_matrix((0, 70), (0, 80), 1 << 40, stream, "normal"), atol=1e-5)


def test_widths_and_plans():
    assert [sketches.widths(w) for w in (1, 16, 17, 32, 33, 48, 72, 80, 128, 136, 144)] == [
        (16, 0), (16, 0), (32, 0), (32, 0), (32, 16), (32, 16), (64, 16), (64, 16), (128, 0), (128, 16), (128, 16),
    ]  # fmt: skip
    for width in range(1, 145):
        a, b = sketches.widths(width)
        assert a + b >= width and a & (a - 1) == 0 and b & (b - 1) == 0 and (b == 0 or b >= 16)
    for family in ("sm_80", "sm_90", "default"):
        for width in (16, 80, 144):
            config = sketches.choose(width, torch.bfloat16, "ieee", family)
            assert config is sketches.CONFIGS[family]["half_wide" if width > 80 else "half"]
            tiles = -(-4096 // config.constants["BM"])
            for queries in (1, 16, 1000):
                splits = sketches.splits_of(4096, 14336, queries, config, family)
                assert splits == 1 or tiles * queries * (splits - 1) < 2 * MULTIPROCESSORS[family]
            assert sketches.splits_of(40, 20, 1, config, family) == 1


def test_route_of_the_sketch():
    assert costs.sketch_is_cheaper(128) and costs.sketch_is_cheaper(274)
    assert not costs.sketch_is_cheaper(275) and not costs.sketch_is_cheaper(4096)
    assert costs.sketch_is_cheaper(164, 2) and not costs.sketch_is_cheaper(164, 3)


def test_padding():
    far = torch.zeros((1 << 22) + 3).as_strided((2, 3), (1 << 22, 1))
    assert near(far) is not far and near(far).stride(0) < 1 << 22
    x = randn(3, 10, 16, seed=1, dtype=torch.float32)
    assert padded(x, 10, 16, torch.float32) is x
    for y in (x[:, :, 1:], x[:, :, ::2], x.mT):
        wide = padded(y, 32, 32, torch.float16, 1.0)
        r, c = y.shape[-2:]
        assert near(y) is y
        assert torch.equal(wide[:, :r, :c], y.half()) and (wide[:, r:] == 1).all() and (wide[:, :, c:] == 1).all()
