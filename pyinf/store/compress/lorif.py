"""LoRIF: factor rows of projected gradients, and a low-rank curvature found from them by streaming.

Source: "LoRIF", arXiv 2601.21929 (v2, 2026).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf.capture import Layer, LayerSelection
from pyinf.curvature import check_damping
from pyinf.curvature.rotate import input_rows, working
from pyinf.errors import NonFiniteError
from pyinf.ops.philox import random_matrix
from pyinf.ops.reference import STREAM_A, STREAM_G
from pyinf.store.compress.base import Compressor, Context, LayerRows, layer_seed, register
from pyinf.store.compress.factored import factor_start, iterations_of, rebuilt, token_factors
from pyinf.store.sections import Section, layout, query_offsets, query_width

__all__ = ["LoRIF", "LowRankCurvature"]

_OVERSAMPLING = 10
_POWER_ITERATIONS = 3


@dataclass
class LowRankCurvature:
    """``K = V diag(s²) Vᵀ + λI`` of one section: V ``[D, r]`` orthonormal, ``squares`` s² ``[r]``.

    ``leading`` is the mean of the ``r + 10`` largest eigenvalues that were found, ``mean`` that of all D of them.
    """

    V: Tensor
    squares: Tensor
    leading: float
    mean: float

    def damping(self, damping: float, mode: str, unit: str) -> float:
        """λ: ``damping`` times ``leading`` or ``mean`` as ``unit`` says, or ``damping`` itself.

        Raises:
            NonFiniteError: that mean is zero.
        """
        check_damping(damping, mode)
        if mode == "absolute":
            return float(damping)
        found = damping * (self.leading if unit == "leading" else self.mean)
        if not 0 < found < float("inf"):
            raise NonFiniteError("the rows of a layer vanish or overflow; leave the layer out (modules=)")
        return found

    def solve(self, Q: Tensor, lam: float) -> Tensor:
        """``(V diag(s²) Vᵀ + λ)⁻¹ q`` for rows ``[Q, D]`` (Woodbury): ``(q − V diag(s²/(s² + λ)) Vᵀq)/λ``."""
        V, squares = self.V.to(Q), self.squares.to(Q)
        return (Q - ((Q @ V) * (squares / (squares + lam))) @ V.T) / lam


def streamed_curvature(
    rows: Iterable[Tensor], sections: Sequence[Section], rank: int, sequences: int, seed: int, budget: int
) -> dict[str, LowRankCurvature]:
    """The leading eigenpairs of ``mean_i r_i r_iᵀ`` of every section, ``r_i = vec(Σ_c u_c v_cᵀ)``.

    Randomised subspace iteration (Halko, Martinsson, Tropp 2011) with an oversampling of 10 and 3 power iterations: a
    Gaussian ``Q [D, r + 10]``; five walks over the rows, each ``Q ← orth(Σ_i r_i (r_iᵀQ))`` but the last, which forms
    ``Σ_i (Qᵀr_i)(Qᵀr_i)ᵀ``, whose eigenvectors turn Q. Held: ``2D(r + 10)`` values a section, of as many sections at a
    time as fit ``budget`` bytes; ``4D(r + 10)`` operations a row and walk. Never all rows.

    Raises:
        NonFiniteError: a row is not finite; names the section.
    """
    out: dict[str, LowRankCurvature] = {}
    groups: list[list[Section]] = [[]]
    used = 0
    for section in sections:
        size = 16 * section.query_width * min(rank + _OVERSAMPLING, section.query_width)
        if groups[-1] and used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(section)
        used += size
    for group in groups:
        out |= _walks(rows, group, rank, sequences, seed)
    return out


def _walks(
    rows: Iterable[Tensor], group: Sequence[Section], rank: int, sequences: int, seed: int
) -> dict[str, LowRankCurvature]:
    bases: dict[str, Tensor] = {}
    for section in group:
        width = min(rank + _OVERSAMPLING, section.query_width)
        start = factor_start(section.query_width, width, layer_seed(seed, section.name, "curvature"))
        bases[section.name] = torch.linalg.qr(start).Q
    totals = dict.fromkeys(bases, 0.0)
    for walk in range(_POWER_ITERATIONS + 1):
        sums = {name: torch.zeros_like(Q) for name, Q in bases.items()}
        for section, R in _rebuilt_blocks(rows, group):
            Q = bases[section.name] = bases[section.name].to(R)
            sums[section.name] = sums[section.name].to(R).addmm_(R.T, R @ Q)
            if walk == 0:
                totals[section.name] += float(R.square().sum(dtype=torch.float64))
        for name, total in sums.items():
            if not bool(torch.isfinite(total.sum())):
                raise NonFiniteError(f"the rows of layer '{name}' are not finite; run the model in a wider dtype")
            bases[name] = torch.linalg.qr(total / max(1, sequences)).Q
    small = {name: torch.zeros(Q.shape[1], Q.shape[1], dtype=torch.float64) for name, Q in bases.items()}
    for section, R in _rebuilt_blocks(rows, group):
        part = (R @ bases[section.name]).double()
        small[section.name] += (part.T @ part).cpu()
    out = {}
    for section in group:
        Q = bases[section.name]
        values, vectors = torch.linalg.eigh(small[section.name] / max(1, sequences))
        values, vectors = values.clamp_(min=0).flip(0), vectors.flip(1)
        kept = min(rank, values.numel())
        mean = totals[section.name] / max(1, sequences) / section.query_width
        V = (Q.double() @ vectors[:, :kept].to(Q.device)).to(Q.dtype)
        out[section.name] = LowRankCurvature(V, values[:kept].to(Q), float(values.mean()), mean)
    return out


def _rebuilt_blocks(rows: Iterable[Tensor], group: Sequence[Section]) -> Iterable[tuple[Section, Tensor]]:
    """``(section, [b, D])`` of every block of rows, a few rows at a time so that the dense ones stay small."""
    for block in rows:
        for section in group:
            step = max(1, (1 << 24) // section.query_width)
            part = block[:, section.offset : section.stop]
            for first in range(0, part.shape[0], step):
                yield section, rebuilt(part[first : first + step], section).flatten(1)


@register
@dataclass
class LoRIF(Compressor):
    """Row: ``Σ_c u_c v_cᵀ ≈ P_gᵀ G P_a`` of every layer. Score: ``Σ_c u_cᵀ [(V diag(s²) Vᵀ + λ)⁻¹ Ĝ_q] v_c``, where
    ``Ĝ_q`` is what the query's own factors stand for.

    Options: ``shrink`` (f: ``k_g = ⌈d_out/f⌉``, ``k_a = ⌈d_in/f⌉``; 1: no projection), ``rank`` (c outer products of
    each row, by 8 power iterations for c = 1 and 16 otherwise), ``curvature_rank`` (r of every layer), ``damping_unit``
    (``leading``: λ is the damping times the mean of the r + 10 largest eigenvalues, as in the paper; ``mean``: times
    that of all, pyinf's usual one). The sides of the projection are ±1/√k from Philox. The curvature is the mean over
    training rows, where the paper has the sum: all scores are N times the paper's.

    Source: arXiv 2601.21929.
    """

    name: ClassVar[str] = "lorif"
    defaults: ClassVar[Mapping[str, Any]] = {
        "shrink": 4,
        "rank": 1,
        "curvature_rank": 512,
        "damping_unit": "leading",
    }
    linear: ClassVar[bool] = False
    curvature: dict[str, LowRankCurvature] = field(default_factory=dict)
    budget: int = 1 << 30
    _sides: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def prepare(self, context: Context) -> None:
        """Nothing but the layout."""
        super().prepare(context)
        self.budget = context.memory_budget
        self._open(context.selection)

    def _widths(self, layer: Layer) -> tuple[int, int]:
        f = self.options["shrink"]
        return -(-layer.d_out // f), -(-layer.columns // f)

    def _open(self, selection: LayerSelection) -> None:
        parts = []
        for layer in selection.layers:
            k_g, k_a = self._widths(layer)
            parts.append((layer.name, "factors", (min(self.options["rank"], k_g, k_a), k_g, k_a)))
        self.sections = layout(parts)

    def sides(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """``P_g [d_out, k_g]`` and ``P_a [d_in(+1), k_a]``, elements ±1/√k."""
        if layer.name not in self._sides:
            seed = layer_seed(self.seed, layer.name)
            found = []
            for size, k, stream in zip(
                (layer.d_out, layer.columns), self._widths(layer), (STREAM_G, STREAM_A), strict=True
            ):
                P = random_matrix((0, size), (0, k), seed, stream, "rademacher", self.device, self.dtype)
                found.append(P.div_(k**0.5))
            self._sides[layer.name] = found[0], found[1]
        return self._sides[layer.name]

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """The same for training examples and queries."""
        return LayerRows(self.sections, self._layer_rows)

    def _layer_rows(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        left, right = working(g), input_rows(a, layer.bias)
        if self.options["shrink"] > 1:
            P_g, P_a = self.sides(layer)
            left, right = left @ P_g, right @ P_a
        c = min(self.options["rank"], left.shape[1], right.shape[1])
        start = factor_start(right.shape[1], c, layer_seed(self.seed, layer.name, "power"))
        u, v = token_factors(left, right, offsets, start, iterations_of(c))
        return torch.cat([u.flatten(1), v.flatten(1)], 1)

    def finish(self, rows: Iterable[Tensor]) -> None:
        """The low-rank curvature: five walks over the rows."""
        rank = self.options["curvature_rank"]
        self.curvature = streamed_curvature(rows, self.sections, rank, self.sequences, self.seed, self.budget)

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``(V diag(s²) Vᵀ + λ)⁻¹ vec(Σ_c u_c v_cᵀ)`` of every layer: ``[Q, Σ k_g·k_a]``."""
        out = rows.new_zeros(rows.shape[0], query_width(self.sections))
        for section, at in zip(self.sections, query_offsets(self.sections), strict=False):
            K = self.curvature[section.name]
            given = self.damping if damping is None else damping
            lam = K.damping(given, self.damping_mode, self.options["damping_unit"])
            Q = rebuilt(rows[:, section.offset : section.stop], section).flatten(1)
            out[:, at : at + section.query_width] = K.solve(Q, lam)
        return out

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        means = {name: [K.leading, K.mean] for name, K in self.curvature.items()}
        return {**super().settings(), "means": means}

    def tensors(self) -> dict[str, Tensor]:
        """V and s² of every layer."""
        out = {f"V:{name}": K.V.cpu().contiguous() for name, K in self.curvature.items()}
        return out | {f"squares:{name}": K.squares.cpu().contiguous() for name, K in self.curvature.items()}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection) -> LoRIF:
        """The inverse of :meth:`settings` and :meth:`tensors`."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, LoRIF)
        out._open(selection)
        for name, (leading, mean) in settings["means"].items():
            V, squares = tensors[f"V:{name}"].to(out.device), tensors[f"squares:{name}"].to(out.device)
            out.curvature[name] = LowRankCurvature(V, squares, float(leading), float(mean))
        return out

    def to(self, device: torch.device) -> LoRIF:
        """Move its tensors."""
        for K in self.curvature.values():
            K.V, K.squares = K.V.to(device), K.squares.to(device)
        self._sides = {name: (P_g.to(device), P_a.to(device)) for name, (P_g, P_a) in self._sides.items()}
        super().to(device)
        return self
