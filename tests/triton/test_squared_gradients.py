"""accumulate_squared_gradients in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from pyinf.ops import set_float32_precision, use_backend
from pyinf.triton_kernels import squared_gradients as kernels
from pyinf.triton_kernels.configs import FAMILIES, all_configs
from tests.ops.cases import make_layer, sums
from tests.triton.harness import DTYPES, any_layer, compare, gate, quick, wider

OP = "accumulate_squared_gradients"


def squares(x):
    def call(working):
        dtype = torch.float64 if working == torch.float64 else torch.float32
        Lam = wider(sums(x.g.shape[1], x.a.shape[1], seed=1, dtype=dtype).abs(), 3)
        getattr(torch.ops.pyinf, OP)(Lam, x.g.to(working), x.a.to(working), x.offsets)
        return [Lam]

    return call


@quick
@given(x=any_layer())
def test_any_shape(x):
    compare(squares(x), OP, x.g.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths", [[1], [0, 5, 0, 0, 33], [40, 1], [0], [2] * 30], ids=lambda n: f"{len(n)} sequences"
)
def test_lengths(dtype, lengths):
    for d_out, d_in in ((16, 48), (65, 17)):
        compare(squares(make_layer(lengths, d_out, d_in, dtype)), OP, dtype)


SHIPPED = {
    config.name: (kind, config)
    for family in ("default", *FAMILIES)
    for kind, config in all_configs(kernels.CONFIGS, family)
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_configuration(name):
    """Each shipped configuration, in one run and in two, over tiles that the matrix does not fill."""
    kind, config = SHIPPED[name]
    dtype = torch.float16 if kind.startswith("half") else torch.float32
    x = make_layer([3, 0, 70], 130, 60, dtype)
    exact, plain = torch.zeros(130, 60, dtype=torch.float64), torch.zeros(130, 60)
    for backend, out, y in (("reference", exact, torch.float64), ("torch", plain, dtype)):
        with use_backend(backend):
            getattr(torch.ops.pyinf, OP)(out, x.g.to(y), x.a.to(y), x.offsets)
    for splits in (None, 2):
        out = torch.zeros(130, 60)
        partial = None if splits is None else torch.full((splits, 130, 60), float("nan"))
        precision = kind if dtype == torch.float32 else "ieee"
        for launch in kernels.launches(out, x.g, x.a, x.offsets, partial, precision, config):
            launch.run()
        gate(out, plain, exact, dtype)


def test_runs_of_sequences():
    """All sequences are in exactly one run, no run is empty, and a Λ that fills the card is not cut."""
    for family in FAMILIES:
        for _, config in all_configs(kernels.CONFIGS, family):
            for d_out, d_in in ((768, 769), (64, 64), (4096, 4096), (0, 5)):
                for sequences in (0, 1, 2, 7, 64, 1000):
                    splits = kernels.splits_of(d_out, d_in, sequences, config, family)
                    per_split = -(-sequences // splits)
                    assert splits * per_split >= sequences and (splits == 1 or (splits - 1) * per_split < sequences)
                    assert splits == 1 or splits * d_out * d_in <= 1 << 26
            assert kernels.splits_of(4096, 4096, 64, config, family) == 1


def test_the_precision_reaches_the_kernel(monkeypatch):
    seen, original = [], kernels.launches

    def launches(*args):
        made = original(*args)
        seen.extend(made)
        return made

    monkeypatch.setattr(kernels, "launches", launches)
    before = set_float32_precision("tf32x3")
    try:
        compare(squares(make_layer([5, 6], 20, 20, torch.float32)), OP, torch.float32)
    finally:
        set_float32_precision(before)
    assert {launch.constants["PRECISION"] for launch in seen if "PRECISION" in launch.constants} == {"tf32x3"}


def test_reasons():
    x = make_layer([4], 3, 3, torch.float32)
    from pyinf.errors import BackendUnavailableError, ConfigError

    op = getattr(torch.ops.pyinf, OP)
    with use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match=r"torch\.float64"):
            op(torch.zeros(3, 3, dtype=torch.float64), x.g.double(), x.a.double(), x.offsets)
        with pytest.raises(BackendUnavailableError, match="one dtype"):
            op(torch.zeros(3, 3), x.g.half(), x.a, x.offsets)
        with pytest.raises(BackendUnavailableError, match="next to each other"):
            op(torch.zeros(3, 6)[:, ::2], x.g, x.a, x.offsets)
        with pytest.raises(ConfigError, match="offsets"):
            op(torch.zeros(3, 3), x.g, x.a, x.offsets[:1])
