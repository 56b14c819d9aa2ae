"""Eigenbases of the Kronecker factors, by a choice of solvers.

EK-FAC's corrected eigenvalues are the exact second moments in **any** orthogonal basis, so a solver may trade how
diagonal the factor becomes for time; what it may not give up is orthogonality. Both are measured by residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyinf.curvature.eigen_gpu import divide_and_conquer
from pyinf.errors import ConfigError, NonFiniteError

__all__ = ["EIGENSOLVERS", "SMALL_FACTOR", "EigenResidual", "eigenbasis", "residuals", "solved_together"]

EIGENSOLVERS = {
    "auto": "LAPACK or cuSOLVER in fp32, in fp64 up to 512 rows, where it costs next to nothing",
    "fp32": "LAPACK or cuSOLVER syevd in fp32",
    "fp64": "LAPACK or cuSOLVER syevd in fp64",
    "divide-and-conquer": "spectral divide and conquer by the matrix sign: products only, residuals checked",
    "orthogonal-iteration": "blocked orthogonal iteration with a Rayleigh quotient for the eigenvalues",
}
_ITERATIONS = 4
SMALL_FACTOR = 512
"""Rows up to which float64 costs next to nothing beside the rest."""


@dataclass(frozen=True)
class EigenResidual:
    """``‖AQ − QΛ‖/‖A‖`` and ``‖QᵀQ − I‖/√n``, Frobenius."""

    decomposition: float
    orthogonality: float


def solved_together(matrix: Tensor, solver: str = "auto") -> bool:
    """Whether factors like this one are decomposed in one batched call for all of one size
    (:func:`pyinf.curvature.eigen_gpu.batched_eigh`) rather than each by :func:`eigenbasis`: small ones on a GPU, where
    a launch costs more than the work. On a CPU a batch is the same loop over LAPACK, and one copy more.
    """
    return matrix.is_cuda and matrix.shape[0] <= SMALL_FACTOR and solver in ("auto", "fp64")


def eigenbasis(matrix: Tensor, solver: str = "auto", name: str = "factor") -> tuple[Tensor, Tensor]:
    """Orthogonal ``Q`` and eigenvalues ``d ≥ 0`` with ``matrix ≈ Q diag(d) Qᵀ``.

    Args:
        matrix: ``[n, n]``; only the lower triangle is read.
        solver: a key of :data:`EIGENSOLVERS`.
        name: for errors.

    Returns:
        ``(Q [n, n], d [n])`` in the matrix's dtype; ascending for the direct solvers.

    Raises:
        ConfigError: unknown solver.
        NonFiniteError: the matrix, or what the solver made of it, is not finite.
    """
    if solver not in EIGENSOLVERS:
        raise ConfigError(f"unknown eigensolver '{solver}'; choose one of {', '.join(EIGENSOLVERS)}")
    if not bool(torch.isfinite(matrix.diagonal()).all()):
        raise NonFiniteError(f"the covariance of {name} is not finite; run the model in a wider dtype")
    dtype = matrix.dtype
    if solver == "divide-and-conquer":
        return divide_and_conquer(matrix, name=name)
    if solver == "orthogonal-iteration":
        return _orthogonal_iteration(matrix)
    # Close eigenvalues make fp32 eigenvectors follow the last bit of the input, hence the batch size; small factors
    # need not put up with that.
    wide = solver == "fp64" or (solver == "auto" and matrix.shape[0] <= SMALL_FACTOR)
    work = matrix.double() if wide else matrix
    try:
        values, vectors = torch.linalg.eigh(work, UPLO="L")
    except torch.linalg.LinAlgError:
        if work.dtype == torch.float64:
            raise
        # divide-and-conquer can fail to converge on clustered spectra in fp32; fp64 of the same matrix is the remedy
        values, vectors = torch.linalg.eigh(work.double(), UPLO="L")
    values, vectors = values.to(dtype).clamp_(min=0), vectors.to(dtype)
    if not bool(torch.isfinite(values).all()) or not bool(torch.isfinite(vectors).all()):
        raise NonFiniteError(f"the eigendecomposition of {name} is not finite; use eigensolver='fp64'")
    return vectors.contiguous(), values


def _orthogonal_iteration(matrix: Tensor) -> tuple[Tensor, Tensor]:
    full = matrix.tril() + matrix.tril(-1).T
    # Start from the columns with the largest diagonal: closest to the leading directions that is known for nothing.
    order = full.diagonal().argsort(descending=True)
    basis = torch.eye(full.shape[0], dtype=full.dtype, device=full.device)[:, order]
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(full @ basis)
    basis, _ = torch.linalg.qr(basis)
    values = ((full @ basis) * basis).sum(dim=0)
    return basis.contiguous(), values.clamp_(min=0)


def residuals(matrix: Tensor, vectors: Tensor, values: Tensor) -> EigenResidual:
    """Residuals of a decomposition, in float64."""
    lower = matrix.double()
    full = lower.tril() + lower.tril(-1).T
    q, d = vectors.double(), values.double()
    scale = full.norm().clamp(min=torch.finfo(torch.float64).tiny)
    off = (full @ q - q * d).norm() / scale
    gram = q.T @ q
    gram.diagonal().sub_(1)
    return EigenResidual(float(off), float(gram.norm() / max(1, q.shape[0]) ** 0.5))
