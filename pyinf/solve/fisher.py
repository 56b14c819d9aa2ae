"""Gradients of single sequences as rows ``[B, D]``, and the Fisher matrix that they make: ``C = (1/n) Σ G_i G_iᵀ``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyinf.capture import Consumer, Layer, PassSource, TracingSession
from pyinf.curvature.rotate import rotated_gradients
from pyinf.errors import ModelError
from pyinf.solve.layout import Layout
from pyinf.solve.operators import Operator

__all__ = ["FisherOperator", "GradientRows"]


class _Rows(Consumer):
    """Consumer: every layer's per-sequence gradients of one batch, side by side."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.parts: dict[str, Tensor] = {}

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        self.parts[layer.name] = torch.stack(
            [G.clone() for G in rotated_gradients(g, a, offsets, None, None, layer.bias)]
        )

    def take(self, count: int) -> Tensor:
        """``[B, D]``; a layer that no gradient reached is zero."""
        if not self.parts:
            raise ModelError("no traced layer received a gradient; check modules= and the task")
        like = next(iter(self.parts.values()))
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            if name not in self.parts:
                self.parts[name] = like.new_zeros(count, *shape)
        out = self.layout.pack(self.parts)
        self.parts = {}
        return out


class GradientRows:
    """Per-sequence gradients of some batches; made by a pass whenever asked for, or once and kept where they fit.

    Args:
        session: an open :class:`TracingSession` is made for each pass from this model, selection and task.
        loss: ``sampled`` or ``train``.
        keep_bytes: keep all rows if they take no more than this.
    """

    def __init__(
        self, source: Callable[[Sequence[Sequence[int]]], PassSource], batches: Sequence[Sequence[int]], layout: Layout,
        loss: str, keep_bytes: int = 0, element_size: int = 4,
    ) -> None:  # fmt: skip
        self._source, self.layout, self.loss = source, layout, loss
        self.batches = [list(b) for b in batches]
        self.keep_bytes, self._element = keep_bytes, element_size
        self._kept: Tensor | None = None

    @property
    def indices(self) -> list[int]:
        """Example numbers, in the order of the rows."""
        return [i for batch in self.batches for i in batch]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return len(self.indices) * self.layout.size * self._element

    def each(self, take: Callable[[list[int], Tensor], None]) -> None:
        """Call ``take(indices, rows [B, D])`` batch by batch."""
        if self._kept is None and self.nbytes <= self.keep_bytes:
            self._kept = self._all()
        if self._kept is not None:
            take(self.indices, self._kept)
            return
        self._run(take)

    def matrix(self) -> Tensor:
        """``[N, D]``, whatever its size; rows in the order of :attr:`indices`."""
        if self._kept is None:
            self._kept = self._all()
        return self._kept

    def _all(self) -> Tensor:
        parts: list[Tensor] = []
        self._run(lambda _, rows: parts.append(rows))
        return torch.cat(parts)

    def _run(self, take: Callable[[list[int], Tensor], None]) -> None:
        source = self._source(self.batches)
        consumer = _Rows(self.layout)

        def done(batch: int) -> None:
            indices = self.batches[batch - 1]
            take(indices, consumer.take(len(indices)))

        with source.session:
            source.run(lambda *_: consumer, self.loss, "gradients of the training data", done=done)

    def on(self, batches: Sequence[Sequence[int]]) -> GradientRows:
        """The same for other batches; taken from what is kept where it is."""
        other = GradientRows(self._source, batches, self.layout, self.loss, 0, self._element)
        if self._kept is not None:
            place = {index: row for row, index in enumerate(self.indices)}
            if all(i in place for i in other.indices):
                other._kept = self._kept[[place[i] for i in other.indices]]
        return other


class FisherOperator(Operator):
    """``C X = (1/n) Σ_i ⟨G_i, X⟩ G_i`` over all traced layers together: two matrix products a batch.

    With labels drawn from the model this is a Monte-Carlo estimate of the Gauss–Newton matrix, with the data's own the
    empirical Fisher matrix. Its rank is at most n.
    """

    def __init__(self, rows: GradientRows, sequences: int | None = None) -> None:
        self.rows = rows
        self.batches = rows.batches
        self.size = rows.layout.size
        self.sequences = sequences if sequences is not None else len(rows.indices)

    def apply(self, X: Tensor) -> Tensor:
        """``C X``."""
        out = torch.zeros_like(X)
        self.rows.each(lambda _, G: out.add_((X @ G.T) @ G))
        return out.div_(max(1, self.sequences))

    def on(self, batches: Sequence[Sequence[int]], sequences: int | None = None) -> FisherOperator:
        """The same over other batches."""
        return FisherOperator(self.rows.on(batches), sequences)

    def __enter__(self) -> FisherOperator:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def rows_of(
    make_session: Callable[[], TracingSession], data, batches, layout: Layout, loss: str, keep_bytes: int, element: int
) -> GradientRows:
    """:class:`GradientRows` of a dataset under a model."""
    return GradientRows(
        lambda some: PassSource(make_session(), data, [list(b) for b in some]),
        batches,
        layout,
        loss,
        keep_bytes,
        element,
    )
