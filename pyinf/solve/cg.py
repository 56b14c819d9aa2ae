"""Preconditioned conjugate gradients for many right-hand sides: as one block that shares its search space, or side by
side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyinf.solve.operators import Damped, Operator, Outcome, Solution, error_bound, relative_residuals

__all__ = ["block_cg", "cg"]

_PATIENCE = 60
_IMPROVEMENT = 0.97
_INDEFINITE = (
    "the operator is not positive definite (a search direction has curvature {value:.2g}); raise the damping, or run "
    "the model in float64"
)
_NOT_FINITE = "diverged: a product is not finite; raise the damping, or run the model in float64"
_STAGNATED = "stagnated at a relative residual of {value:.2g}: rounding limits it there; use dtype=torch.float64 or a "
_STAGNATED += "larger damping"
_UNMEASURED = "stopped after {count} iterations; its residual was not measured"
_SHORT = "stopped after {count} iterations at a relative residual of {value:.2g}; raise max_iterations or the damping"


class _Watch:
    """Per-query stopping: true residuals, the bound of the error, stagnation."""

    def __init__(
        self, A: Operator, V: Tensor, tol: float, damping: Tensor | None, after: Callable[[int, Tensor, Tensor], None]
    ) -> None:
        self.A, self.V, self.tol, self.damping, self.after = A, V, tol, damping, after
        count = V.shape[0]
        self.active = V.norm(dim=1) > 0
        self.outcomes = [Outcome("solved", "the gradient is zero") for _ in range(count)]
        self.iterations = [0] * count
        self.best = torch.full((count,), float("inf"), dtype=V.dtype, device=V.device)
        self.best_at = [0] * count
        self.attempts = [0] * count
        self.residuals = torch.zeros(count, dtype=V.dtype, device=V.device)
        self.bounds = torch.zeros_like(self.residuals)

    def criterion(self, X: Tensor, R: Tensor, rows: Tensor) -> Tensor:
        """The larger of relative residual and error bound (where a damping is known)."""
        value = relative_residuals(R[rows], self.V[rows])
        if self.damping is not None:
            value = torch.maximum(value, error_bound(X[rows], R[rows], self.V[rows], self.damping))
        return value

    def close(self, row: int, status: str, reason: str, iteration: int) -> None:
        """Stop a query."""
        self.active[row] = False
        self.outcomes[row] = Outcome(status, reason)
        self.iterations[row] = iteration

    def measure(self, X: Tensor, R: Tensor, rows: Tensor) -> Tensor:
        """True residuals of some rows, put into ``R``; returns their criterion."""
        R[rows] = self.V[rows] - self.A(X[rows])
        self.residuals[rows] = relative_residuals(R[rows], self.V[rows])
        if self.damping is not None:
            self.bounds[rows] = error_bound(X[rows], R[rows], self.V[rows], self.damping)
        return self.criterion(X, R, rows)

    def step(self, X: Tensor, R: Tensor, iteration: int) -> bool:
        """After an iteration: claims of convergence are measured, stagnation is noticed. True while any is active."""
        self.after(iteration, X, R)
        rows = self.active.nonzero().squeeze(1)
        if rows.numel() == 0:
            return False
        value = self.criterion(X, R, rows)
        bad = ~torch.isfinite(R[rows].sum(dim=1))
        if bool(bad.any()):
            for row in rows[bad].tolist():
                self.close(row, "failed", _NOT_FINITE, iteration)
            rows, value = rows[~bad], value[~bad]
        claims = rows[value <= self.tol]
        if claims.numel():
            for row, true in zip(claims.tolist(), self.measure(X, R, claims).tolist(), strict=True):
                if true <= self.tol:
                    self.close(row, "solved", "", iteration)
                    continue
                self.attempts[row] += 1
                if self.attempts[row] >= 5:  # the recurrence says solved and the product says no, five times over
                    self.close(row, "approximate", _STAGNATED.format(value=float(self.residuals[row])), iteration)
        for row, found in zip(rows.tolist(), value.tolist(), strict=True):
            if found < _IMPROVEMENT * float(self.best[row]):
                self.best[row], self.best_at[row] = found, iteration
            elif self.active[row] and iteration - self.best_at[row] >= _PATIENCE:
                self.measure(X, R, torch.tensor([row], device=X.device))
                self.close(row, "approximate", _STAGNATED.format(value=float(self.residuals[row])), iteration)
        return bool(self.active.any())

    def indefinite(self, value: float, iteration: int) -> None:
        """Stop all active queries."""
        reason = _NOT_FINITE if value != value else _INDEFINITE.format(value=value)
        for row in self.active.nonzero().squeeze(1).tolist():
            self.close(row, "failed", reason, iteration)

    def finish(self, X: Tensor, R: Tensor, iteration: int, started: int, final: bool) -> Solution:
        """Measure what ran out of iterations (``final``), or say that nobody did."""
        rows = self.active.nonzero().squeeze(1)
        if rows.numel() and not final:
            for row in rows.tolist():
                self.close(row, "approximate", _UNMEASURED.format(count=iteration), iteration)
        elif rows.numel():
            values = self.measure(X, R, rows).tolist()
            for row, value in zip(rows.tolist(), values, strict=True):
                if value <= self.tol:
                    self.close(row, "solved", "", iteration)
                else:
                    self.close(
                        row,
                        "approximate",
                        _SHORT.format(count=iteration, value=float(self.residuals[row])),
                        iteration,
                    )
        for row, outcome in enumerate(self.outcomes):
            if outcome.failed:
                X[row] = self.residuals[row] = self.bounds[row] = float("nan")
        products = self.A.products - started
        if rows.numel() and not final:
            return Solution(X, self.outcomes, self.iterations, None, None, products)
        bounds = self.bounds.tolist() if self.damping is not None else None
        return Solution(X, self.outcomes, self.iterations, self.residuals.tolist(), bounds, products)


def _start(A: Operator, V: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where to start and its residual; ``x0`` is scaled by ``⟨x, v⟩/⟨x, Ax⟩``, the best multiple in the energy norm."""
    if x0 is None:
        return torch.zeros_like(V), V.clone()
    AX = A(x0)
    along, energy = (x0 * V).sum(dim=1), (x0 * AX).sum(dim=1)
    usable = (energy > 0) & (along > 0) & torch.isfinite(energy)
    scale = torch.where(usable, along / energy.clamp(min=torch.finfo(V.dtype).tiny), torch.zeros_like(along))
    scale = scale.unsqueeze(1)
    return scale * x0, V - scale * AX


