"""Rows as they come out of a pass: batch by batch, under every checkpoint, one a sequence or one a token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyinf import progress
from pyinf.capture import Consumer, InputGroups, Layer, LayerSelection, PassSource, TracingSession
from pyinf.data.batching import PreparedExamples, make_batches
from pyinf.data.checkpoints import checkpoint_weights
from pyinf.errors import ConfigError, ModelError
from pyinf.store.compress.base import Compressor, Context, RowConsumer
from pyinf.store.sections import row_width
from pyinf.tasks import Task

__all__ = ["Rig", "RowBatch", "RowPass"]

_CHUNK_BYTES = 1 << 28  # rows of a chunk of batches, for which the weights are changed once a checkpoint


@dataclass
class RowBatch:
    """Rows of some examples: ``rows [B, width]``; per token ``[N, width]`` with ``offsets [B+1]``."""

    indices: list[int]
    rows: Tensor
    offsets: Tensor | None = None

    def by_sequence(self) -> Tensor:
        """One row a sequence: the sums of its tokens' rows."""
        if self.offsets is None:
            return self.rows
        counts = (self.offsets[1:] - self.offsets[:-1]).to(self.rows.device)
        index = torch.repeat_interleave(torch.arange(counts.numel(), device=self.rows.device), counts)
        return self.rows.new_zeros(counts.numel(), self.rows.shape[1]).index_add_(0, index, self.rows)


@dataclass
class Rig:
    """What it takes to run passes: model, layers, task, batch size; ``groups`` are learnt once and shared."""

    model: nn.Module
    selection: LayerSelection
    task: Task
    groups: InputGroups = field(default_factory=InputGroups)
    batch_size: int | None = None
    token_budget: int | None = None

    def weights(self, compressor: Compressor, checkpoint: int) -> AbstractContextManager[Any]:
        """The model with the weights of a checkpoint."""
        source = compressor.checkpoints[checkpoint]
        return contextlib.nullcontext() if source is None else checkpoint_weights(self.model, source)

    def batches(self, data: PreparedExamples, indices: list[int] | None = None, loss: str = "train") -> list[list[int]]:
        """Batches of the examples (of ``indices`` only) that have a row: a counted position and a label to learn from.

        A query whose measurement needs no label has a row without one.
        """
        counted = data.counted
        labelled = loss != "measurement" or self.task.measures_labels
        wanted = range(len(data)) if indices is None else indices
        live = [i for i in wanted if counted[i] > 0 and (data.label_counts[i] > 0 or not labelled)]
        return make_batches(data.lengths, live, self.batch_size, self.token_budget)

    def context(self, compressor: Compressor, data: PreparedExamples, **settings: Any) -> Context:
        """What ``compressor.prepare`` gets; ``settings`` are the remaining fields of :class:`Context`."""
        batches = make_batches(
            data.lengths, [i for i, n in enumerate(data.counted) if n > 0], self.batch_size, self.token_budget
        )

        def run(
            consumer_of: Callable[[list[int]], Consumer],
            loss: str,
            stage: str,
            indices: list[int] | None = None,
            checkpoint: int = 0,
        ) -> None:
            some = batches if indices is None else self.batches(data, indices)
            session = TracingSession(self.model, self.selection, self.task, self.groups)
            with self.weights(compressor, checkpoint), session:
                PassSource(session, data, some).run(lambda _, batch: consumer_of(batch), loss, stage)

        return Context(self.model, self.selection, self.task, data=data, batches=batches, run=run, **settings)


class _PerToken(Consumer):
    """Every token a sequence of its own."""

    def __init__(self, consumer: RowConsumer) -> None:
        self.consumer = consumer
        self.offsets: Tensor | None = None

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if self.offsets is None:
            self.offsets = offsets
        elif not torch.equal(self.offsets, offsets):
            raise ModelError(
                f"layer '{layer.name}' sees other positions than the first traced layer, so its rows have no tokens "
                "to stand at; leave it out with modules= or use granularity='sequence'"
            )
        self.consumer.consume(layer, group, first, a, g, torch.arange(g.shape[0] + 1))

    def finish_batch(self) -> None:
        """Pass it on."""
        self.consumer.finish_batch()


class RowPass:
    """The rows of some batches, as often as they are iterated; nothing is held but the batch at hand.

    Args:
        loss: what is differentiated: ``train`` or ``measurement``.
        side: whose rows: ``train`` or ``measurement``; None: those of ``loss``.
        per_token: one row a counted position.

    Raises:
        ConfigError: rows per token of a compressor that has none.
    """

    def __init__(
        self,
        rig: Rig,
        compressor: Compressor,
        data: PreparedExamples,
        batches: list[list[int]],
        loss: str = "train",
        side: str | None = None,
        per_token: bool = False,
        stage: str = "rows",
    ) -> None:
        if per_token and not compressor.linear:
            raise ConfigError(f"'{compressor.name}' is no sum over tokens; use granularity='sequence'")
        self.rig, self.compressor, self.data, self.batches = rig, compressor, data, batches
        self.loss, self.side, self.per_token, self.stage = loss, side or loss, per_token, stage
        self.task = compressor.task_of(rig.task)

    def __iter__(self) -> Iterator[RowBatch]:
        with progress.stage(self.stage, sum(map(len, self.batches))) as running:
            for found in self._several() if len(self.compressor.checkpoints) > 1 else self._plain(0, self.batches):
                running.advance(len(found.indices))
                yield found

    def _several(self) -> Iterator[RowBatch]:
        width = row_width(self.compressor.sections)
        lengths, chunk, used = self.data.lengths, [], 0
        for number, batch in enumerate(self.batches):
            chunk.append(batch)
            used += 4 * width * (sum(lengths[i] for i in batch) if self.per_token else len(batch))
            if used >= _CHUNK_BYTES or number == len(self.batches) - 1:
                yield from self._chunk(chunk)
                chunk, used = [], 0

    def _chunk(self, batches: list[list[int]]) -> list[RowBatch]:
        total: list[RowBatch] = []
        for checkpoint in range(len(self.compressor.checkpoints)):
            for number, found in enumerate(self._plain(checkpoint, batches)):
                if checkpoint == 0:
                    total.append(found)
                else:
                    total[number].rows += found.rows
        return total

    def _plain(self, checkpoint: int, batches: list[list[int]]) -> Iterator[RowBatch]:
        rig = self.rig
        consumer = self.compressor.consumer(self.side, checkpoint)
        counts = self.data.label_counts
        session = TracingSession(rig.model, rig.selection, self.task, rig.groups)
        with rig.weights(self.compressor, checkpoint), session:
            for indices in batches:
                consumer.start_batch(indices, [counts[i] for i in indices])
                taker = _PerToken(consumer) if self.per_token else consumer
                session.run(self.data.batch(indices, session.device), taker, self.loss)
                taker.finish_batch()
                rows = consumer.rows
                if rows is None:
                    raise ModelError(f"the loss of example {indices[0]} reaches no traced layer; change modules=")
                yield RowBatch(indices, rows, taker.offsets if isinstance(taker, _PerToken) else None)
