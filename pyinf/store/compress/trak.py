"""TRAK: a flat random projection of the gradient, the inverse of the features' Gram matrix, a mean over checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyinf.capture import LayerSelection
from pyinf.store.compress.base import Compressor, Context, LayerRows, layer_seed, register
from pyinf.store.compress.curvature import Moments
from pyinf.store.compress.flat import FlatProjection
from pyinf.store.sections import Section, layout
from pyinf.tasks import IGNORE, Batch, Task

__all__ = ["MarginTask", "Trak"]

_WEIGHT = "@weight"


class MarginTask(Task):
    """Another task's training loss replaced by minus TRAK's model output, ``−Σ_t log(p_t / (1 − p_t))``.

    ``p_t`` is the probability of the label at t. ``missing`` holds ``mean_t (1 − p_t)`` of the examples of the last
    batch. Measurements stay the other task's. Source: Park et al. 2023, section 3.3 (Q = diag(1 − p)).
    """

    def __init__(self, task: Task) -> None:
        self.task, self.seed, self.name = task, task.seed, f"margin of {task.name}"
        self.fields, self.shifted = task.fields, task.shifted
        self.missing: dict[int, float] = {}

    @property
    def measures_labels(self) -> bool:
        """As the other task."""
        return self.task.measures_labels

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """As the other task."""
        return self.task.predictions(model, batch)

    def train_loss(self, model: nn.Module, batch: Batch, sample: bool = False) -> Tensor:
        """``−Σ_t log(p_t / (1 − p_t))``, through ``log p − log(1 − p) = z_y − log Σ_{j≠y} exp z_j``."""
        logits, targets = self.task.predictions(model, batch)
        logits, targets = logits.reshape(targets.shape[0], -1, logits.shape[-1]), targets.reshape(targets.shape[0], -1)
        counted = targets != IGNORE
        z = logits[counted]
        z = z if z.dtype == torch.float64 else z.float()
        label = targets[counted].unsqueeze(1)
        others = z.scatter(1, label, float("-inf")).logsumexp(1)
        margins = z.gather(1, label).squeeze(1) - others
        away = torch.sigmoid(-margins.detach()).double()
        sequence = torch.arange(targets.shape[0], device=z.device).unsqueeze(1).expand_as(targets)[counted]
        total = torch.zeros(targets.shape[0], dtype=torch.float64, device=z.device).index_add_(0, sequence, away)
        means = total / counted.sum(1).clamp(min=1)
        self.missing = dict(zip(batch["index"].tolist(), means.tolist(), strict=True))
        return -margins.sum()

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """As the other task."""
        return self.task.measurement(model, batch)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the task in manifests."""
        return {"task": "MarginTask", "of": self.task.fingerprint()}


class _Rows(LayerRows):
    """Rows with the weight ``1 − p`` of each training example in a column of its own, a mean over checkpoints."""

    margin: MarginTask | None = None
    share = 1.0
    indices: Sequence[int] = ()

    def start_batch(self, indices: Sequence[int], labels: Sequence[int]) -> LayerRows:
        """Forget the last batch."""
        self.indices = indices
        return super().start_batch(indices, labels)

    def finish_batch(self) -> None:
        """Put the weights in."""
        if self.margin is not None and self.rows is not None:
            weights = [self.margin.missing[i] * self.share for i in self.indices]
            self.rows[:, self.columns[_WEIGHT]] = self.rows.new_tensor(weights).unsqueeze(1)


