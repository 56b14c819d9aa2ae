"""Divide and conquer through the matrix sign, on the CPU: residuals against LAPACK's, whatever the spectrum."""

from __future__ import annotations

import pytest
import torch

from pyinf.curvature import EIGENSOLVERS, blocks, eigenbasis, fit, residuals
from pyinf.curvature import eigen_gpu as gpu
from pyinf.curvature.eigen import solved_together
from pyinf.errors import ConfigError, NonFiniteError

N = 150
SPECTRA = {
    "falling over 8 decades": torch.logspace(0, -8, N, dtype=torch.float64),
    "power law": torch.arange(1, N + 1, dtype=torch.float64) ** -1.5,
    "flat": 1 + 0.1 * torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "three clusters": torch.tensor([1.0] * 50 + [0.5] * 40 + [1e-3] * 60, dtype=torch.float64),
    "rank deficient": torch.cat([torch.linspace(0.1, 1, 40, dtype=torch.float64), torch.zeros(N - 40).double()]),
    "one large": torch.cat([torch.ones(1).double(), torch.full((N - 1,), 1e-3, dtype=torch.float64)]),
    "identity": torch.ones(N, dtype=torch.float64),
    "zero": torch.zeros(N, dtype=torch.float64),
}


def matrix(spectrum, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64, generator=generator)).Q
    return ((q * spectrum) @ q.T).to(dtype)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "float64"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
def test_residuals_are_those_of_lapack(spectrum, precision):
    dtype = torch.float64 if precision == "float64" else torch.float32
    A = matrix(spectrum, dtype)
    kept = A.clone()
    Q, d = gpu.divide_and_conquer(A, leaf=24, precision="ieee" if precision == "float64" else precision)
    found, lapack = residuals(A, Q, d), residuals(A, *reversed(torch.linalg.eigh(A)))
    eps = torch.finfo(dtype).eps
    assert found.decomposition <= 4 * lapack.decomposition + 20 * eps
    assert found.orthogonality <= 2 * lapack.orthogonality + 10 * eps
    assert (d.double() - spectrum.sort().values).abs().max() <= 50 * eps * max(1e-300, float(spectrum.max()))
    assert (d[1:] >= d[:-1]).all() and (d >= 0).all() and Q.dtype == dtype
    assert torch.equal(A, kept)


def test_only_the_lower_triangle_is_read_and_twice_gives_the_same_bits():
    A = matrix(SPECTRA["power law"])
    first = gpu.divide_and_conquer(A, leaf=32)
    second = gpu.divide_and_conquer(A.tril() + 9 * torch.ones_like(A).triu(1), leaf=32)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_it_is_an_eigensolver_by_name():
    A = matrix(SPECTRA["power law"])
    assert "divide-and-conquer" in EIGENSOLVERS
    Q, d = eigenbasis(A, "divide-and-conquer")
    assert residuals(A, Q, d).decomposition < 1e-5


def test_a_result_that_is_not_good_enough_is_an_error(monkeypatch):
    A = matrix(SPECTRA["power law"])
    with pytest.raises(NonFiniteError, match=r"not good enough.*eigensolver='fp64'"):
        gpu.divide_and_conquer(A, leaf=32, tolerance=1e-9)
    right = gpu._direct
    monkeypatch.setattr(gpu, "_direct", lambda M: (torch.full_like(M, float("nan")), right(M)[1]))
    with pytest.raises(NonFiniteError):
        gpu.divide_and_conquer(A, leaf=32)


def test_a_wrong_split_is_noticed(monkeypatch):
    right = gpu.matrix_sign

    def crude(A, precision="ieee", smallest=None):  # stops long before the small eigenvalues have a sign
        return right(A, precision, smallest=0.5)

    monkeypatch.setattr(gpu, "matrix_sign", crude)
    with pytest.raises(NonFiniteError, match="not good enough"):
        gpu.divide_and_conquer(matrix(SPECTRA["falling over 8 decades"]), leaf=24)


