"""How one sequence's gradient becomes one row, and one query's gradient a query row.

A :class:`Compressor` lives through four steps; ``pyinf/store/build.py`` and ``pyinf/methods/projected.py`` drive it:

1. ``prepare(context)``: bases, masks and scales that come before the rows; ``sections`` are known afterwards.
2. ``consumer(loss)`` makes rows: a pass over the training set (``"train"``), one over the queries (``"measurement"``).
3. ``finish(rows)``: what is estimated from the training rows (Gram matrices, eigenbases).
4. ``query_rows(rows)`` applies the inverse curvature to the queries; then score = ``section_scores``, divided by
   ``row_norms`` where ``normalise`` says so.

``settings()`` (JSON) and ``tensors()`` after step 3 rebuild it: ``restore(settings, tensors, selection)``.

To add a compressor: a file here with a subclass under :func:`register`, its import in ``compress/__init__.py``, and a
``Method`` with its options in ``pyinf/methods``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyinf.capture import Consumer, Layer, LayerSelection
from pyinf.curvature import Factors
from pyinf.data.batching import PreparedExamples
from pyinf.data.checkpoints import TensorSource
from pyinf.errors import ConfigError
from pyinf.store.sections import Section, row_width
from pyinf.tasks import Task

__all__ = ["REGISTRY", "Compressor", "Context", "LayerRows", "RowConsumer", "layer_seed", "register", "row_dtype"]

NORMALISATIONS = ("none", "train", "both")


class RowConsumer(Consumer):
    """Consumer whose ``rows`` ``[B, width]`` hold one row for every sequence of the batch just consumed.

    float32, or float64 for a float64 model. A sequence that a layer's loss does not reach has zeros there.
    """

    rows: Tensor | None = None

    def start_batch(self, indices: Sequence[int], labels: Sequence[int]) -> RowConsumer:
        """Called before every batch with its examples' numbers and their numbers of labels."""
        self.rows = None
        return self


