"""Rows that are factors: every layer's gradient, projected or whole, as a few outer products ``Σ_c u_c v_cᵀ``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf.capture import Layer, LayerSelection
from pyinf.curvature import Factors
from pyinf.curvature.rotate import input_rows, rotated_gradients, working
from pyinf.errors import ConfigError
from pyinf.store.compress.base import Compressor, Context, LayerRows, layer_seed, register
from pyinf.store.sections import Section, layout, query_offsets, query_width

__all__ = ["FactorRows", "factor_start", "power_factors", "rebuilt"]


def factor_start(n: int, c: int, seed: int) -> Tensor:
    """``[n, c]`` standard normal, float64, drawn on the CPU: where every gradient's power iteration begins."""
    generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)
    return torch.randn(n, c, generator=generator, dtype=torch.float64)


def iterations_of(c: int) -> int:
    """Power iterations: 8 for one outer product, 16 for more (LoRIF, arXiv 2601.21929)."""
    return 8 if c == 1 else 16


def power_factors(G: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """``G_b ≈ Σ_c u_c v_cᵀ`` by block power iteration: u ``[B, c, m]`` orthonormal, v ``[B, c, n]`` ``= uᵀG``.

    ``V ← start``; then so many times ``U ← orth(G V)``, ``V ← GᵀU``. The result ``U Vᵀ = U UᵀG`` is the projection of G
    on the columns of U, which tend to its leading left singular vectors. G ``[B, m, n]``, start ``[n, c]``.
    Cost: ``4·m·n·c`` operations an iteration and gradient.
    """
    V = start.to(G).expand(G.shape[0], -1, -1)
    U = V
    for _ in range(iterations):
        U = torch.linalg.qr(G @ V).Q
        V = G.transpose(1, 2) @ U
    return U.transpose(1, 2), V.transpose(1, 2)


def token_factors(g: Tensor, a: Tensor, offsets: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """:func:`power_factors` of ``G_b = Σ_t g_t a_tᵀ`` without forming it where that costs less.

    g ``[N, m]``, a ``[N, n]``: a sequence of T tokens takes ``4·T·c(m + n)`` operations an iteration this way.
    """
    start = start.to(g)
    c = start.shape[1]
    us, vs = [], []
    for first, stop in pairwise(offsets.tolist()):
        left, right = g[first:stop], a[first:stop]
        tokens, m, n = stop - first, g.shape[1], a.shape[1]
        if iterations * c * m * n + tokens * m * n / 2 < iterations * c * tokens * (m + n):
            U, V = power_factors((left.T @ right).unsqueeze(0), start, iterations)
            us.append(U[0])
            vs.append(V[0])
            continue
        V = U = start
        for _ in range(iterations):
            U = torch.linalg.qr(left.T @ (right @ V)).Q
            V = right.T @ (left @ U)
        us.append(U.T)
        vs.append(V.T)
    if not us:
        return g.new_zeros(0, c, g.shape[1]), g.new_zeros(0, c, a.shape[1])
    return torch.stack(us), torch.stack(vs)


def rebuilt(rows: Tensor, section: Section) -> Tensor:
    """``Σ_c u_c v_cᵀ`` ``[B, m, n]`` from a factor section's columns ``[B, c(m + n)]``."""
    c, m, n = section.shape
    u, v = rows[:, : c * m].reshape(-1, c, m), rows[:, c * m :].reshape(-1, c, n)
    return torch.bmm(u.transpose(1, 2), v)


@register
@dataclass
class FactorRows(Compressor):
    """Row: ``Σ_c u_c v_cᵀ ≈ G`` of every layer, unprojected, by power iteration. Score: ``Σ_c u_cᵀ Q v_c``.

    Options: ``rank`` (c), ``curvature`` (``none``: ``Q`` is the query's gradient; ``ekfac`` or ``kfac``: ``H⁻¹`` of it,
    with fitted factors, which a store does not keep). Queries are whole gradients, not factors: ``[Q, Σ m·n]`` values.
    The share of a training gradient's energy in its row is ``‖v‖²/‖G‖²``, since ``v = Gᵀu`` with orthonormal u.
    """

    name: ClassVar[str] = "factors"
    defaults: ClassVar[Mapping[str, Any]] = {"rank": 1, "curvature": "none"}
    linear: ClassVar[bool] = False
    one_sided: ClassVar[bool] = True
    factors: Factors | None = None

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> str | None:
        """The factors of the inverse."""
        return None if options["curvature"] == "none" else options["curvature"]

    @property
    def damped(self) -> bool:
        """Whether there is a curvature to damp."""
        return self.options["curvature"] != "none"

    def prepare(self, context: Context) -> None:
        """Nothing but the layout.

        Raises:
            ConfigError: a curvature, but no factors.
        """
        super().prepare(context)
        self.factors = context.factors if self.damped else None
        self._need_factors()
        self._open(context.selection)

    def _need_factors(self) -> None:
        if self.damped and self.factors is None:
            raise ConfigError(
                f"curvature='{self.options['curvature']}' needs the factors that belong to it; call fit(train) or "
                "load_factors(directory) first"
            )

    def adopt(self, factors: Factors) -> None:
        """Use these factors where there is a curvature."""
        if self.damped:
            self.factors = factors

    def _open(self, selection: LayerSelection) -> None:
        parts = []
        for layer in selection.layers:
            c = min(self.options["rank"], layer.d_out, layer.columns)
            parts.append((layer.name, "factors", (c, layer.d_out, layer.columns)))
        self.sections = layout(parts)

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """Factors of training gradients; whole gradients of queries."""
        if loss == "measurement":
            return LayerRows(layout([(s.name, "vector", s.shape[1:]) for s in self.sections]), _whole)
        return LayerRows(self.sections, self._layer_rows)

    def _layer_rows(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        c = min(self.options["rank"], layer.d_out, layer.columns)
        start = factor_start(layer.columns, c, layer_seed(self.seed, layer.name, "power"))
        u, v = token_factors(working(g), input_rows(a, layer.bias), offsets, start, iterations_of(c))
        return torch.cat([u.flatten(1), v.flatten(1)], 1)

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``H⁻¹G_q`` of every layer, ``[Q, Σ m·n]`` from whole gradients of that width.

        Raises:
            ConfigError: a curvature, but no factors.
        """
        self._need_factors()
        width = query_width(self.sections)
        if rows.shape[1] != width:  # no query measures anything: zeros, of the training rows' width
            return rows.new_zeros(rows.shape[0], width)
        if self.factors is None:
            return rows
        lam, out = self.damping if damping is None else damping, torch.empty_like(rows)
        for section, at in zip(self.sections, query_offsets(self.sections), strict=False):
            columns = slice(at, at + section.query_width)
            Q = rows[:, columns].reshape(-1, *section.shape[1:])
            solved = self.factors.ihvp({section.name: Q}, lam, self.damping_mode)[section.name]
            out[:, columns] = solved.flatten(1)
        return out


def _whole(layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    gradients = [G.flatten().clone() for G in rotated_gradients(g, a, offsets, None, None, layer.bias)]
    return torch.stack(gradients) if gradients else g.new_zeros(0, layer.numel)
