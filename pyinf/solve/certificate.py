"""How well ``(C + λ)x = v`` was solved, measured with the exact curvature on training data, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer
from pyinf.curvature.rotate import input_rows, working
from pyinf.data.batching import PreparedExamples
from pyinf.solve.ggn import GGNOperator
from pyinf.solve.operators import Solution, error_bound, relative_residuals

__all__ = ["VERDICTS", "Convergence", "HeldBatch", "Measured", "hold", "measure", "verdict"]

VERDICTS = ("solved", "approximate", "not to be trusted", "not measured")


@dataclass(frozen=True)
class HeldBatch:
    """The training data that a certificate is measured on, in groups that are multiplied one at a time."""

    groups: list[list[int]]
    tokens: int
    whole: bool
    total: int

    @property
    def sequences(self) -> int:
        """How many."""
        return sum(len(g) for g in self.groups)

    def __str__(self) -> str:
        if self.whole:
            return f"all {self.total} training sequences ({self.tokens:,} tokens)"
        return f"{self.sequences} of {self.total} training sequences, drawn at random ({self.tokens:,} tokens)"


def hold(data: PreparedExamples, sequences: int, tokens: int, seed: int, without: Sequence[int] = ()) -> HeldBatch:
    """Draw up to ``sequences`` sequences and about ``tokens`` tokens: all of the data where it is no more than that.

    At least two groups of one sequence each, as far as the data go: what the estimate needs to be unbiased.
    """
    counted, left_out = data.counted, set(without)
    usable = [i for i in range(len(data)) if counted[i] > 0 and i not in left_out]
    everything = sum(counted[i] for i in usable)
    if not left_out and len(usable) <= sequences and everything <= tokens:
        return HeldBatch([[i] for i in usable] if len(usable) < 4 else _split(usable, 4), everything, True, len(data))
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed + 0xCE)).tolist()
    chosen: list[int] = []
    taken = 0
    for at in order:
        index = usable[at]
        if len(chosen) >= 2 and (len(chosen) >= sequences or taken + counted[index] > tokens):
            break
        chosen.append(index)
        taken += counted[index]
    return HeldBatch(_split(chosen, 4), taken, False, len(data))


def _split(indices: list[int], parts: int) -> list[list[int]]:
    parts = min(parts, len(indices))
    return [indices[k::parts] for k in range(parts)]


class Convergence(Consumer):
    """Consumer: norm of the mean gradient of the training loss, and the root mean square norm of single gradients."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, float] = {}
        self.sequences = 0

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        rows, grads = input_rows(a, layer.bias), working(g)
        total = grads.T @ rows
        self.sums[layer.name] = total if layer.name not in self.sums else self.sums[layer.name].add_(total)
        squares = float(ops.gradient_norm(grads, rows, offsets).double().square().sum())
        self.squares[layer.name] = self.squares.get(layer.name, 0.0) + squares

    def dampings(self, damping: float, mode: str, shapes: dict[str, tuple[int, int]]) -> dict[str, float]:
        """λ of every layer from these gradients: ``damping · mean_i ‖G_i‖²/(d_out d_in)``, or ``damping`` itself."""
        if mode == "absolute":
            return dict.fromkeys(shapes, damping)
        count = max(1, self.sequences)
        return {n: damping * self.squares.get(n, 0.0) / (count * o * i) for n, (o, i) in shapes.items()}

    @property
    def norm(self) -> float:
        """``‖(1/n) Σ_i G_i‖``."""
        return math.sqrt(sum(float(t.double().square().sum()) for t in self.sums.values())) / max(1, self.sequences)

    @property
    def example_norm(self) -> float:
        """``√(mean_i ‖G_i‖²)``."""
        return math.sqrt(sum(self.squares.values()) / max(1, self.sequences))


@dataclass
class Measured:
    """Residuals of some solutions, one entry a query.

    ``residual`` is ``‖(C + λ)x − v‖/‖v‖``, ``rescaled`` the least of it over multiples of ``x`` (the ranks of scores do
    not depend on one), ``bound`` as in :func:`~pyinf.solve.operators.error_bound`, None where C is only sampled.
    """

    residual: list[float]
    rescaled: list[float]
    bound: list[float] | None