@register
@dataclass
class Trak(Compressor):
    """``τ = w_i · mean_c φ_c(q)ᵀ (ΦᵀΦ/N + λ)⁻¹ φ_c(i)`` over checkpoints c, ``φ = vec(G) P / √k``.

    Options: ``rank`` (k), ``joint`` (one projection of all layers together, as in the paper; false: k and a Gram
    matrix for every layer), ``projection`` (``rademacher``, ``normal``, ``sparse``), ``checkpoints``, and ``output``:
    ``loss``: φ is the gradient of the training loss itself, whose output-to-loss derivative is 1, so ``w = 1``;
    ``margin``: φ is the gradient of ``−Σ_t log(p_t/(1 − p_t))`` and ``w_i = mean_t (1 − p_t)``, a mean over
    checkpoints, the paper's ``Q``. Queries keep the gradient of their own measurement either way.

    The paper has ``(ΦᵀΦ)⁻¹``, a sum over examples; here it is the mean, so that the scale is that of every other
    inverse curvature (``N`` times the paper's), and λ is relative to its mean eigenvalue.

    Source: Park et al. 2023, arXiv 2303.14186.
    """

    name: ClassVar[str] = "trak"
    defaults: ClassVar[Mapping[str, Any]] = {
        "rank": 2048,
        "joint": True,
        "projection": "rademacher",
        "checkpoints": None,
        "output": "loss",
    }
    curvature: Moments | None = None
    margin: MarginTask | None = None

    @property
    def layered(self) -> bool:
        """Whether every layer has sections of its own."""
        return not self.options["joint"]

    @property
    def normalise(self) -> str:
        """Weights are kept as their inverses, the norms that scores are divided by."""
        return "train" if self.options["output"] == "margin" else "none"

    def task_of(self, task: Task) -> Task:
        """Margins in place of the training loss where they are asked for."""
        if self.options["output"] == "loss":
            return task
        if self.margin is None or self.margin.task is not task:
            self.margin = MarginTask(task)
        return self.margin

    def prepare(self, context: Context) -> None:
        """Nothing but the layout: the matrix is drawn as it is used."""
        super().prepare(context)
        self._open(context.selection)

    def _open(self, selection: LayerSelection) -> None:
        names = [""] if self.options["joint"] else selection.names
        parts = [
            (f"{name}{self._suffix(c)}", "vector", (self.options["rank"],))
            for c in range(len(self.checkpoints))
            for name in names
        ]
        if self.options["output"] == "margin":
            parts.append((_WEIGHT, "vector", (1,)))
        self.sections = layout(parts)
        self.curvature = Moments(self._features)

    @property
    def _features(self) -> list[Section]:
        return [s for s in self.sections if s.name != _WEIGHT]

    def _suffix(self, checkpoint: int) -> str:
        return f"@{checkpoint}" if len(self.checkpoints) > 1 else ""

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """One checkpoint's features; every checkpoint has a projection of its own."""
        seed = layer_seed(self.seed, "", f"checkpoint {checkpoint}")
        flat = FlatProjection(self.options["rank"], seed, self.options["projection"])
        rows = _Rows(self.sections, flat, self._suffix(checkpoint))
        if self.options["output"] == "margin" and loss == "train":
            rows.margin, rows.share = self.margin, 1 / len(self.checkpoints)
        return rows

    def finish(self, rows: Iterable[Tensor]) -> None:
        """The Gram matrices ``ΦᵀΦ/N`` of every checkpoint (and layer)."""
        assert self.curvature is not None
        self.curvature.fit(rows, self.sequences)

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``(ΦᵀΦ/N + λ)⁻¹φ(q)`` over the number of checkpoints."""
        assert self.curvature is not None
        found = self.curvature.solve(rows, self.damping if damping is None else damping, self.damping_mode)
        return found / len(self.checkpoints)

    def row_norms(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``1/w``."""
        column = next(s.offset for s in self.sections if s.name == _WEIGHT)
        return rows[:, column].clamp(min=1e-12).reciprocal()

    def tensors(self) -> dict[str, Tensor]:
        """The Gram matrices."""
        assert self.curvature is not None
        return self.curvature.tensors()

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection) -> Trak:
        """The inverse of :meth:`settings` and :meth:`tensors`."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, Trak)
        out.curvature = Moments(out._features)
        out.curvature.load(tensors, out.device)
        return out

    def to(self, device: torch.device) -> Trak:
        """Move its tensors."""
        super().to(device)
        assert self.curvature is not None
        self.curvature.load(self.curvature.tensors(), device)
        return self
