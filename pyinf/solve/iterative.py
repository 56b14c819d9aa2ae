"""Stationary iterations: Neumann, LiSSA and ASTRA are one recursion with and without sampling and preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyinf.solve.operators import Damped, Operator, Outcome, Solution, error_bound, relative_residuals

__all__ = ["Schedule", "lissa_settings", "power_iteration", "richardson", "trace"]


def power_iteration(
    operator: Callable[[Tensor], Tensor], size: int, like: Tensor, iterations: int = 20, seed: int = 0
) -> float:
    """Estimate, from below, of the largest eigenvalue of a positive semi-definite operator ``[1, D] → [1, D]``."""
    x = _normal(1, size, like, seed)
    value = 0.0
    for _ in range(iterations):
        x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
        x = operator(x)
        new = float(x.norm())
        if not math.isfinite(new) or new == 0:
            return new
        if abs(new - value) <= 1e-3 * new:
            return new
        value = new
    return value


def trace(operator: Operator, like: Tensor, probes: int = 4, seed: int = 0) -> float:
    """Hutchinson's unbiased estimate of the trace, from ``probes`` products with random signs."""
    z = _normal(probes, operator.size, like, seed).sign()
    return float((z * operator(z)).sum(dim=1).mean())


def _normal(rows: int, size: int, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 0x51)
    return torch.randn(rows, size, generator=generator).to(device=like.device, dtype=like.dtype)