def measure(C: GGNOperator, held: HeldBatch, X: Tensor, V: Tensor, damping: Tensor) -> Measured:
    """Residuals of ``(C + λ)x = v`` under the exact curvature of ``held``.

    On a sample C varies from batch to batch and so the plain residual of even the exact solution is far from 0. The
    squared norm is therefore estimated without bias, from products of different groups only:
    ``‖Cx‖² ≈ (‖Σ_g C_g x‖² − Σ_g ‖C_g x‖²)/(k(k − 1))``. On all of the data nothing is estimated.
    """
    total, squares = torch.zeros_like(X), torch.zeros(X.shape[0], dtype=torch.float64, device=X.device)
    for group in held.groups:
        weight = 1.0 / len(group) if not held.whole else 1.0 / held.total
        part = C.on([group], 1)(X).mul_(weight)
        total += part
        squares += part.double().square().sum(dim=1)
    rest = X * damping
    if held.whole:
        AX = total.add_(rest)
        R = V - AX
        bound = error_bound(X, R, V, damping).tolist()
        return Measured(relative_residuals(R, V).tolist(), _rescaled(_dot(AX, V), _dot(AX, AX), V), bound)
    k = len(held.groups)
    mean = total / k
    norm = (_dot(total, total) - squares) / max(1, k * (k - 1))
    cross = rest - V
    residual = norm + 2 * _dot(mean, cross) + _dot(cross, cross)
    scale = _dot(V, V).clamp(min=torch.finfo(torch.float64).tiny)
    found = (residual / scale).clamp(min=0).sqrt()
    whole = (norm + 2 * _dot(mean, rest) + _dot(rest, rest)).clamp(min=torch.finfo(torch.float64).tiny)
    return Measured(found.tolist(), _rescaled(_dot(mean + rest, V), whole, V), None)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y.double()).sum(dim=1)


def _rescaled(along: Tensor, norm: Tensor, V: Tensor) -> list[float]:
    tiny = torch.finfo(torch.float64).tiny
    cosine = along.square() / (norm.clamp(min=tiny) * _dot(V, V).clamp(min=tiny))
    cosine = torch.where(along > 0, cosine.clamp(0, 1), torch.zeros_like(cosine))
    return (1 - cosine).sqrt().tolist()


def verdict(
    residual: float, bound: float | None, tol: float, exact: bool, rescaled: float | None = None, reason: str = ""
) -> tuple[str, str]:
    """``(verdict, reason)``.

    *Solved* needs the relative residual and the error bound at most ``tol`` under the very operator that was solved.
    *Not to be trusted*: not finite, or no multiple of x has a residual below 0.9 (x = 0 has 1). Else *approximate*.
    """
    if not math.isfinite(residual):
        return "not to be trusted", reason or "the residual is not finite; raise the damping or use a wider dtype"
    if exact and bound is not None and max(residual, bound) <= tol:
        return "solved", f"relative residual {residual:.2g} and error bound {bound:.2g}, both at most {tol:g}"
    best = residual if rescaled is None else rescaled
    if best >= 0.9:
        text = f"relative residual {residual:.2g}, {best:.2g} at the best scale; a vector of zeros has 1"
        return "not to be trusted", f"{text}; {reason}" if reason else text
    text = f"relative residual {residual:.2g}, above {tol:g}"
    if residual <= tol:
        held = "the error is bounded by no more than" if bound is not None else "measured on a sample of the data:"
        text = f"relative residual {residual:.2g}, but {held} {'' if bound is None else format(bound, '.2g')}".rstrip()
    return "approximate", reason or text


def entries(
    measured: Measured | Solution,
    where: str,
    tol: float,
    facts: dict[str, Any],
    rows: range,
) -> list[dict[str, Any]]:
    """Certificates as plain data, one a query of ``rows``."""
    out = []
    for row in rows:
        if isinstance(measured, Solution):
            assert measured.residuals is not None
            residual, rescaled = measured.residuals[row], None
            bound = None if measured.bounds is None else measured.bounds[row]
            word, why = verdict(residual, bound, tol, True, None, measured.outcomes[row].reason)
            if measured.outcomes[row].status == "solved" and word != "solved" and bound is None:
                word, why = "solved", f"relative residual {residual:.2g}, at most {tol:g}"
        else:
            residual, rescaled = measured.residual[row], measured.rescaled[row]
            bound = None if measured.bound is None else measured.bound[row]
            word, why = verdict(residual, bound, tol, bound is not None, rescaled)
        entry = {"verdict": word, "reason": why, "relative_residual": _plain(residual), "error_bound": _plain(bound)}
        if rescaled is not None:
            entry["residual_at_best_scale"] = _plain(rescaled)
        out.append({**entry, "tol": tol, "measured_on": where, **facts})
    return out


def _plain(value: float | None) -> float | None:
    """For JSON: not finite becomes None."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