def _damping(A: Operator, bound: bool) -> Tensor | None:
    return A.damping if bound and isinstance(A, Damped) else None


def block_cg(
    A: Operator,
    V: Tensor,
    precondition: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
    tol: float = 1e-2,
    max_iterations: int = 200,
    bound: bool = True,
    final: bool = True,
    after: Callable[[int, Tensor, Tensor], None] = lambda *_: None,
) -> Solution:
    """Solve ``A x_q = v_q`` for all rows in one Krylov space, which every query searches.

    Each iteration multiplies one direction a still active query. Directions that have become dependent are left out
    (the breakdown-free form of O'Leary's block CG). A query stops when its **true** relative residual, and with
    ``bound`` the bound of its error in the energy norm as well, are at most ``tol``; its row is then left alone.

    Args:
        A: symmetric positive definite, for the bound a :class:`Damped`.
        V: ``[Q, D]``.
        precondition: ``[q, D] → [q, D]``, symmetric positive definite, about ``A⁻¹``.
        x0: where to start; default 0.
        final: measure queries that ran out of iterations, by one more product each; else there are no residuals where
            any did.
        after: called with the iteration's number, ``X`` and its residuals by the recurrence, at the start (0) and after
            every iteration.

    Returns:
        A :class:`Solution`; queries whose operator turned out indefinite or whose iterate is not finite are
        ``failed``.

    Sources: O'Leary 1980 (Linear Algebra Appl. 29), Ji & Li 2017 (BIT 57, breakdown-free block CG).
    """
    started = A.products
    X, R = _start(A, V, x0)
    watch = _Watch(A, V, tol, _damping(A, bound), after)
    iteration = 0
    P = AP = T = None
    running = watch.step(X, R, 0)
    while running and iteration < max_iterations:
        iteration += 1
        W = R[watch.active]
        W = precondition(W) if precondition is not None else W.clone()
        if P is not None:
            W -= _solve(T, W @ AP.T) @ P  # conjugate to the last directions
        P = _orthonormal(W)
        AP = A(P)
        T = P @ AP.T
        T = 0.5 * (T + T.T)
        value = _smallest(T)
        if value is not None:
            watch.indefinite(value, iteration)
            break
        rows = watch.active
        step = _solve(T, R[rows] @ P.T)
        X[rows] += step @ P
        R[rows] -= step @ AP
        running = watch.step(X, R, iteration)
    return watch.finish(X, R, iteration, started, final)


