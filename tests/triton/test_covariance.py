"""accumulate_covariance in the interpreter, and the index map of its triangle."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from pyinf.errors import BackendUnavailableError
from pyinf.ops import use_backend
from pyinf.triton_kernels import covariance as kernels
from pyinf.triton_kernels.configs import FAMILIES, all_configs
from tests.ops.cases import sums
from tests.triton.harness import DTYPES, compare, gate, quick, sizes, wider

OP = "accumulate_covariance"


def tokens(n, d, dtype, strided=False, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wider(x, 5) if strided else x


def some(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.6


def covariance(x, bias, mask):
    def call(working):
        d = x.shape[1] + bias
        C = wider(sums(d, d, seed=1, dtype=torch.float64 if working == torch.float64 else torch.float32), 3)
        upper = C.triu(1).clone()
        getattr(torch.ops.pyinf, OP)(C, x.to(working), bias, mask)
        if working != torch.float64:
            assert upper.isfinite().all()
        return [C.tril()]

    return call


@quick
@given(
    n=st.integers(0, 90), d=sizes(140), dtype=st.sampled_from(DTYPES), bias=st.booleans(), masked=st.booleans(),
    strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(n, d, dtype, bias, masked, strided, seed):
    x = tokens(n, d, dtype, strided, seed)
    compare(covariance(x, bias, some(n, seed) if masked else None), OP, dtype)


SHIPPED = {c.name: (k, c) for family in ("default", *FAMILIES) for k, c in all_configs(kernels.CONFIGS, family)}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_configuration(name):
    """Each shipped configuration, in one run and in two, masked, with a bias, over tiles that C does not fill."""
    kind, config = SHIPPED[name]
    dtype = torch.float16 if kind.startswith("half") else torch.float32
    n, d = 150, 140
    x, mask = tokens(n, d, dtype), some(n)
    exact, plain = torch.zeros(d + 1, d + 1, dtype=torch.float64), torch.zeros(d + 1, d + 1)
    for backend, out, y in (("reference", exact, torch.float64), ("torch", plain, dtype)):
        with use_backend(backend):
            getattr(torch.ops.pyinf, OP)(out, x.to(y), True, mask)
    for splits in (1, 2):
        out, size = torch.zeros(d + 1, d + 1), config.constants["BM"]
        shape = (splits, kernels.tiles_of(d, config), size, size)
        partial = None if splits == 1 else torch.full(shape, float("nan"))
        ones = torch.full((splits, d + 1), float("nan"))
        precision = kind if dtype == torch.float32 else "ieee"
        for launch in kernels.launches(out, x, mask.view(torch.uint8), ones, partial, precision, config):
            launch.run()
        gate(out.tril(), plain.tril(), exact.tril(), dtype)
        assert not out.triu(1).any(), "wrote above the diagonal"


def test_long_input_is_cut_into_runs():
    x = tokens(1100, 20, torch.float32)
    config = kernels.choose(20, torch.float32, "ieee", "default")
    assert kernels.splits_of(20, 1100, config, "default") == 2
    compare(covariance(x, True, some(1100)), OP, torch.float32)


def test_a_mask_of_zeros_adds_nothing():
    compare(covariance(tokens(9, 18, torch.float16), True, torch.zeros(9, dtype=torch.bool)), OP, torch.float16)


def test_runs_of_tokens():
    """All tokens are in exactly one run, no run is empty or short, and a C that fills the card is not cut."""
    for family in FAMILIES:
        for _, config in all_configs(kernels.CONFIGS, family):
            for d in (1, 64, 768, 4096):
                for n in (0, 1, 511, 1024, 5000, 1 << 17):
                    splits = kernels.splits_of(d, n, config, family)
                    per_split = kernels._per_split(n, splits, config)
                    assert splits * per_split >= n and (splits == 1 or (splits - 1) * per_split < n)
                    assert splits == 1 or per_split >= 512
            assert kernels.splits_of(8192, 1 << 17, config, family) == 1


@triton.jit
def triangle_kernel(out, n, BAND: tl.constexpr):
    row, column = kernels.triangle_tile(tl.program_id(0), n, BAND)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("band", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 21])
def test_the_triangle_has_every_tile_once(n, band):
    count = n * (n + 1) // 2
    out = torch.full((count, 2), -1, dtype=torch.int32)
    triangle_kernel[(count,)](out, n, band)
    assert {tuple(pair) for pair in out.tolist()} == {(i, j) for i in range(n) for j in range(i + 1)}
    # Within a band all rows of a column come one after the other, which is what they share operands for.
    bands = [row // band for row, _ in out.tolist()]
    assert bands == sorted(bands)


@triton.jit
def rows_kernel(out, first, COUNT: tl.constexpr):
    index = first + tl.arange(0, COUNT)
    tl.store(out + tl.arange(0, COUNT), kernels._row_of(index))


def test_rows_of_large_triangles():
    """The root is right where float32 rounds: around the ends of rows up to four thousand (two million tiles)."""
    for row in (1, 2, 100, 1023, 2047, 2896, 4095, 5000):
        first = row * (row + 1) // 2 - 8
        out = torch.empty(16, dtype=torch.int32)
        rows_kernel[(1,)](out, max(first, 0), 16)
        expected = [next(r for r in range(row - 8 if row > 8 else 0, row + 9) if (r + 1) * (r + 2) // 2 > k)
                    for k in range(max(first, 0), max(first, 0) + 16)]  # fmt: skip
        assert out.tolist() == expected


def test_reasons():
    x, op = torch.ones(3, 4), getattr(torch.ops.pyinf, OP)
    with use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match=r"torch\.float64, only for"):
            op(torch.zeros(4, 4, dtype=torch.float64), x.double())
        with pytest.raises(BackendUnavailableError, match="next to each other"):
            op(torch.zeros(4, 8)[:, ::2], x)
