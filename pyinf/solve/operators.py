"""What a solver sees: a symmetric positive semi-definite curvature ``C`` known by its products, and ``A = C + λ``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Damped", "MatrixOperator", "Operator", "Outcome", "Solution", "error_bound", "relative_residuals"]


class Operator:
    """``X [Q, D] ↦ C X [Q, D]``, row by row. ``products`` counts the rows multiplied so far."""

    size: int
    products: int = 0

    def __call__(self, X: Tensor) -> Tensor:
        """The product, counted."""
        self.products += X.shape[0]
        return self.apply(X)

    def apply(self, X: Tensor) -> Tensor:
        """The product."""
        raise NotImplementedError


class MatrixOperator(Operator):
    """An explicit symmetric matrix ``[D, D]``, or any function of ``[Q, D]`` with its size."""

    def __init__(self, matrix: Tensor | Callable[[Tensor], Tensor], size: int | None = None) -> None:
        self.matrix = matrix
        self.size = size if size is not None else int(matrix.shape[0])  # type: ignore[union-attr]

    def apply(self, X: Tensor) -> Tensor:
        """``X C``."""
        return X @ self.matrix if isinstance(self.matrix, Tensor) else self.matrix(X)


class Damped(Operator):
    """``A = C + diag(λ)``, λ ``[D]`` (one value a layer, spread)."""

    def __init__(self, curvature: Operator, damping: Tensor) -> None:
        self.curvature, self.damping, self.size = curvature, damping, curvature.size

    def apply(self, X: Tensor) -> Tensor:
        """``C X + λ X``."""
        return torch.addcmul(self.curvature(X), X, self.damping)


@dataclass
class Outcome:
    """How one query's solve ended: ``solved``, ``approximate`` (a usable iterate above tol) or ``failed``, and why."""

    status: str
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether there is no usable solution."""
        return self.status == "failed"


@dataclass
class Solution:
    """``X [Q, D]`` with what is known about it, one entry a query.

    ``residuals`` are true relative residuals ``‖AX − V‖/‖V‖`` (recomputed from a product, never the recurrence's own);
    ``bounds`` bound ``‖x − x*‖_A / ‖x*‖_A`` from above. Both are None where the solver measured none.
    """

    X: Tensor
    outcomes: list[Outcome]
    iterations: list[int]
    residuals: list[float] | None = None
    bounds: list[float] | None = None
    products: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def solved(self) -> list[bool]:
        """Which queries hold to tol."""
        return [o.status == "solved" for o in self.outcomes]


def relative_residuals(R: Tensor, V: Tensor) -> Tensor:
    """``‖R_q‖/‖V_q‖`` ``[Q]``; 0 where ``V_q`` is zero and so is ``R_q``."""
    top, bottom = R.norm(dim=1), V.norm(dim=1)
    return torch.where(bottom > 0, top / bottom.clamp(min=torch.finfo(bottom.dtype).tiny), top)


def error_bound(X: Tensor, R: Tensor, V: Tensor, damping: Tensor) -> Tensor:
    """Upper bound of ``‖x − x*‖_A / ‖x*‖_A`` ``[Q]`` for ``A = C + λ`` with any ``C ⪰ 0`` and ``R = V − AX``.

    ``‖x − x*‖_A² = rᵀA⁻¹r ≤ Σ r²/λ`` and ``‖x*‖_A² ≥ 2⟨x, v⟩ − ⟨x, Ax⟩ = ⟨x, v⟩ + ⟨x, r⟩``. It follows that every
    score is within ``bound · √(τ_qq τ_ii)`` of the exact one, with ``τ_qq`` and ``τ_ii`` the self-influences.
    Infinite where ``x`` is no better than nothing.
    """
    error = (R.square() / damping).sum(dim=1)
    energy = (X * (V + R)).sum(dim=1)
    out = (error / energy.clamp(min=torch.finfo(energy.dtype).tiny)).sqrt()
    out = torch.where(energy > 0, out, torch.full_like(out, float("inf")))
    return torch.where((V == 0).all(dim=1) & (error == 0), torch.zeros_like(out), out)