def _orthonormal(W: Tensor) -> Tensor:
    """Orthonormal rows that span those of ``W``, without the directions that rounding alone holds apart."""
    W = W / W.norm(dim=1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)
    if not bool(torch.isfinite(W).all()):
        return W
    Q, upper = torch.linalg.qr(W.T)
    U, s, _ = torch.linalg.svd(upper)
    keep = s > 100 * torch.finfo(W.dtype).eps * s[0]
    return (Q @ U[:, keep]).T.contiguous()


def _smallest(T: Tensor) -> float | None:
    """The smallest eigenvalue of ``T`` where it is not positive or not finite, else None."""
    if not bool(torch.isfinite(T).all()):
        return float("nan")
    values = torch.linalg.eigvalsh(T.double())
    return None if float(values[0]) > 0 else float(values[0])


def _solve(T: Tensor, rows: Tensor) -> Tensor:
    """``rows T⁻¹`` in float64."""
    return torch.linalg.solve(T.double(), rows.double().T).T.to(rows.dtype)


def cg(
    A: Operator,
    V: Tensor,
    precondition: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
    tol: float = 1e-2,
    max_iterations: int = 1000,
    bound: bool = True,
    final: bool = True,
    after: Callable[[int, Tensor, Tensor], None] = lambda *_: None,
) -> Solution:
    """Solve ``A x_q = v_q`` by one conjugate-gradient recurrence a query; the queries share batches of products only.

    Arguments, stopping and result as in :func:`block_cg`. Source: Hestenes & Stiefel 1952.
    """
    started = A.products
    X, R = _start(A, V, x0)
    watch = _Watch(A, V, tol, _damping(A, bound), after)
    iteration = 0
    P = torch.zeros_like(V)
    rho = torch.ones(V.shape[0], dtype=V.dtype, device=V.device)
    running = watch.step(X, R, 0)
    while running and iteration < max_iterations:
        rows = watch.active.nonzero().squeeze(1)
        Z = precondition(R[rows]) if precondition is not None else R[rows]
        new = (R[rows] * Z).sum(dim=1)
        beta = torch.zeros_like(new) if iteration == 0 else new / rho[rows]
        iteration += 1
        rho[rows] = new
        P[rows] = torch.addcmul(Z, beta.unsqueeze(1), P[rows])
        AP = A(P[rows])
        curvature = (P[rows] * AP).sum(dim=1)
        bad = ~(curvature > 0)
        if bool(bad.any()):
            for row, value in zip(rows[bad].tolist(), curvature[bad].tolist(), strict=True):
                watch.close(row, "failed", _INDEFINITE.format(value=value), iteration)
            good = ~bad
            rows, AP, new, curvature = rows[good], AP[good], new[good], curvature[good]
            if rows.numel() == 0:
                break
        alpha = (new / curvature).unsqueeze(1)
        X[rows] += alpha * P[rows]
        R[rows] -= alpha * AP
        running = watch.step(X, R, iteration)
    return watch.finish(X, R, iteration, started, final)
