"""How many coordinates a projection needs, by the effective dimension of each layer, before anything is built.

A projected method scores with ``s̃ = (Pᵀq)ᵀ(PᵀFP + λ)⁻¹Pᵀg`` where the curvature says ``s = qᵀ(F + λ)⁻¹g``. With
``F`` of eigenvalues ``Λ`` the *effective dimension* is

    d_eff(λ) = tr F(F + λ)⁻¹ = Σ Λ/(Λ + λ),

and k coordinates suffice once ``k ≫ d_eff`` (arXiv 2602.10449, for ridge-regularised influence under sketching). How
much is lost at a given k is what this module works out, by random matrix theory, for independent q and g whose second
moment is F:

- an isotropic P (±1/√k, normal; a sparse transform closely) acts as a larger damping ``κ ≥ λ``, the root of
  ``λ = κ(1 − d_eff(κ)/k)``, plus noise of variance ``κ² t²/(k(1 − γ))`` with ``t = Σ Λ/(Λ + κ)²`` and
  ``γ = Σ Λ²/(Λ + κ)² / k`` (from the first- and second-order equivalents of LeJeune et al. 2022, "Asymptotics of the
  sketched pseudoinverse", arXiv 2211.03751, with the mean over q and g taken);
- so that with ``h_x = Λ/(Λ + x)`` the correlation of ``s̃`` with ``s`` over pairs is
  ``Σ h_λ h_κ / √(Σ h_λ² · (Σ h_κ² + noise))``, and the relative error
  ``√(Σ h_κ² + noise − 2Σ h_λ h_κ + Σ h_λ²)/√(Σ h_λ²)``;
- a two-sided P (LoGra: ``P_g ⊗ P_a``) of ``k_g k_a`` coordinates keeps less than a flat one of as many. Here: the same
  equations coordinate by coordinate, the fluctuations of the two sides added up as if each were small. Exact where one
  side is left whole; otherwise pessimistic (in simulations the truth lay between it and ``flat`` of ``k_g k_a``);
- coordinates of the largest ``Λ`` in the eigenbasis lose only the others: correlation ``√(Σ_kept h_λ² / Σ h_λ²)``.

Not counted: that the projected curvature is itself estimated from a finite training set (worse when ``k`` is not small
beside its size), quantisation of the rows, and heavy tails of real gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyinf.curvature import Factors, absolute_damping
from pyinf.errors import ConfigError

__all__ = [
    "KINDS",
    "Expected",
    "LayerChoice",
    "ProjectionPlan",
    "choose_k",
    "effective_dimension",
    "expected",
    "implicit_damping",
    "smallest_k",
]

KINDS = ("flat", "two_sided", "top")
_BINS = 8192
_ITERATIONS = 2000


@dataclass(frozen=True)
class Expected:
    """What a projection to ``k`` coordinates keeps: correlation with the unprojected scores over (query, example)
    pairs, root-mean-square error relative to their root mean square, and the damping ``κ`` that it acts like.
    """

    k: int
    correlation: float
    error: float
    damping: float


def effective_dimension(eigenvalues: Tensor, lam: float) -> float:
    """``Σ Λ/(Λ + λ)``."""
    Lam = eigenvalues.double()
    return float((Lam / (Lam + lam)).sum())


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues with how often each occurs: large spectra in 8192 bins of their logarithm, each with its mean."""

    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, eigenvalues: Tensor) -> _Spectrum:
        Lam = eigenvalues.detach().double().reshape(-1).cpu()
        Lam = Lam[Lam > 0]
        if Lam.numel() <= _BINS:
            return cls(Lam, torch.ones_like(Lam))
        logs = Lam.clamp(min=float(Lam.max()) * 1e-16).log()
        low, high = float(logs.min()), float(logs.max())
        place = ((logs - low) / max(high - low, 1e-12) * (_BINS - 1)).long()
        counts = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, torch.ones_like(Lam))
        sums = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, Lam)
        held = counts > 0
        return cls(sums[held] / counts[held], counts[held])

    def sum(self, f: Tensor) -> float:
        return float((f * self.counts).sum())


def implicit_damping(eigenvalues: Tensor | _Spectrum, lam: float, k: int) -> float:
    """``κ``: the root above λ of ``λ = κ(1 − (1/k) Σ Λ/(Λ + κ))``, the damping that an isotropic sketch to k acts like.

    Between λ and ``λ + tr F/k``, where the right side is convex and passes λ once: found by bisection.
    """
    spectrum = eigenvalues if isinstance(eigenvalues, _Spectrum) else _Spectrum.of(eigenvalues)
    Lam = spectrum.values
    low, high = lam, lam + spectrum.sum(Lam) / k
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle * (1 - spectrum.sum(Lam / (Lam + middle)) / k) < lam:
            low = middle
        else:
            high = middle
        if high - low <= 1e-13 * high:
            break
    return high