class LayerRows(RowConsumer):
    """A :class:`RowConsumer` made of one function a layer, ``(layer, a, g, offsets) → [B, width]``.

    Its result goes to the columns of the section called like the layer; with a section called ``""`` (a joint vector)
    the layers' results are added up there. ``suffix`` follows the names: ``"@1"`` for the sections of checkpoint 1.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        project: Callable[[Layer, Tensor, Tensor, Tensor], Tensor],
        suffix: str = "",
    ) -> None:
        self.width, self.project, self.suffix = row_width(sections), project, suffix
        self.columns = {s.name: slice(s.offset, s.stop) for s in sections}
        self.labels: Sequence[int] = ()

    def start_batch(self, indices: Sequence[int], labels: Sequence[int]) -> LayerRows:
        """Forget the last batch."""
        self.rows, self.labels = None, labels
        return self

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        part = self.project(layer, a, g, offsets)
        if self.rows is None:
            self.rows = torch.zeros(offsets.numel() - 1, self.width, dtype=row_dtype(g.dtype), device=g.device)
        columns = self.columns.get(layer.name + self.suffix, self.columns.get(self.suffix))
        if columns is None:
            raise ConfigError(f"layer '{layer.name}' has no section in the rows; use the modules= of the build")
        self.rows[:, columns] += part


@dataclass
class Context:
    """What ``prepare`` may use.

    ``data`` is the training set and ``batches`` its batches, every sequence that has a counted position; ``factors``
    what ``needs`` asked for. ``run(consumer_of, loss, stage, indices=None, checkpoint=0)`` makes one pass over the
    training set (over ``indices`` only): ``consumer_of(indices)`` gives the consumer of a batch, and ``loss`` is
    ``"train"`` or ``"sampled"`` (:attr:`fit_loss` is the one that ``fisher`` names).
    """

    model: nn.Module
    selection: LayerSelection
    task: Task
    factors: Factors | None
    data: PreparedExamples
    batches: list[list[int]]
    run: Callable[..., None]
    seed: int = 0
    damping: float = 0.1
    damping_mode: str = "relative"
    fisher: str = "sampled"
    memory_budget: int = 1 << 30

    @property
    def fit_loss(self) -> str:
        """Which labels a curvature is fitted with."""
        return "sampled" if self.fisher == "sampled" else "train"

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return row_dtype(next(self.model.parameters()).dtype)

    @property
    def usable(self) -> list[int]:
        """Training examples with a counted position and a label, in order."""
        counted = self.data.counted
        return [i for i in self.data.scored if counted[i] > 0]

    def sample(self, count: int | None) -> list[int]:
        """So many usable training examples (None: all), drawn with the seed, in order."""
        usable = self.usable
        if count is None or count >= len(usable):
            return usable
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return sorted(usable[i] for i in order[:count])


@dataclass
class Compressor:
    """See the module. ``options`` are the method's, all of them; ``damping`` is set by the run before ``finish``.

    Class attributes: ``name``; ``defaults``, the options and their default values; ``linear``, whether a sequence's row
    is the sum of its tokens' rows (else there are no rows per token); ``early_damping``, whether the damping goes into
    the rows (else one fit serves any damping); ``one_sided``, whether training examples and queries have different
    rows for the same gradient. ``sequences`` is how many training sequences means are over.
    """

    name: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    linear: ClassVar[bool] = True
    early_damping: ClassVar[bool] = False
    one_sided: ClassVar[bool] = False

    options: dict[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    seed: int = 0
    damping: float = 0.1
    damping_mode: str = "relative"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    sequences: int = 1

    def __post_init__(self) -> None:
        unknown = sorted(set(self.options) - set(self.defaults))
        if unknown:
            raise ConfigError(f"{self.name} has no option '{unknown[0]}'; it has: {', '.join(self.defaults)}")
        self.options = {**self.defaults, **self.options}

    # -- what it is ----------------------------------------------------------------------------------------------------

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> str | None:
        """The factors that ``prepare`` wants (``"ekfac"``, …), or None."""
        return None

    @property
    def normalise(self) -> str:
        """``"none"``, ``"train"`` (scores are divided by ``row_norms`` of the training rows) or ``"both"`` (query rows
        come divided by theirs as well: a cosine).
        """
        return "none"

    @property
    def layered(self) -> bool:
        """Whether every layer has sections of its own, so that a score is a sum over layers."""
        return True

    @property
    def damped(self) -> bool:
        """Whether the scores depend on the damping."""
        return True

    @property
    def checkpoints(self) -> list[TensorSource | None]:
        """Weights under which rows are made, one part of the row each; ``[None]``: the model as it is."""
        return self.options.get("checkpoints") or [None]

    def task_of(self, task: Task) -> Task:
        """The task whose losses the rows are gradients of; the run's own unless a method asks for another."""
        return task

    # -- the four steps ------------------------------------------------------------------------------------------------

    def prepare(self, context: Context) -> None:
        """Set ``sections`` and what the rows need. Overriding methods call this one first."""
        self.seed, self.device = context.seed, context.device
        self.damping, self.damping_mode = context.damping, context.damping_mode
        self.dtype, self.sequences = context.dtype, len(context.data)

    def consumer(self, loss: str, checkpoint: int = 0) -> RowConsumer:
        """Makes training rows (``"train"``) or query rows not yet preconditioned (``"measurement"``).

        With several checkpoints a consumer fills the columns of its own one and leaves zeros elsewhere.
        """
        raise NotImplementedError

    def see_queries(self, rows: Tensor) -> None:
        """Rows ``[Q, width]`` of all queries of a request, for a curvature that mixes them in; before ``finish``."""

    def finish(self, rows: Iterable[Tensor]) -> None:
        """Estimate what comes from the training rows. ``rows`` may be iterated again and again, blocks ``[B, width]``.

        Never holds all of them. Nothing by default.
        """

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``[Q, width]`` → ``[Q, query_width]``: preconditioned (at ``damping``; None: the run's)."""
        return rows

    def row_norms(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``[B]``: what the scores of training rows are divided by; only where ``normalise`` is not ``"none"``."""
        raise NotImplementedError

    # -- disk ----------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """JSON. With :meth:`tensors` it rebuilds the compressor; overriding methods add to it."""
        plain = {k: _plain(v) for k, v in self.options.items() if _is_plain(_plain(v))}
        return {
            "options": plain,
            "seed": self.seed,
            "damping": self.damping,
            "damping_mode": self.damping_mode,
            "sequences": self.sequences,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sections": [s.to_dict() for s in self.sections],
        }

    def tensors(self) -> dict[str, Tensor]:
        """What cannot be drawn again from the seed, on the CPU."""
        return {}

    @classmethod
    def restore(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection
    ) -> Compressor:
        """A compressor that was prepared and finished before; overriding methods read their own tensors."""
        out = cls(
            dict(settings["options"]),
            [Section.from_dict(s) for s in settings["sections"]],
            int(settings["seed"]),
            float(settings["damping"]),
            str(settings["damping_mode"]),
            dtype=getattr(torch, settings["dtype"]),
            sequences=int(settings["sequences"]),
        )
        named = {s.name.partition("@")[0] for s in out.sections} - {""}
        odd = sorted(named - set(selection.names))
        if odd:
            raise ConfigError(f"the rows have a part of layer '{odd[0]}', which is not selected; use the same modules=")
        return out

    def adopt(self, factors: Factors) -> None:
        """Take the attributor's fitted factors, for queries; for compressors whose store does not keep theirs."""

    def to(self, device: torch.device) -> Compressor:
        """Move its tensors; overriding methods move their own."""
        self.device = device
        return self


REGISTRY: dict[str, type[Compressor]] = {}


def register(cls: type[Compressor]) -> type[Compressor]:
    """Class decorator: enter a compressor under its name."""
    REGISTRY[cls.name] = cls
    return cls


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_seed(seed: int, name: str, what: str = "") -> int:
    """A seed of its own for a layer, from its name: the order and number of layers do not matter."""
    digest = hashlib.blake2b(f"{seed}|{name}|{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
