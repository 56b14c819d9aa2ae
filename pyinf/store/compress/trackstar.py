"""TrackStar: gradients over the optimiser's root mean square, projected on both sides, under a mixed curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf.capture import Layer, LayerSelection
from pyinf.errors import ConfigError
from pyinf.store.compress.base import Compressor, Context, LayerRows, register
from pyinf.store.compress.curvature import Moments
from pyinf.store.compress.flat import gradient_blocks
from pyinf.store.compress.moments import estimated_moments, given_moments
from pyinf.store.compress.sides import TwoSided, given_sides

__all__ = ["TrackStar"]


@register
@dataclass
class TrackStar(Compressor):
    """``cos(R^{−½}φ(q), R^{−½}φ(i))`` with ``φ = vec(P_gᵀ(∇f ⊘ √V)P_a)`` of all layers, ``R`` one block a layer.

    ``R = μR_eval + (1−μ)R_train``: the second moments of the queries' rows (of all queries that are scored together, or
    that a store was built with) and of the training rows, each damped by ``damping`` times the mean eigenvalue of R.

    ``V``: the optimiser's second moments (``second_moments``), or, where none are given, the mean square of the
    training gradients, which takes one more pass. ``moments``: ``factored``: ``V_oi ≈ r_oc_i``, Adafactor's, from the
    row and column means, as in the paper: ``P`` absorbs the division by ``(√r_o + √ε)(√c_i + √ε)`` and no gradient is
    formed; ``full``: division by ``√V + ε``, one block of gradients at a time.

    Options: ``rank`` (k on both sides), ``mix`` (``μ``; 0.9 in the paper's closed set, 0: training rows alone),
    ``moments``, ``second_moments``, ``epsilon``, ``distribution``.

    Source: Chang et al. 2024, arXiv 2410.17413.
    """

    name: ClassVar[str] = "trackstar"
    defaults: ClassVar[Mapping[str, Any]] = {
        "rank": 32,
        "mix": 0.9,
        "moments": "factored",
        "second_moments": None,
        "epsilon": 1e-8,
        "distribution": "rademacher",
    }
    sides: TwoSided | None = None
    inverse_roots: dict[str, Tensor] = field(default_factory=dict)  # 1/(√V + ε), with moments="full"
    train: Moments | None = None
    queries: Moments | None = None
    _mixed: Moments | None = None

    @property
    def normalise(self) -> str:
        """Unit length on both sides."""
        return "both"

    @property
    def mixes_queries(self) -> bool:
        """Whether ``see_queries`` must be called."""
        return self.options["mix"] > 0

    def prepare(self, context: Context) -> None:
        """Take the second moments, or make a pass for them."""
        super().prepare(context)
        source = self.options["second_moments"]
        if source is not None and len(source) != 1:
            raise ConfigError(f"second_moments has {len(source)} entries; trackstar takes one")
        if source is None:
            V = dict(estimated_moments(context, per_label=False, first=False)[1])
        else:
            V = given_moments(context, source[0], "second moment")
        epsilon = self.options["epsilon"]
        scales, self.inverse_roots = {}, {}
        for name, v in V.items():
            if self.options["moments"] == "full":
                self.inverse_roots[name] = (v.sqrt() + epsilon).reciprocal()
                continue
            root = v.mean().sqrt().sqrt().clamp(min=torch.finfo(v.dtype).tiny)
            sides = (v.mean(1).sqrt() / root + epsilon**0.5, v.mean(0).sqrt() / root + epsilon**0.5)
            scales[name] = sides[0].reciprocal(), sides[1].reciprocal()
        self._open(context.selection, None, scales)

    def _open(
        self,
        selection: LayerSelection,
        given: Mapping[str, tuple[Tensor, Tensor]] | None,
        scales: Mapping[str, tuple[Tensor, Tensor]] | None,
    ) -> None:
        options = self.options
        self.sides = TwoSided(
            selection, options["rank"], self.seed, options["distribution"], self.device, self.dtype, given, scales
        )
        self.sections = self.sides.sections(selection)
        self.train, self.queries, self._mixed = Moments(self.sections), None, None

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """The same for training examples and queries."""
        assert self.sides is not None
        return LayerRows(self.sections, self._full if self.options["moments"] == "full" else self.sides.rows)

    def _full(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        assert self.sides is not None
        P_g, P_a = self.sides.matrices(layer)
        inverse = self.inverse_roots[layer.name]
        out = P_g.new_zeros(offsets.numel() - 1, P_g.shape[1], P_a.shape[1])
        for sequences, _, rows, block in gradient_blocks(layer, a, g, offsets):
            out[sequences] += P_g[rows].T @ (block * inverse[rows]) @ P_a
        return out.flatten(1)

    def see_queries(self, rows: Tensor) -> None:
        """``R_eval``."""
        self.queries, self._mixed = Moments(self.sections), None
        self.queries.fit([rows], rows.shape[0])

    def finish(self, rows: Iterable[Tensor]) -> None:
        """``R_train``."""
        assert self.train is not None
        self._mixed = None
        self.train.fit(rows, self.sequences)

    @property
    def curvature(self) -> Moments:
        """``R``.

        Raises:
            ConfigError: it mixes in queries, and none were seen.
        """
        assert self.train is not None
        if not self.mixes_queries:
            return self.train
        if self._mixed is None:
            if self.queries is None:
                raise ConfigError(
                    f"mix is {self.options['mix']}, so the curvature needs queries: give queries= when the store is "
                    "built, or mix=0"
                )
            self._mixed = self.train.mixed(self.queries, self.options["mix"])
        return self._mixed

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``R⁻¹φ / ‖R^{−½}φ‖``."""
        found = self.curvature.solve(rows, self.damping if damping is None else damping, self.damping_mode)
        norms = (found * rows).sum(1, keepdim=True).clamp_(min=0).sqrt_()
        return found / torch.where(norms > 0, norms, torch.ones_like(norms))

    def row_norms(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``‖R^{−½}φ‖``."""
        return self.curvature.norms(rows, self.damping if damping is None else damping, self.damping_mode)

    def tensors(self) -> dict[str, Tensor]:
        """Both curvatures, and the matrices with the division in them."""
        assert self.sides is not None and self.train is not None
        out = self.train.tensors()
        if self.queries is not None:
            out |= {f"queries/{name}": t for name, t in self.queries.tensors().items()}
        if self.options["moments"] == "full":
            return out | {f"inverse_root:{name}": t.cpu() for name, t in self.inverse_roots.items()}
        for name, (s_g, s_a) in self.sides.scales.items():
            out |= {f"s_g:{name}": s_g.cpu(), f"s_a:{name}": s_a.cpu()}
        return out

    @classmethod
    def restore(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection
    ) -> TrackStar:
        """The inverse of :meth:`settings` and :meth:`tensors`."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, TrackStar)
        wanted = out.sections
        names = [key.partition(":")[2] for key in tensors if key.startswith("s_g:")]
        out._open(selection, given_sides(tensors), {n: (tensors[f"s_g:{n}"], tensors[f"s_a:{n}"]) for n in names})
        if out.sections != wanted:
            raise ConfigError("the rows were made from layers of other sizes; use the model of the build")
        roots = [key.partition(":")[2] for key in tensors if key.startswith("inverse_root:")]
        out.inverse_roots = {name: tensors[f"inverse_root:{name}"] for name in roots}
        assert out.train is not None
        out.train.load(tensors, out.device)
        queries = {key.removeprefix("queries/"): t for key, t in tensors.items() if key.startswith("queries/")}
        if queries:
            out.queries = Moments(out.sections)
            out.queries.load(queries, out.device)
        return out

    def to(self, device: torch.device) -> TrackStar:
        """Move its tensors."""
        super().to(device)
        assert self.sides is not None
        self.sides.to(device)
        self.inverse_roots = {name: t.to(device) for name, t in self.inverse_roots.items()}
        for moments in (self.train, self.queries):
            if moments is not None:
                moments.load(moments.tensors(), device)
        self._mixed = None
        return self
