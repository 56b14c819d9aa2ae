"""Approximate unrolled differentiation (SOURCE): what a stretch of training does to a perturbation.

One segment of training: ``K`` steps at the mean learning rate ``η`` with the mean curvature ``H``, ``x = ηK`` in all.
An example whose gradient is ``g`` moves the parameters by ``F g`` in it, up to a sign, and every later segment carries
that on by its ``S``:

    plain SGD       S = exp(−xH),              F = (I − exp(−xH)) H⁻¹
    preconditioned  S = P^{½} exp(−xĤ) P^{−½},  F = P^{½} (I − exp(−xĤ)) Ĥ⁻¹ P^{½},  Ĥ = P^{½} H P^{½}

with the optimiser's diagonal ``P = 1/(√v + ε)`` (Adam). ``H = U diag(Λ) Uᵀ`` is the segment's EK-FAC; ``Ĥ`` is put into
the same bases with eigenvalues corrected there, ``Λ̂ = E[(U_Sᵀ(P^{½}∘G)U_A)²]``, as ``P`` is diagonal in another
basis. The influence of example i on query q is ``Σ_l ⟨F_l S_{l+1}ᵀ … S_Lᵀ ∇f_q, G_i⟩``, a sum over segments. For one
segment and ``x → ∞`` it is the undamped influence ``⟨H⁻¹∇f_q, G_i⟩``.

Source: Bae et al. 2024, arXiv 2405.12186, equations 15 to 22 and appendix D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyinf.capture import Consumer, Layer
from pyinf.curvature.factors import Factors
from pyinf.curvature.gradients import transposed, turned
from pyinf.curvature.rotate import rotated_gradients
from pyinf.errors import NonFiniteError

__all__ = ["PreconditionedSquares", "Segment", "adam_roots", "response", "segment_queries", "survival"]


def survival(eigenvalues: Tensor, x: float) -> Tensor:
    """``exp(−xΛ)``: the share of a perturbation that a segment leaves."""
    return torch.exp(-x * eigenvalues)


def response(eigenvalues: Tensor, x: float) -> Tensor:
    """``(1 − exp(−xΛ))/Λ``, ``x`` where ``Λ = 0``: how far a segment moves along a gradient."""
    exponent = x * eigenvalues
    safe = torch.where(exponent > 0, exponent, torch.ones_like(exponent))
    return torch.where(exponent > 0, -torch.expm1(-safe) / safe, torch.ones_like(exponent)) * x


def adam_roots(second_moments: Mapping[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """``P^{½} = (√v + ε)^{−½}`` by layer."""
    return {name: (v.sqrt() + epsilon).rsqrt() for name, v in second_moments.items()}


class PreconditionedSquares(Consumer):
    """Consumer: ``Λ̂ += Σ_b (U_Sᵀ(P^{½}∘G_b)U_A)²``, one gradient at a time."""

    def __init__(self, factors: Factors, roots: Mapping[str, Tensor]) -> None:
        self.factors, self.roots = factors, roots
        self.Lam: dict[str, Tensor] = {}

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        factor = self.factors.layers[layer.name]
        basis = self.factors.inputs[factor.group].basis
        root = self.roots[layer.name]
        Lam = self.Lam.setdefault(layer.name, torch.zeros_like(factor.corrected))
        for G in rotated_gradients(g, a, offsets, None, None, layer.bias):
            rotated = turned(G * root, factor.basis, basis)
            Lam.addcmul_(rotated, rotated)


@dataclass
class Segment:
    """A stretch of training: factors, ``x = Σ lr · steps``, and ``P^{½}`` by layer where the optimiser has one."""

    factors: Factors
    x: float
    roots: dict[str, Tensor] | None = None

    def _map(self, vectors: Mapping[str, Tensor], function, before: int, after: int) -> dict[str, Tensor]:
        """``P^{after/2} U f(Λ) Uᵀ P^{before/2} V``."""
        out = {}
        for name, V in vectors.items():
            layer = self.factors.layers[name]
            basis = self.factors.inputs[layer.group].basis
            root = None if self.roots is None else self.roots[name]
            work = V if root is None else V * root.pow(before)
            work = turned(work, layer.basis, basis) * function(layer.corrected, self.x)
            work = turned(work, *transposed(layer.basis, basis))
            out[name] = work if root is None else work * root.pow(after)
            if not bool(torch.isfinite(out[name].sum())):
                raise NonFiniteError(f"the unrolled gradient of layer '{name}' is not finite; lower the learning rate")
        return out

    def carry_back(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``Sᵀ v``: layer → ``[Q, d_out, d_in(+1)]``."""
        return self._map(vectors, survival, before=1, after=-1)

    def respond(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``F v`` (F is symmetric): layer → ``[Q, d_out, d_in(+1)]``."""
        return self._map(vectors, response, before=1, after=1)


def segment_queries(vectors: Mapping[str, Tensor], segments: Sequence[Segment], number: int) -> dict[str, Tensor]:
    """``F_l S_{l+1}ᵀ … S_Lᵀ v``: what a query at the end of training is for the gradients of segment ``number``."""
    for later in reversed(segments[number + 1 :]):
        vectors = later.carry_back(vectors)
    return segments[number].respond(vectors)