def _result(k: int, exact: float, cross: float, kept: float, noise: float, damping: float) -> Expected:
    projected = kept + noise
    if exact <= 0 or projected <= 0:
        return Expected(k, 0.0, 1.0, damping)
    error = math.sqrt(max(0.0, projected - 2 * cross + exact) / exact)
    return Expected(k, min(1.0, cross / math.sqrt(exact * projected)), error, damping)


def _flat(spectrum: _Spectrum, lam: float, k: int) -> Expected:
    Lam = spectrum.values
    kappa = implicit_damping(spectrum, lam, k)
    exact, seen = Lam / (Lam + lam), Lam / (Lam + kappa)
    gamma = spectrum.sum(seen.square()) / k
    t = spectrum.sum(Lam / (Lam + kappa).square())
    noise = kappa * kappa * t * t / (k * max(1e-12, 1 - gamma))
    sums = [spectrum.sum(x) for x in (exact.square(), exact * seen, seen.square())]
    return _result(k, *sums, noise, kappa)


def _top(spectrum: _Spectrum, lam: float, k: int) -> Expected:
    order = spectrum.values.argsort(descending=True)
    Lam, counts = spectrum.values[order], spectrum.counts[order]
    before = counts.cumsum(0) - counts
    taken = (k - before).clamp(min=0).minimum(counts)
    exact = (Lam / (Lam + lam)).square()
    kept = float((exact * taken).sum())
    return _result(k, spectrum.sum((spectrum.values / (spectrum.values + lam)).square()), kept, kept, 0.0, lam)


def _two_sided(Lam: Tensor, lam: float, k_g: int, k_a: int) -> Expected:
    """A side no wider than its k is left whole and adds nothing."""
    Lam = Lam.detach().double().cpu()
    over_g = 0.0 if k_g >= Lam.shape[0] else 1 / k_g
    over_a = 0.0 if k_a >= Lam.shape[1] else 1 / k_a
    kappa = torch.full_like(Lam, lam)

    def spread(x: Tensor) -> Tensor:  # what the three parts of P Pᵀ − 1 add to one coordinate
        return over_g * x.sum(0, keepdim=True) + over_a * x.sum(1, keepdim=True) + over_g * over_a * x.sum()

    for _ in range(_ITERATIONS):  # rises to the smallest solution, since κ Λ/(Λ + κ) grows with κ
        new = lam + kappa * spread(Lam / (Lam + kappa))
        done = bool(((new - kappa) <= 1e-9 * new).all())
        kappa = new
        if done:
            break
    exact, seen = Lam / (Lam + lam), Lam / (Lam + kappa)
    w, squares = kappa * Lam / (Lam + kappa).square(), seen.square()
    noise = over_g * over_a * float(w.sum()) ** 2
    noise += over_g * float((w.sum(0).square() / (1 - over_g * squares.sum(0)).clamp(min=1e-12)).sum())
    noise += over_a * float((w.sum(1).square() / (1 - over_a * squares.sum(1)).clamp(min=1e-12)).sum())
    total = float((exact * exact).sum())
    mean = float((kappa * squares).sum() / squares.sum().clamp(min=1e-300))
    return _result(
        min(k_g, Lam.shape[0]) * min(k_a, Lam.shape[1]),
        total,
        float((exact * seen).sum()),
        float(squares.sum()),
        noise,
        mean,
    )


def _need_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"unknown kind of projection '{kind}'; choose one of: {', '.join(KINDS)}")


def expected(eigenvalues: Tensor, lam: float, k: int | tuple[int, int], kind: str = "flat") -> Expected:
    """What is kept of scores under the curvature with these eigenvalues and damping λ.

    Args:
        eigenvalues: ``Λ``, any shape; ``[d_out, d_in(+1)]`` for ``two_sided``.
        lam: λ, absolute.
        k: coordinates; for ``two_sided`` ``(k_g, k_a)`` or the k of both sides.
        kind: ``flat`` (TRAK; a sparse transform), ``two_sided`` (LoGra), ``top`` (leading eigenvectors).

    Raises:
        ConfigError: unknown kind, or a k below 1.
    """
    _need_kind(kind)
    sides = k if isinstance(k, tuple) else (k, k)
    if min(sides) < 1 or not lam > 0:
        raise ConfigError(f"k must be at least 1 and λ positive; got k={k}, λ={lam}")
    if kind == "two_sided":
        return _two_sided(eigenvalues, lam, *sides)
    return (_flat if kind == "flat" else _top)(_Spectrum.of(eigenvalues), lam, sides[0])


