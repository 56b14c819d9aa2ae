"""LESS: cosines of projected Adam directions of training examples with projected gradients of queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf.capture import Layer, LayerSelection
from pyinf.store.compress.base import Compressor, Context, LayerRows, register
from pyinf.store.compress.flat import FlatProjection
from pyinf.store.compress.moments import estimated_moments, given_moments, per_checkpoint
from pyinf.store.sections import layout

__all__ = ["Less"]


class _UnitRows(LayerRows):
    """Rows of length one in the columns of their checkpoint."""

    def finish_batch(self) -> None:
        """Divide by the length, all layers together."""
        if self.rows is not None:
            columns = self.columns[self.suffix]
            norms = self.rows[:, columns].norm(dim=1, keepdim=True)
            self.rows[:, columns] /= torch.where(norms > 0, norms, torch.ones_like(norms))


@register
@dataclass
class Less(Compressor):
    """``Σ_c η_c cos(P∇f_q, PΓ_c(i))`` over checkpoints c; ``P`` a flat projection of all layers, the same for all.

    ``Γ = (β₁m + (1−β₁)g) / √(β₂v + (1−β₂)g² + ε)`` is the direction of Adam's next step on the example alone, ``g`` its
    gradient, ``m, v`` the optimiser's moments at the checkpoint (``first_moments``, ``second_moments``; without bias
    correction or with it in both, as cosines do not see the factor). Where they are not given, ``m`` is the mean and
    ``v`` the mean square of the training gradients at the checkpoint, which takes one more pass each; an optimiser's
    own ``v`` holds squares of batch means and is smaller. ``loss_unit`` says in what unit they are: ``token``: ``g`` is
    divided by the example's labels (a mean loss, as in training); ``sequence``: the sum that other methods use.

    Options: ``rank`` (k), ``projection``, ``checkpoints``, ``learning_rates`` (``η_c``, 1 where not given),
    ``first_moments``, ``second_moments``, ``beta1``, ``beta2``, ``epsilon``, ``loss_unit``.

    Source: Xia et al. 2024, arXiv 2402.04333.
    """

    name: ClassVar[str] = "less"
    linear: ClassVar[bool] = False
    one_sided: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "rank": 8192,
        "projection": "rademacher",
        "checkpoints": None,
        "learning_rates": None,
        "first_moments": None,
        "second_moments": None,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "loss_unit": "token",
    }
    first: list[Mapping[str, Tensor]] = field(default_factory=list)
    second: list[Mapping[str, Tensor]] = field(default_factory=list)
    _finished: bool = False

    @property
    def layered(self) -> bool:
        """All layers in one projection."""
        return False

    @property
    def damped(self) -> bool:
        """No curvature, no damping."""
        return False

    def prepare(self, context: Context) -> None:
        """Take the moments, or make a pass a checkpoint for them."""
        super().prepare(context)
        count = len(self.checkpoints)
        self._rates()
        firsts = per_checkpoint("first_moments", self.options["first_moments"], count)
        seconds = per_checkpoint("second_moments", self.options["second_moments"], count)
        self.first, self.second = [], []
        for c, (m, v) in enumerate(zip(firsts, seconds, strict=True)):
            found: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = {}, {}
            if m is None or v is None:
                per_label = self.options["loss_unit"] == "token"
                found = estimated_moments(context, per_label, first=m is None, checkpoint=c)
            self.first.append(found[0] if m is None else given_moments(context, m, "first moment"))
            self.second.append(found[1] if v is None else given_moments(context, v, "second moment"))
        self.sections = layout([(self._suffix(c), "vector", (self.options["rank"],)) for c in range(count)])

    def _suffix(self, checkpoint: int) -> str:
        return f"@{checkpoint}" if len(self.checkpoints) > 1 else ""

    def _rates(self) -> list[float]:
        return per_checkpoint("learning_rates", self.options["learning_rates"], len(self.checkpoints), 1.0)

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """Adam directions of training examples, plain gradients of queries; both of length one."""
        flat = FlatProjection(self.options["rank"], self.seed, self.options["projection"], elementwise=True)
        if loss != "train":
            return _UnitRows(self.sections, flat, self._suffix(checkpoint))
        rows = _UnitRows(self.sections, flat, self._suffix(checkpoint))
        first, second = self.first[checkpoint], self.second[checkpoint]
        rows.project = lambda layer, a, g, offsets: flat(
            layer, a, g, offsets, lambda *parts: self._direction(rows.labels, first, second, *parts)
        )
        return rows

    def _direction(
        self,
        labels: Sequence[int],
        first: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        layer: Layer,
        sequences: slice,
        rows: slice,
        G: Tensor,
    ) -> Tensor:
        if self.options["loss_unit"] == "token":
            G = G / G.new_tensor([max(1, n) for n in labels[sequences]]).view(-1, 1, 1)
        m, v = first[layer.name][rows].to(G), second[layer.name][rows].to(G)
        b1, b2 = self.options["beta1"], self.options["beta2"]
        return (b1 * m + (1 - b1) * G) / (b2 * v + (1 - b2) * G.square() + self.options["epsilon"]).sqrt()

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``η_c`` times the unit rows."""
        out = rows.clone()
        for section, rate in zip(self.sections, self._rates(), strict=True):
            out[:, section.offset : section.stop] *= rate
        return out

    def finish(self, rows: Iterable[Tensor]) -> None:
        """Nothing is learnt from the rows; the moments are not kept beyond them."""
        self._finished = True

    def tensors(self) -> dict[str, Tensor]:
        """The moments, as long as rows are to be made; queries need none."""
        if self._finished:
            return {}
        out = {f"m{c}:{name}": t.cpu() for c, found in enumerate(self.first) for name, t in found.items()}
        return out | {f"v{c}:{name}": t.cpu() for c, found in enumerate(self.second) for name, t in found.items()}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection) -> Less:
        """The inverse of :meth:`settings` and :meth:`tensors`; after ``finish`` for queries only."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, Less)
        for key, found in (("m", out.first), ("v", out.second)):
            for c in range(len(out.checkpoints) if tensors else 0):
                start = f"{key}{c}:"
                found.append({name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)})
        out._finished = not tensors
        return out

    def to(self, device: torch.device) -> Less:
        """Move its tensors."""
        super().to(device)
        for found in (self.first, self.second):
            found[:] = [{name: t.to(device) for name, t in part.items()} for part in found]
        return self
