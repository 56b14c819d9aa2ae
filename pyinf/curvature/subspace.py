"""EK-FAC and a Newton step in a subspace: dense curvature, across layers, in the span of sampled gradients.

Notation. In the layers' eigenbases, stacked over all layers, EK-FAC's curvature is the diagonal ``Λ`` and the damping
the diagonal ``λ`` (one value a layer). ``C = E[G Gᵀ]`` is the second moment of per-sequence gradients, all of it: also
off the diagonal and across layers. ``G_U`` holds ``n`` gradients as columns, ``G_M`` ``m`` others.

1. Complement. EK-FAC is kept where the subspace does not reach, at the share ``ρ`` (one value a layer) of the
   gradients' energy that is not in it: ``B = ρΛ + λ``, whitening ``W = B^{-½}``.
2. Subspace. ``K = G_UᵀB⁻¹G_U = V diag(s) Vᵀ``; the ``k`` leading directions ``U = W G_U α``, ``α = V_k s_k^{-½}``,
   are orthonormal and never formed.
3. Moments there. ``c_i = Uᵀ W G_i = αᵀG_UᵀB⁻¹G_i`` for the columns of ``G_M``; ``Σ = mean_i c_i c_iᵀ`` is shrunk
   towards what EK-FAC expects there, ``T = UᵀWΛWU``, by ``γ``; ``M = (1−γ)Σ + γT + UᵀWλWU``.
4. Inverse. ``W (I + U (M⁻¹ − I) Uᵀ) W``, that is

       H⁻¹v = B⁻¹(v + G_U Z G_UᵀB⁻¹v),    Z = α (M⁻¹ − I) αᵀ.

Per query it costs two thin products with the ``n`` gradients. All of Z comes from Gram matrices of size n × n and
n × m: the inner products are EK-FAC's own scores of sampled gradients on each other.

``ρ_l = Σ_i‖(W G_i − U c_i)_l‖² / Σ_i‖(W G_i)_l‖²`` over ``G_M``, with the ``U`` of ``ρ = 1``, at most 1. Without a
subspace ``ρ = 1`` and the inverse is EK-FAC's. With ``G_U = G_M`` the whole training set, data labels and ``γ = 0``,
``ρ = 0`` and ``B = λ``: the inverse is that of the exact damped empirical Fisher ``C + λ`` (Woodbury).

Where products with the curvature can be had (the Gauss–Newton matrix), ``Σ = UᵀWCWU`` is taken from ``k`` of them, once
for all queries, instead of from sampled gradients: nothing is estimated then, and ``γ = 0``.

``γ`` is the shrinkage of Ledoit and Wolf 2004 with EK-FAC's expectation in place of the identity: the variance of ``Σ``
over its squared distance from ``T``. Where the moments come from gradients outside the span (``G_M ≠ G_U``, the
default), ``Σ`` is unbiased for the given ``U``; inside it is not, which is why that is for the exact limit only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyinf.curvature.factors import Factors
from pyinf.curvature.gradients import GradientSet, LayerGradients, transposed, turned
from pyinf.errors import ConfigError, NonFiniteError

__all__ = ["SubspaceInverse", "fit_subspace", "shrinkage"]

_ROUNDING = 1e-10  # a share of energy below this is what float64 sums leave of zero


@dataclass
class _Grams:
    """Inner products of the gradients of one layer (or a sum over layers), in float64.

    ``UU = G_UᵀB⁻¹G_U``, ``UM = G_UᵀB⁻¹G_M``, ``M = diag(G_MᵀB⁻¹G_M)``, ``damped = G_UᵀB⁻¹λB⁻¹G_U``, ``expected =
    G_UᵀB⁻¹ΛB⁻¹G_U``.
    """

    UU: Tensor
    UM: Tensor
    M: Tensor
    damped: Tensor
    expected: Tensor

    def __iadd__(self, other: _Grams) -> _Grams:
        for name in ("UU", "UM", "M", "damped", "expected"):
            getattr(self, name).add_(getattr(other, name))
        return self


def _grams(
    span: LayerGradients, moments: LayerGradients | None, Lam: Tensor, share: float, lam: float, parts: bool
) -> _Grams:
    """One layer; ``moments`` None: the gradients of the span themselves. Without ``parts`` the last two stay zero."""
    n, m = len(span), len(span) if moments is None else len(moments)
    wide = dict(dtype=torch.float64, device=Lam.device)
    out = _Grams(*(torch.zeros(size, **wide) for size in ((n, n), (n, m), (m,), (n, n), (n, n))))
    for rows in span.blocks(3 * n + m):
        B = Lam[rows] * share + lam
        X = span.rows(rows).reshape(n, -1)
        inverse = B.reciprocal().reshape(-1)
        Y = X * inverse
        product = (Y @ X.T).double()
        out.UU += product
        if moments is None:
            out.UM += product
            out.M += product.diagonal()
        else:
            other = moments.rows(rows).reshape(m, -1)
            out.UM += Y @ other.T
            out.M += (other.square() * inverse).sum(1)
        if parts:
            Y *= inverse
            out.damped += lam * (Y @ X.T).double()
            Y *= Lam[rows].reshape(-1)
            out.expected += Y @ X.T
    return out


def _orthonormal(K: Tensor, rank: int | None) -> Tensor:
    """``α [n, k]`` with ``αᵀKα = I``: the leading eigenvectors over the roots of their eigenvalues."""
    s, V = torch.linalg.eigh(0.5 * (K + K.T))
    s, V = s.flip(0), V.flip(1)
    kept = int((s > s[0].clamp(min=0) * K.shape[0] * 1e-12).sum()) if s.numel() and float(s[0]) > 0 else 0
    kept = kept if rank is None else min(rank, kept)
    return V[:, :kept] / s[:kept].sqrt()


def shrinkage(c: Tensor, sigma: Tensor, target: Tensor) -> float:
    """``γ = min(1, Σ_i‖c_i c_iᵀ − Σ‖² / (m²‖Σ − T‖²))`` for ``Σ = mean_i c_i c_iᵀ``; ``c [k, m]``, Frobenius norms.

    Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", with the
    target ``T`` in place of a multiple of the identity.
    """
    m = c.shape[1]
    distance = float((sigma - target).square().sum())
    variance = float(c.square().sum(0).square().sum()) - m * float(sigma.square().sum())
    return 1.0 if distance <= 0 else min(1.0, max(0.0, variance / (m * m)) / distance)


@dataclass
class SubspaceInverse:
    """``H⁻¹v = B⁻¹(v + G_U Z G_UᵀB⁻¹v)``; see the module's description. Positive definite by construction.

    Attributes:
        shares: ``ρ`` of every layer, in [0, 1].
        Z: ``[n, n]``, float64.
        facts: ``rank`` k, ``gradients`` n, ``moments`` m, ``shrinkage`` γ, ``captured`` (1 − ρ over all layers),
            smallest and largest eigenvalue of M (1 where EK-FAC is right and ρ = 1).
    """

    factors: Factors
    dampings: dict[str, float]
    shares: dict[str, float]
    span: GradientSet
    Z: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def weights(self, name: str) -> Tensor:
        """``B = ρΛ + λ`` of a layer, ``[d_out, d_in(+1)]``."""
        return self.factors.layers[name].corrected * self.shares[name] + self.dampings[name]

    def apply_rotated(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``H⁻¹v`` in the eigenbases: layer → ``[Q, d_out, d_in(+1)]``; the inputs are left as they are.

        The subspace couples the layers, so that all of them must be given; a missing one counts as zero.
        """
        out = {name: V / self.weights(name) for name, V in vectors.items()}
        coefficients: Tensor | None = None
        for name, gradients in self.span.walk():
            Y = out.get(name)
            if Y is None:
                continue
            for rows in gradients.blocks(Y.shape[0]):
                X = gradients.rows(rows).reshape(len(gradients), -1)
                part = (X @ Y[:, rows].reshape(Y.shape[0], -1).to(X.dtype).T).double()
                coefficients = part if coefficients is None else coefficients.add_(part)
        if coefficients is None or not bool(self.Z.any()):
            return out
        added = (self.Z @ coefficients).T.contiguous()
        for name, gradients in self.span.walk():
            Y = out.get(name)
            if Y is None:
                continue
            inverse = self.weights(name).reciprocal_()
            for rows in gradients.blocks(Y.shape[0]):
                X = gradients.rows(rows)
                step = (added.to(X.dtype) @ X.reshape(X.shape[0], -1)).view(-1, *X.shape[1:])
                Y[:, rows].addcmul_(step.to(Y.dtype), inverse[rows].to(Y.dtype))
        return out

    def ihvp(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``H⁻¹v`` in the parameters' own coordinates: layer → ``[Q, d_out, d_in(+1)]`` or ``[d_out, d_in(+1)]``.

        Raises:
            ConfigError: unknown layer, or a wrong shape.
        """
        rotated = {}
        for name, V in vectors.items():
            if name not in self.factors.layers or V.shape[-2:] != self.factors.layers[name].corrected.shape:
                raise ConfigError(f"'{name}' is no fitted layer of shape {tuple(V.shape[-2:])}; leave it out")
            layer = self.factors.layers[name]
            work = V.to(layer.corrected.dtype).reshape(-1, *layer.corrected.shape)
            rotated[name] = turned(work, layer.basis, self.factors.inputs[layer.group].basis)
        solved = self.apply_rotated(rotated)
        out = {}
        for name, V in vectors.items():
            layer = self.factors.layers[name]
            back = turned(solved[name], *transposed(layer.basis, self.factors.inputs[layer.group].basis))
            out[name] = back.reshape(V.shape).to(V.dtype)
        return out

    def self_scores(self, gradients: GradientSet) -> Tensor:
        """``⟨H⁻¹G_i, G_i⟩ = ⟨B⁻¹G_i, G_i⟩ + kᵢᵀZkᵢ`` with ``kᵢ = G_UᵀB⁻¹G_i``: float64 ``[m]``."""
        own: Tensor | None = None
        crossed: Tensor | None = None
        others = dict(gradients.walk())
        for name, span in self.span.walk():
            other, weights = others.pop(name, None), self.weights(name)
            if other is None:
                continue
            for rows in span.blocks(2 * len(other)):
                G = other.rows(rows).reshape(len(other), -1)
                Y = G / weights[rows].reshape(-1)
                diagonal, block = (Y * G).sum(1).double(), (span.rows(rows).reshape(len(span), -1) @ Y.T).double()
                own = diagonal if own is None else own.add_(diagonal)
                crossed = block if crossed is None else crossed.add_(block)
        assert own is not None and crossed is not None and not others, "the span must reach every layer"
        return own + (crossed * (self.Z @ crossed)).sum(0)


def fit_subspace(
    factors: Factors,
    dampings: dict[str, float],
    span: GradientSet,
    moments: GradientSet | None,
    rank: int | None = None,
    gamma: float | None = None,
    complement: float | None = None,
    product: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> SubspaceInverse:
    """EK-FAC's inverse with a Newton step in the span of sampled gradients; see the module's description.

    Args:
        factors: fitted factors with corrected eigenvalues.
        dampings: ``λ`` of every layer.
        span: the ``n`` gradients ``G_U``.
        moments: the ``m`` gradients ``G_M``; None: ``G_U`` themselves.
        rank: ``k``, the leading directions kept; None: all that the gradients span.
        gamma: the shrinkage ``γ`` in [0, 1]; None: estimated.
        complement: ``ρ`` for every layer; None: estimated.
        product: ``C V`` in the parameters' own coordinates, layer → ``[k, d_out, d_in(+1)]``; None: sampled gradients.

    Raises:
        ConfigError: a rank below 1, or γ or ρ outside [0, 1].
        NonFiniteError: a gradient's inner products are not finite.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"subspace_rank is {rank}; it must be at least 1")
    for label, value in (("subspace_shrinkage", gamma), ("subspace_complement", complement)):
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{label} is {value}; it must lie in [0, 1]")
    shares = dict.fromkeys(factors.layers, 1.0 if complement is None else float(complement))
    captured = None
    if complement is None:
        by_layer = _all_grams(factors, dampings, shares, span, moments, parts=False)
        total = _sum(by_layer)
        alpha = _orthonormal(total.UU, rank)
        coefficients = alpha @ (alpha.T @ total.UM)  # U c_i = W G_U (this)
        missed = 0.0
        for name, gram in by_layer.items():
            energy = float(gram.M.sum())
            inside = float((coefficients * gram.UM).sum())
            own = float((coefficients * (gram.UU @ coefficients)).sum())
            rest = min(energy, max(0.0, energy - 2 * inside + own))
            share = rest / energy if energy > 0 else 1.0
            shares[name] = share if share > _ROUNDING else 0.0
            missed += rest
        captured = 1 - missed / max(float(total.M.sum()), torch.finfo(torch.float64).tiny)
    total = _sum(_all_grams(factors, dampings, shares, span, moments, parts=True))
    alpha = _orthonormal(total.UU, rank)
    c = alpha.T @ total.UM
    sigma = c @ c.T / c.shape[1] if product is None else _projected(factors, dampings, shares, span, alpha, product)
    target = alpha.T @ total.expected @ alpha
    found = 0.0 if product is not None else shrinkage(c, sigma, target)
    found = found if gamma is None else float(gamma)
    M = (1 - found) * sigma + found * target + alpha.T @ total.damped @ alpha
    values, vectors = torch.linalg.eigh(0.5 * (M + M.T))
    if not bool(torch.isfinite(values).all()) or (values.numel() and float(values[0]) <= 0):
        raise NonFiniteError("the curvature in the subspace is not positive definite; raise the damping or use float64")
    left = alpha @ vectors
    facts = {
        "rank": alpha.shape[1],
        "gradients": alpha.shape[0],
        "moments": c.shape[1] if product is None else "products",
        "shrinkage": round(found, 6),
        "eigenvalues": [round(float(v), 6) for v in values[[0, -1]]] if values.numel() else [],
    }
    if captured is not None:
        facts["captured"] = round(captured, 6)
    return SubspaceInverse(factors, dampings, shares, span, (left * (values.reciprocal() - 1)) @ left.T, facts)


def _projected(
    factors: Factors,
    dampings: dict[str, float],
    shares: dict[str, float],
    span: GradientSet,
    alpha: Tensor,
    product: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
) -> Tensor:
    """``UᵀWCWU`` ``[k, k]`` from ``k`` products, ``WU = B⁻¹G_U α`` being formed densely for them."""
    vectors = {}
    for name, layer in factors.layers.items():
        vectors[name] = layer.corrected.new_zeros(alpha.shape[1], *layer.corrected.shape)
    for name, gradients in span.walk():
        layer = factors.layers[name]
        for rows in gradients.blocks(alpha.shape[1]):
            X = gradients.rows(rows)
            mixed = (alpha.T.to(X.dtype) @ X.reshape(len(gradients), -1)).view(-1, *X.shape[1:])
            vectors[name][:, rows] = mixed / (layer.corrected[rows] * shares[name] + dampings[name])
        vectors[name] = turned(vectors[name], *transposed(layer.basis, factors.inputs[layer.group].basis))
    found = product(vectors)
    sigma = alpha.new_zeros(alpha.shape[1], alpha.shape[1])
    for name, V in vectors.items():
        sigma += V.flatten(1) @ found[name].flatten(1).T
    return 0.5 * (sigma + sigma.T)


def _all_grams(
    factors: Factors,
    dampings: dict[str, float],
    shares: dict[str, float],
    span: GradientSet,
    moments: GradientSet | None,
    parts: bool,
) -> dict[str, _Grams]:
    out = {}
    others = iter(()) if moments is None else moments.walk()
    for name, gradients in span.walk():
        other = None
        if moments is not None:
            found, other = next(others)
            assert found == name, "both sets must reach the same layers"
        gram = _grams(gradients, other, factors.layers[name].corrected, shares[name], dampings[name], parts)
        if not bool(torch.isfinite(gram.UU.sum() + gram.UM.sum())):
            raise NonFiniteError(f"sampled gradients of layer '{name}' are not finite; run the model in a wider dtype")
        out[name] = gram
    return out


def _sum(by_layer: dict[str, _Grams]) -> _Grams:
    first, *rest = by_layer.values()
    total = _Grams(*(getattr(first, n).clone() for n in ("UU", "UM", "M", "damped", "expected")))
    for gram in rest:
        total += gram
    return total