def _smallest(at: Callable[[int], Expected], target: float, largest: int) -> Expected | None:
    if at(largest).correlation < target:
        return None
    low, high = 0, 1
    while high < largest and at(high).correlation < target:
        low, high = high, min(2 * high, largest)
    while high - low > max(1, low // 64):  # to 1.6 %
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).correlation < target else (low, middle)
    return at(high)


def smallest_k(eigenvalues: Tensor, lam: float, target: float, kind: str = "flat") -> Expected | None:
    """The smallest k (to 1.6 %) whose expected correlation is at least ``target``; None where no k below the whole has.

    For ``two_sided`` both sides have the same k, and :attr:`Expected.k` is the product of the two.
    """
    _need_kind(kind)
    if not 0 < target < 1:
        raise ConfigError(f"target is {target}; it must be a correlation between 0 and 1")
    if kind == "two_sided":
        return _smallest(lambda k: _two_sided(eigenvalues, lam, k, k), target, max(eigenvalues.shape))
    spectrum, f = _Spectrum.of(eigenvalues), _flat if kind == "flat" else _top
    return _smallest(lambda k: f(spectrum, lam, k), target, eigenvalues.numel())


@dataclass(frozen=True)
class LayerChoice:
    """A layer (``name`` "": all of them together, with one λ): parameters, effective dimension, and for each target the
    smallest k with what is expected of it (None: only the whole layer reaches it).
    """

    name: str
    parameters: int
    damping: float
    effective: float
    choices: dict[float, Expected | None]


@dataclass
class ProjectionPlan:
    """What :func:`choose_k` suggests: layer by layer, and jointly (not for ``two_sided``, which has no joint form)."""

    kind: str
    layers: list[LayerChoice] = field(default_factory=list)
    joint: LayerChoice | None = None

    def row_values(self, target: float) -> int:
        """Values of a row with every layer's own k for ``target``; layers that reach it only whole count whole."""
        return sum(c.parameters if c.choices[target] is None else c.choices[target].k for c in self.layers)  # type: ignore[union-attr]

    def table(self) -> list[list[str]]:
        """A header and a line a layer, for the terminal."""
        targets = list(self.layers[0].choices) if self.layers else []
        head = ["layer", "parameters", "d_eff", *(f"k for {t:g} (error)" for t in targets)]
        lines = [head]
        for choice in [*self.layers, *([self.joint] if self.joint else [])]:
            cells = []
            for found in choice.choices.values():
                cells.append("whole" if found is None else f"{found.k:,} ({100 * found.error:.0f} %)")
            lines.append([choice.name or "all, jointly", f"{choice.parameters:,}", f"{choice.effective:,.0f}", *cells])
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""

        def plain(choice: LayerChoice) -> dict[str, Any]:
            found = {f"{t:g}": None if e is None else vars(e) for t, e in choice.choices.items()}
            return {**vars(choice), "choices": found}

        joint = None if self.joint is None else plain(self.joint)
        return {"kind": self.kind, "layers": [plain(c) for c in self.layers], "joint": joint}


def choose_k(
    factors: Factors,
    damping: float = 0.1,
    damping_mode: str = "relative",
    targets: tuple[float, ...] = (0.9, 0.95, 0.99),
    kind: str = "flat",
) -> ProjectionPlan:
    """Suggest k for every layer and for all together, with the error to expect, from fitted factors.

    Args:
        factors: with their eigenvalues ``Λ`` (corrected ones describe the gradients best: EK-FAC).
        damping, damping_mode: as everywhere; the joint λ is relative to the mean of all layers' eigenvalues.
        targets: correlations with the unprojected scores of the same curvature.
        kind: see :func:`expected`.

    Raises:
        ConfigError: an unknown kind, or a target outside (0, 1).
    """
    _need_kind(kind)
    plan = ProjectionPlan(kind)
    for name, layer in factors.layers.items():
        lam = absolute_damping(layer.corrected, damping, damping_mode, name)
        plan.layers.append(_choice(name, layer.corrected, lam, targets, kind))
    if kind != "two_sided":
        everything = torch.cat([layer.corrected.reshape(-1).cpu() for layer in factors.layers.values()])
        lam = absolute_damping(everything, damping, damping_mode, "all layers")
        plan.joint = _choice("", everything, lam, targets, kind)
    return plan


def _choice(name: str, Lam: Tensor, lam: float, targets: tuple[float, ...], kind: str) -> LayerChoice:
    choices = {target: smallest_k(Lam, lam, target, kind) for target in targets}
    return LayerChoice(name, Lam.numel(), lam, effective_dimension(Lam, lam), choices)
