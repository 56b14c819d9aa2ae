"""project_gradients, random_projection and sparse_projection: values, draws, splits, epilogues, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyinf import ops
from pyinf.errors import BackendUnavailableError
from pyinf.ops import philox, reference
from pyinf.ops.triton_gradients import workspace_on
from pyinf.triton_kernels import project_gradients as kernels
from pyinf.triton_kernels import random_projection as flat
from pyinf.triton_kernels import sparse_projection as sparse
from tests.ops.cases import Layer, make_layer
from tests.triton.harness import DTYPES, any_layer, compare, error, quick, wider

LONG_SUM = 1e-6
STREAMS = {"g": reference.STREAM_G, "a": reference.STREAM_A}


def _project(x: Layer, P_g=None, P_a=None, k_g=6, k_a=5, seed=7, distribution="rademacher"):
    def call(dtype):
        sides = [None if P is None else P.to(dtype) for P in (P_g, P_a)]
        g, a = x.g.to(dtype), x.a.to(dtype)
        return [torch.ops.pyinf.project_gradients(g, a, x.offsets, *sides, k_g, k_a, seed, distribution)[0]]

    return call


@quick
@given(any_layer(40, 20), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1 << 40))
def test_drawn_sides(x, k_g, k_a, seed):
    compare(_project(x, k_g=k_g, k_a=k_a, seed=seed), "project_gradients", x.g.dtype, LONG_SUM)


@quick
@given(any_layer(50, 20), st.integers(1, 40), st.integers(1, 140))
def test_given_sides(x, k_g, k_a):
    if k_a > 128:
        k_a -= 127
    generator = torch.Generator().manual_seed(k_g)
    P_g = torch.randn(x.g.shape[1], k_g, generator=generator).to(x.g.dtype)
    P_a = wider(torch.randn(x.a.shape[1], k_a, generator=generator).to(x.a.dtype), 3)
    compare(_project(x, P_g, P_a, k_g, k_a), "project_gradients", x.g.dtype, LONG_SUM)
    compare(_project(x, P_g, None, k_g, 9, 3), "project_gradients", x.g.dtype, LONG_SUM)


def test_normal_sides():
    x = make_layer([9, 0, 33], 21, 34, torch.float32)
    compare(_project(x, distribution="normal"), "project_gradients", torch.float32, LONG_SUM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_are_split_and_wide_sides_fit(dtype):
    x = make_layer([280, 270], 19, 17, dtype)
    assert kernels.token_splits(550, 2, 32) == 2
    compare(_project(x, k_g=128, k_a=100), "project_gradients", dtype, LONG_SUM)


def test_the_drawn_matrices_are_those_of_the_cpu():
    """One token with a one in one coordinate of each side reads an element of P_gᵀ ⊗ P_a."""
    d, k = 40, 70
    g, a = torch.eye(d)[[3, 39]], torch.eye(d)[[17, 0]]
    with ops.use_backend("triton"):
        found = torch.ops.pyinf.project_gradients(g, a, torch.tensor([0, 1, 2]), None, None, k, k, 1 << 50)[0]
    P_g, P_a = (philox.random_matrix((0, d), (0, k), 1 << 50, STREAMS[side]) for side in "ga")
    for token, (i, j) in enumerate(((3, 17), (39, 0))):
        assert torch.equal((found[token] * k).round(), torch.outer(P_g[i], P_a[j]))


@pytest.mark.parametrize("k_a", [5, 16])
@pytest.mark.parametrize("splits", [1, 2])
def test_epilogues(k_a, splits, monkeypatch):
    """Fused and after a split; rows of sign bits that end inside a byte and such that do not."""
    monkeypatch.setattr(kernels, "token_splits", lambda *args: splits)
    x = make_layer([17, 0, 50], 20, 40, torch.float32)
    options = dict(offsets=x.offsets, k_g=6, k_a=k_a, seed=3)
    with ops.use_backend("triton"):
        plain = ops.project_gradients(x.g, x.a, **options)
        half = ops.project_gradients(x.g, x.a, **options, epilogue="bfloat16")
        values, scale = ops.project_gradients(x.g, x.a, **options, epilogue="int8")
        bits = ops.project_gradients(x.g, x.a, **options, epilogue="sign")
    # The interpreter cuts float32 to bfloat16 instead of rounding it: one unit in the last place either way.
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), plain, rtol=2**-7, atol=0)
    want, want_scale = ops.quantise_int8(plain.flatten(1))
    assert torch.equal(scale, want_scale) and torch.equal(values, want.view(plain.shape))
    assert torch.equal(bits, ops.pack_signs(plain.flatten(1)))


def _random(x, k, seed=0, distribution="rademacher"):
    return lambda dtype: [torch.ops.pyinf.random_projection(x.to(dtype), k, seed, distribution)]


def _flat(rows, d, dtype, seed, strided):
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x if not strided else wider(x, 3)


flats = st.tuples(st.integers(0, 40), st.integers(0, 200), st.sampled_from(DTYPES), st.integers(0, 99), st.booleans())


@quick
@given(flats, st.integers(1, 300), st.integers(0, 1 << 40))
def test_random_projection(arguments, k, seed):
    x = _flat(*arguments)
    compare(_random(x, k, seed), "random_projection", x.dtype, LONG_SUM)


def test_random_projection_transposed_and_normal():
    x = _flat(70, 33, torch.float32, 1, False)
    compare(_random(x.T, 130, 5), "random_projection", torch.float32, LONG_SUM)
    compare(_random(x, 10, 5, "normal"), "random_projection", torch.float32, LONG_SUM)


def test_any_split_and_tile_gives_the_same_projection(monkeypatch):
    x = _flat(5, 300, torch.float32, 1, False)
    assert flat.depth_splits(9000, 1) == 2 and flat.depth_splits(100, 1) == 1
    assert flat.depth_splits(1 << 33, 10**6) == 8, "offsets inside a stretch must fit 32 bits"
    outs = []
    for kind in ("ieee few", "tf32 many"):
        for least in (100, 70, 1000):
            out = torch.full((5, 40), float("nan"))
            monkeypatch.setattr(flat, "depth_splits", lambda d, tiles, least=least: max(1, d // least))
            config = flat.CONFIGS["default"][kind]
            for launch in flat.random_launches(
                x, 40, 3, "rademacher", out, workspace_on(x.device), "default", config=config
            ):
                launch.run()
            outs.append(out)
    for out in outs[1:]:
        assert error(out, outs[0]) < 1e-6


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_johnson_lindenstrauss_error_is_that_of_theory(distribution):
    """Projected inner products of unit vectors err with variance (1 + ⟨x, y⟩²) / k; signs: less 2·Σ x²y² / k."""
    d, k = 40, 1024
    x = torch.nn.functional.normalize(torch.randn(24, d, generator=torch.Generator().manual_seed(0)), dim=1)
    with ops.use_backend("triton"):
        y = ops.random_projection(x, k, seed=11, distribution=distribution)
    exact = x @ x.T
    variance = 1 + exact**2 - (2 * (x**2) @ (x**2).T if distribution == "rademacher" else 0)
    above = torch.ones_like(exact).triu(1).bool()
    ratio = (((y @ y.T - exact) ** 2)[above] * k / variance[above]).mean()
    assert 0.75 < ratio < 1.3


def _sparse(x, k, seed, nnz):
    return lambda dtype: [torch.ops.pyinf.sparse_projection(x.to(dtype), k, seed, nnz)]


@quick
@given(flats, st.integers(1, 200), st.integers(0, 1 << 40), st.integers(1, 2))
def test_sparse_projection(arguments, k, seed, nnz):
    x = _flat(*arguments)
    compare(_sparse(x, k, seed, nnz), "sparse_projection", x.dtype, LONG_SUM)


def test_sparse_projection_in_stretches(monkeypatch):
    monkeypatch.setattr(sparse, "depth_splits", lambda d, tiles: 3)
    x = _flat(3, 200, torch.float32, 0, True)
    compare(_sparse(x, 20, 3, 2), "sparse_projection", torch.float32, LONG_SUM)


def test_refusals_give_a_reason():
    x = torch.ones(2, 8)
    with ops.use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match="at most 128 columns"):
            ops.project_gradients(x, x, k_g=129, k_a=4)
        with pytest.raises(BackendUnavailableError, match="at most 1024 buckets"):
            ops.sparse_projection(x, 1025)
        with pytest.raises(BackendUnavailableError, match="nnz=9"):
            ops.sparse_projection(x, 8, nnz=9)
        with pytest.raises(BackendUnavailableError, match="float64"):
            ops.random_projection(x.double(), 8)