def test_bad_arguments():
    A = torch.eye(4)
    with pytest.raises(ConfigError, match="unknown precision 'tf32'"):
        gpu.divide_and_conquer(A, precision="tf32")
    with pytest.raises(ConfigError, match="leaf"):
        gpu.divide_and_conquer(A, leaf=1)
    with pytest.raises(NonFiniteError, match="factor x"):
        gpu.divide_and_conquer(A * float("nan"), name="factor x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_sign(dtype):
    d = torch.cat([torch.linspace(-1, -1e-4, 30), torch.linspace(1e-4, 3, 20)]).double()
    A = matrix(d, dtype)
    S, count = gpu.matrix_sign(A)
    exact = matrix(d.sign(), torch.float64)
    # an eigenvalue of 1e-4 of the norm amplifies the rounding of A by as much
    assert (S.double() - exact).norm() / exact.norm() < 3e4 * torch.finfo(dtype).eps
    assert 10 < count < 60


def test_tf32_parts_multiply_to_float32():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 64, generator=generator) for _ in range(2))
    high, low = gpu._split(x)
    assert torch.equal(high + low, x) and (high.view(torch.int32) & 0x1FFF == 0).all()
    assert (low.abs() <= 2.0**-10 * x.abs()).all()
    exact = x.double() @ y.double()
    parts = [p.double() for p in (*gpu._split(x), *gpu._split(y))]
    kept = parts[0] @ parts[2] + parts[0] @ parts[3] + parts[1] @ parts[2]
    assert (kept - exact).norm() / exact.norm() < 1e-6  # what tensor cores are left out of
    assert (gpu.product(x, y, "tf32x3").double() - exact).norm() / exact.norm() < 1e-6


def test_batches_of_one_size_are_one_call(monkeypatch):
    sizes = [5, 8, 5, 3, 8, 5]
    matrices = [matrix(torch.linspace(0.1, 1, n, dtype=torch.float64), seed=i) for i, n in enumerate(sizes)]
    calls = []
    right = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A, UPLO="L": calls.append(A.shape) or right(A, UPLO=UPLO))
    found = gpu.batched_eigh(matrices)
    assert sorted(calls) == [(1, 3, 3), (2, 8, 8), (3, 5, 5)]
    for A, (Q, d) in zip(matrices, found, strict=True):
        assert Q.dtype == A.dtype and residuals(A, Q, d).decomposition < 1e-6
    calls.clear()
    gpu.batched_eigh(matrices, most=50)
    assert len(calls) == 5 and all(shape[0] * shape[1] * shape[2] <= 64 for shape in calls)
    with pytest.raises(NonFiniteError, match="matrix 1"):
        gpu.batched_eigh([torch.eye(3), torch.full((3, 3), float("nan"))])
    assert gpu.batched_eigh([]) == []


def _sums(seed: int = 0) -> fit._Covariances:
    """Covariance sums of four layers, two of which share an input; one factor is wider than small ones are."""
    covariances = fit._Covariances()
    generator = torch.Generator().manual_seed(seed)
    for kind, name, width in (("A", "q", 7), ("A", "up", 5), ("S", "q", 7), ("S", "k", 7), ("S", "up", 12)):
        x = torch.randn(40, width, generator=generator)
        getattr(covariances, kind)[name] = x.T @ x
        covariances.rows[f"{kind}:{name}"] = 40
    return covariances


def test_small_factors_are_decomposed_together(monkeypatch):
    """As on a GPU: those of one size in one call, the others one by one; the same factors, errors with their names."""
    plain = fit._eigenbases(_sums(), "auto", {}, None, torch.float32)
    batches, solve = [], torch.linalg.eigh
    monkeypatch.setattr(blocks, "solved_together", lambda matrix, solver: matrix.shape[0] <= 7 and solver == "auto")
    monkeypatch.setattr(torch.linalg, "eigh", lambda x, UPLO="L": batches.append(tuple(x.shape)) or solve(x, UPLO=UPLO))
    together = fit._eigenbases(_sums(), "auto", {}, None, torch.float32)
    assert sorted(batches) == [(1, 5, 5), (3, 7, 7), (12, 12)]
    for old, new in zip(plain[1:], together[1:], strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    for name, factor in plain[0].items():
        assert torch.equal(factor.basis, together[0][name].basis)
        assert torch.equal(factor.eigenvalues, together[0][name].eigenvalues)
    batches.clear()
    fit._eigenbases(_sums(), "auto", {}, 6, torch.float32)  # blocks of six: no factor of seven is whole
    assert (3, 7, 7) not in batches
    broken = _sums()
    broken.S["k"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="output gradient of layer 'k'"):
        fit._eigenbases(broken, "auto", {}, None, torch.float32)


def test_where_factors_are_decomposed_together():
    """Small ones on a GPU, for solvers that take float64 there."""

    class OnGpu:
        is_cuda, shape = True, (512, 512)

    assert solved_together(OnGpu()) and solved_together(OnGpu(), "fp64") and not solved_together(OnGpu(), "fp32")
    OnGpu.shape = (513, 513)
    assert not solved_together(OnGpu()) and not solved_together(torch.eye(4))
