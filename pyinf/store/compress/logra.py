"""LoGra: a low-rank projection on both sides of every layer's gradient, and the curvature of what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf.capture import LayerSelection
from pyinf.curvature import Factors
from pyinf.errors import ConfigError
from pyinf.store.compress.base import Compressor, Context, LayerRows, register
from pyinf.store.compress.curvature import Identity, Kronecker, Moments, RowCurvature
from pyinf.store.compress.sides import TwoSided, given_sides, kronecker_parts

__all__ = ["LoGra", "top_eigenvectors"]


def top_eigenvectors(factors: Factors, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """``{layer: (U_S[:, top k], U_A[:, top k])}``: the eigenvectors of K-FAC's factors with the largest eigenvalues.

    Raises:
        ConfigError: the factors have no bases.
    """
    out = {}
    for name, layer in factors.layers.items():
        inputs = factors.inputs[layer.group]
        sides = []
        for basis, values in ((layer.basis, layer.eigenvalues), (inputs.basis, inputs.eigenvalues)):
            if basis is None or values is None:
                raise ConfigError(f"the factors of layer '{name}' have no eigenvectors; fit kfac or ekfac ones")
            sides.append(basis[:, values.argsort(descending=True)[:rank]].contiguous())
        out[name] = sides[0], sides[1]
    return out


@register
@dataclass
class LoGra(Compressor):
    """Row ``r = vec(P_gᵀ G P_a)`` of every layer; score ``vec(P_gᵀ V P_a)ᵀ (K + λ)⁻¹ r``, summed over layers.

    Options: ``rank`` (k on both sides), ``init`` (``random``: Philox; ``factors``: the leading eigenvectors of K-FAC's
    factors), ``curvature`` (``raw``: ``K`` = second moment of the rows, ``[k², k²]``; ``kfac``: the Kronecker product
    of the covariances of projected tokens, which takes one more pass; ``ekfac``: its eigenvectors with eigenvalues
    corrected on the rows; ``none``: the identity), ``normalise`` (``none``; ``relatif``: divided by ``√(rᵀ(K + λ)⁻¹r)``
    of the training row, the square root of its self-influence; ``cosine``: by the query's as well), ``distribution``.

    Sources: Choe et al. 2024, arXiv 2405.13954; ℓ-RelatIF: Barshan et al. 2020, arXiv 2003.11630.
    """

    name: ClassVar[str] = "logra"
    defaults: ClassVar[Mapping[str, Any]] = {
        "rank": 32,
        "init": "random",
        "curvature": "raw",
        "normalise": "none",
        "distribution": "rademacher",
    }
    sides: TwoSided | None = None
    curvature: RowCurvature | None = None

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> str | None:
        """K-FAC factors where the projection is made of their eigenvectors."""
        return "kfac" if options["init"] == "factors" else None

    @property
    def normalise(self) -> str:
        """See :class:`Compressor`."""
        return {"none": "none", "relatif": "train", "cosine": "both"}[self.options["normalise"]]

    @property
    def damped(self) -> bool:
        """Whether there is a curvature to damp."""
        return self.options["curvature"] != "none"

    def prepare(self, context: Context) -> None:
        """Draw or take the sides; one more pass for the Kronecker curvatures."""
        super().prepare(context)
        given = None
        if self.options["init"] == "factors":
            if context.factors is None:
                raise ConfigError("init='factors' needs fitted factors; call fit(train) first")
            given = top_eigenvectors(context.factors, self.options["rank"])
        self._open(context.selection, given)
        assert self.sides is not None
        if self.options["curvature"] in ("kfac", "ekfac"):
            bases, Lam = kronecker_parts(context, self.sides, context.selection.names)
            self.curvature = Kronecker(self.sections, bases, Lam if self.options["curvature"] == "kfac" else None)

    def _open(self, selection: LayerSelection, given: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        options = self.options
        self.sides = TwoSided(
            selection, options["rank"], self.seed, options["distribution"], self.device, self.dtype, given
        )
        self.sections = self.sides.sections(selection)
        self.curvature = Identity(self.sections) if options["curvature"] == "none" else Moments(self.sections)

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """The same for training examples and queries."""
        assert self.sides is not None
        return LayerRows(self.sections, self.sides.rows)

    def finish(self, rows: Iterable[Tensor]) -> None:
        """The curvature of the rows."""
        assert self.curvature is not None
        self.curvature.fit(rows, self.sequences)

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``(K + λ)⁻¹q``; divided by ``√(qᵀ(K + λ)⁻¹q)`` for a cosine."""
        assert self.curvature is not None
        found = self.curvature.solve(rows, self.damping if damping is None else damping, self.damping_mode)
        if self.normalise != "both":
            return found
        norms = (found * rows).sum(1, keepdim=True).clamp_(min=0).sqrt_()
        return found / torch.where(norms > 0, norms, torch.ones_like(norms))

    def row_norms(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``√(rᵀ(K + λ)⁻¹r)``."""
        assert self.curvature is not None
        return self.curvature.norms(rows, self.damping if damping is None else damping, self.damping_mode)

    def tensors(self) -> dict[str, Tensor]:
        """Curvature, and the sides where they were not drawn."""
        assert self.sides is not None and self.curvature is not None
        return self.curvature.tensors() | self.sides.tensors()

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection) -> LoGra:
        """The inverse of :meth:`settings` and :meth:`tensors`."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, LoGra)
        out._reopen(selection, given_sides(tensors))
        if out.options["curvature"] in ("kfac", "ekfac"):
            out.curvature = Kronecker(out.sections, {}, {} if out.options["curvature"] == "kfac" else None)
        assert out.curvature is not None
        out.curvature.load(tensors, out.device)
        return out

    def _reopen(self, selection: LayerSelection, given: Mapping[str, tuple[Tensor, Tensor]] | None) -> None:
        wanted = self.sections
        self._open(selection, given)
        if self.sections != wanted:
            raise ConfigError("the rows were made from layers of other sizes; use the model of the build")

    def to(self, device: torch.device) -> LoGra:
        """Move its tensors."""
        super().to(device)
        assert self.sides is not None and self.curvature is not None
        self.sides.to(device)
        self.curvature.load(self.curvature.tensors(), device)
        return self