@dataclass(frozen=True)
class Schedule:
    """Step sizes: ``step · decay^(t // every)``, momentum, and whether the last half of the iterates is averaged."""

    step: float
    momentum: float = 0.0
    decay: float = 1.0
    every: int = 50
    average: bool = False

    def at(self, t: int) -> float:
        """The step size of iteration ``t``."""
        return self.step * self.decay ** (t // max(1, self.every))


@dataclass(frozen=True)
class LissaSettings:
    """What LiSSA was set to, and from which estimates."""

    largest: float
    trace: float
    scale: float
    batch: int
    depth: int


def lissa_settings(
    curvature: Operator, damping: Tensor, sequences: int, tol: float, most: int, seed: int = 0
) -> LissaSettings:
    """Scale, batch and depth of LiSSA from a power iteration and a trace estimate.

    ``scale = 1.1 (λ_max + λ)`` keeps every factor ``I − A/scale`` a contraction; ``batch ≥ tr(C)/λ_max`` sequences
    keep the sampled recursion stable in mean square, as then ``E[C_B²]/scale ⪯ C`` up to a constant; ``depth`` reaches
    tol in the direction of least curvature, at most ``most``.

    Source: Klochkov & Liu 2024, arXiv 2409.17357.
    """
    largest = power_iteration(curvature, curvature.size, damping.unsqueeze(0), seed=seed)
    total = trace(curvature, damping.unsqueeze(0), seed=seed)
    scale = 1.1 * (largest + float(damping.max()))
    batch = max(1, min(sequences, math.ceil(2 * total / max(largest, 1e-300))))
    rate = min(1.0, float(damping.min()) / scale)
    return LissaSettings(largest, total, scale, batch, min(most, math.ceil(math.log(1 / tol) / rate)))


def richardson(
    curvature: Operator | Callable[[int], Operator],
    V: Tensor,
    damping: Tensor,
    schedule: Schedule,
    iterations: int,
    tol: float = 1e-2,
    precondition: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
    system: Operator | None = None,
) -> Solution:
    """``m ← β m + P(v − (C_t + λ)x)``, ``x ← x + a_t m``: LiSSA, Neumann and ASTRA.

    With ``P = I``, ``β = 0`` and ``a = 1/scale`` this is LiSSA's ``r ← v + r − (C_t + λ)r/scale``, ``x = r/scale``, the
    damping on the side of the curvature; on one fixed operator it is the Neumann series. With the Kronecker factors for
    ``P``, momentum and a decaying step it is ASTRA.

    Args:
        curvature: C, or ``t ↦ C_t`` where every iteration samples anew; then nothing but the end is measured.
        damping: λ ``[D]``, above 0.
        system: what the true residual is measured with at the end (default: ``curvature``, where it is fixed).

    Returns:
        A :class:`Solution`; a query whose iterate leaves ``‖x‖ ≤ ‖v‖/λ``, which every solution obeys, by a factor of 4
        (of 40 when sampled) or is not finite has diverged and is ``failed``.

    Sources: Agarwal et al. 2017 (arXiv 1602.03943), Koh & Liang 2017 (arXiv 1703.04730), Wang et al. 2025 (ASTRA,
    arXiv 2507.14740).
    """
    fixed = isinstance(curvature, Operator)
    system = system if system is not None else (curvature if fixed else None)
    X = torch.zeros_like(V) if x0 is None else x0.clone()
    M = torch.zeros_like(V) if schedule.momentum else None
    norms = V.norm(dim=1)
    limit = (4.0 if fixed else 40.0) * norms / float(damping.min()) + X.norm(dim=1)
    outcomes = [Outcome("solved", "the gradient is zero") for _ in range(V.shape[0])]
    counts = [0] * V.shape[0]
    active = (norms > 0).nonzero().squeeze(1)
    mean, averaged = None, 0
    before = system.products if system is not None else 0
    sampled = 0
    for t in range(iterations):
        if active.numel() == 0:
            break
        C = curvature if fixed else curvature(t)
        x = X[active]
        sampled += 0 if fixed else x.shape[0]
        R = V[active] - C(x) - x * damping  # type: ignore[operator]
        if fixed:  # the true residual of x comes for nothing
            value = torch.maximum(relative_residuals(R, V[active]), error_bound(x, R, V[active], damping))
            for row in active[value <= tol].tolist():
                outcomes[row], counts[row] = Outcome("solved"), t
            keep = value > tol
            active, R = active[keep], R[keep]
            if active.numel() == 0:
                break
        step = R if precondition is None else precondition(R)
        if M is not None:
            M[active] = step = schedule.momentum * M[active] + step
        X[active] += schedule.at(t) * step
        for row in active.tolist():
            counts[row] = t + 1
        if schedule.average and t >= iterations // 2:
            mean, averaged = (X.clone() if mean is None else mean.add_(X)), averaged + 1
        size = X[active].norm(dim=1)
        gone = ~(size <= limit[active])
        for row in active[gone].tolist():
            outcomes[row] = Outcome("failed", _DIVERGED.format(count=t + 1))
            X[row] = float("nan")
        active = active[~gone]
    if mean is not None and not fixed:
        X[active] = mean[active] / averaged
    return _measured(X, V, damping, system, outcomes, counts, active, tol, before, sampled)


_DIVERGED = (
    "diverged after {count} iterations: the step exceeds what the largest eigenvalue allows; lower it (raise scale) or "
    "raise the damping"
)


def _measured(
    X: Tensor,
    V: Tensor,
    damping: Tensor,
    system: Operator | None,
    outcomes: list[Outcome],
    counts: list[int],
    active: Tensor,
    tol: float,
    before: int,
    sampled: int,
) -> Solution:
    """True residuals and bounds of every query that did not fail."""
    for row in active.tolist():
        outcomes[row] = Outcome("approximate", "the residual was not measured")
    if system is None:
        return Solution(X, outcomes, counts, None, None, sampled)
    alive = torch.tensor([i for i, o in enumerate(outcomes) if not o.failed], dtype=torch.int64, device=X.device)
    nan = X.new_full((X.shape[0],), float("nan"))
    residuals, bounds = nan, nan.clone()
    if alive.numel():
        R = V[alive] - Damped(system, damping)(X[alive])
        residuals[alive] = relative_residuals(R, V[alive])
        bounds[alive] = error_bound(X[alive], R, V[alive], damping)
    for row in active.tolist():
        worst = max(float(residuals[row]), float(bounds[row]))
        if worst <= tol:
            outcomes[row] = Outcome("solved")
        else:
            outcomes[row] = Outcome(
                "approximate",
                f"stopped after {counts[row]} iterations at a relative residual of {float(residuals[row]):.2g}; raise "
                "max_iterations or the damping",
            )
    return Solution(X, outcomes, counts, residuals.tolist(), bounds.tolist(), system.products - before + sampled)
