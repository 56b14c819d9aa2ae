"""Training-set passes that end in scores: pairwise, per token, per module, self-influence; dense matrix or top k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer
from pyinf.curvature.factors import Factors
from pyinf.curvature.rotate import input_rows, rotate_input, rotate_output, rotated_gradients, working
from pyinf.errors import ModelError, NonFiniteError
from pyinf.score.queries import QueryBlock

__all__ = ["DenseSink", "ScoreConsumer", "ScoreSink", "SelfScoreConsumer", "TokenSink", "TopKSink", "segment_sum"]


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of the rows of each sequence: ``[N, d]`` → ``[B, d]``."""
    counts = (offsets[1:] - offsets[:-1]).to(values.device)
    index = torch.repeat_interleave(torch.arange(counts.numel(), device=values.device), counts)
    return values.new_zeros(counts.numel(), values.shape[1]).index_add_(0, index, values)


class ScoreSink(Protocol):
    """Takes the finished scores of some queries (``rows``) on one batch of examples (``indices``)."""

    def put(self, rows: list[int], indices: list[int], scores: Tensor, offsets: Tensor | None = None) -> None:
        """Take them."""


class DenseSink:
    """``[Q, N]`` on the CPU; float32, or float64 for a float64 model."""

    def __init__(self, queries: int, train: int, dtype: torch.dtype = torch.float32) -> None:
        self.values = torch.zeros(queries, train, dtype=dtype)

    def put(self, rows: list[int], indices: list[int], scores: Tensor, offsets: Tensor | None = None) -> None:
        """Scores ``[R, B]`` of queries ``rows`` and examples ``indices``."""
        block = scores.to(device="cpu", dtype=self.values.dtype)
        self.values[torch.tensor(rows).unsqueeze(1), torch.tensor(indices)] = block


class TokenSink:
    """``[Q, N, T]``; a batch's scores come packed over its counted positions and are put where those stand."""

    def __init__(
        self,
        queries: int,
        train: int,
        tokens: int,
        positions: Callable[[int], Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.values = torch.zeros(queries, train, tokens, dtype=dtype)
        self.positions = positions

    def put(self, rows: list[int], indices: list[int], scores: Tensor, offsets: Tensor | None = None) -> None:
        """Scores ``[R, N]`` of queries ``rows``, packed by ``offsets`` over examples ``indices``."""
        assert offsets is not None
        block, query = scores.to(device="cpu", dtype=self.values.dtype), torch.tensor(rows).unsqueeze(1)
        for b, index in enumerate(indices):
            part = block[:, int(offsets[b]) : int(offsets[b + 1])]
            self.values[query, index, self.positions(index).unsqueeze(0)] = part


class TopKSink:
    """The ``k`` largest scores of each query; memory ``[Q, k + B]``. Ties go to the smaller index."""

    def __init__(self, queries: int, k: int, dtype: torch.dtype = torch.float32) -> None:
        self.values = torch.full((queries, k), float("-inf"), dtype=dtype)
        self.indices = torch.full((queries, k), torch.iinfo(torch.int64).max, dtype=torch.int64)

    def put(self, rows: list[int], indices: list[int], scores: Tensor, offsets: Tensor | None = None) -> None:
        """Scores ``[R, B]`` of queries ``rows`` and examples ``indices``."""
        k = self.values.shape[1]
        new = torch.tensor(indices, dtype=torch.int64).expand(len(rows), -1)
        values = torch.cat([self.values[rows], scores.to(device="cpu", dtype=self.values.dtype)], dim=1)
        ids = torch.cat([self.indices[rows], new], dim=1)
        by_index = ids.argsort(dim=1, stable=True)
        values, ids = values.gather(1, by_index), ids.gather(1, by_index)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
        self.values[rows], self.indices[rows] = values.gather(1, order), ids.gather(1, order)


class ScoreConsumer(Consumer):
    """Consumer that adds every layer of one batch into one buffer: ``[Q, B]``, ``[Q, N]`` per token, or one per
    layer. Layers that read one input are scored together where a kernel then reads it once.
    """

    def __init__(self, block: QueryBlock, per_token: bool, per_module: bool, want_norms: bool) -> None:
        self.block, self.per_token, self.per_module, self.want_norms = block, per_token, per_module, want_norms
        self.scores: Tensor | None = None
        self.by_module: dict[str, Tensor] = {}
        self.norms: Tensor | None = None
        self.offsets: Tensor | None = None
        self._inputs: dict[str, Tensor] = {}
        self._shared_input: tuple[str, Tensor, Tensor] | None = None  # group, rows, offsets of the layers that wait
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def start_batch(self) -> ScoreConsumer:
        """Forget the last batch."""
        self.scores, self.by_module, self.norms, self.offsets = None, {}, None, None
        self._inputs.clear()
        self._shared_input, self._waiting = None, []
        return self

    def finish_batch(self) -> None:
        """Score the layers that still wait for others of their input."""
        if self._shared_input is not None:
            _, rows, offsets = self._shared_input
            assert self.scores is not None
            ops.grouped.low_rank_scores_group(self.scores, self._waiting, rows, offsets, self.per_token)
        self._shared_input, self._waiting = None, []

    def _buffer(self, layer: Layer, g: Tensor, offsets: Tensor) -> Tensor:
        columns = g.shape[0] if self.per_token else offsets.numel() - 1
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        if self.per_module:
            return self.by_module.setdefault(
                layer.name, torch.zeros(self.block.count, columns, dtype=dtype, device=g.device)
            )
        if self.scores is None:
            self.scores = torch.zeros(self.block.count, columns, dtype=dtype, device=g.device)
        return self.scores

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        seen_a, seen_g = a, g  # in the model's dtype
        together = layer.name in self.block.left and not self.per_module and ops.grouped.shares_inputs(a)
        if self.want_norms or not together:
            a, g = working(a), working(g)
        bias = layer.bias
        if self.block.factors is not None:
            bias = False  # in the eigenbasis it is a column like any other
            if not self.rotated:
                factor = self.block.factors.layers[layer.name]
                if group not in self._inputs:
                    self._inputs[group] = rotate_input(a, self.block.factors.inputs[factor.group].basis, layer.bias)
                a, g = self._inputs[group], rotate_output(g, factor.basis)
        scores = self._buffer(layer, g, offsets)
        if self.per_token:
            if self.offsets is None:
                self.offsets = offsets
            elif not torch.equal(self.offsets, offsets):
                raise ModelError(
                    f"layer '{layer.name}' sees other positions than the first traced layer, so its "
                    f"scores have no tokens "
                    "to stand at; leave it out with modules= or use granularity='sequence'"
                )
        if layer.name in self.block.dense:
            V = self.block.dense[layer.name]
            ops.dense_scores(g, a, V, offsets=offsets, out=scores, per_token=self.per_token)
            if bias:
                scores.addmm_(self.block.bias[layer.name], (g if self.per_token else segment_sum(g, offsets)).T)
        elif layer.name in self.block.left:  # absent: a layer that no query's gradient reached
            L, R = self.block.left[layer.name], self.block.right[layer.name]
            if together:
                self._collect(group, bias, seen_a, (seen_g, L, R), offsets)
            else:
                ops.low_rank_scores(
                    g, input_rows(a, layer.bias), L, R, offsets=offsets, out=scores, per_token=self.per_token
                )
        elif layer.name in self.block.core:
            self._shared(layer, a, g, offsets, scores)
        if self.want_norms:
            squared = ops.gradient_norm(g, input_rows(a, layer.bias), offsets).double().square()
            self.norms = squared if self.norms is None else self.norms + squared

    def _collect(
        self, group: str, bias: bool, a: Tensor, layer: tuple[Tensor, Tensor, Tensor], offsets: Tensor
    ) -> None:
        """Keep a layer until one comes that reads another input: of one input at a time, so that little is held."""
        held = self._shared_input
        if held is not None and (held[0] != group or not torch.equal(held[2], offsets)):
            self.finish_batch()
        if self._shared_input is None:
            rows = torch.cat([a, a.new_ones(a.shape[0], 1)], dim=1) if bias else a
            self._shared_input = group, rows, offsets
        self._waiting.append(layer)

    def _shared(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor, scores: Tensor) -> None:
        """``scores += ⟨core_q, B_Sᵀ G_b B_A⟩``: what is read of the training side does not grow with the queries."""
        core, B_S, B_A = (part[layer.name] for part in (self.block.core, self.block.basis_out, self.block.basis_in))
        if self.per_token:
            left, right = g @ B_S.to(g.dtype), rotate_input(a, B_A.to(a.dtype), layer.bias)
            ops.dense_scores(left, right, core, offsets=offsets, out=scores, per_token=True)
            return
        inner = B_A[:-1] if layer.bias else B_A
        seen = ops.project_gradients(g, a, offsets, P_g=B_S, P_a=inner)
        assert isinstance(seen, Tensor)
        if layer.bias:  # the column of ones, without joining it to the inputs
            seen = seen + (segment_sum(g, offsets) @ B_S).unsqueeze(2) * B_A[-1]
        scores.addmm_(core.flatten(1).to(scores.dtype), seen.flatten(1).to(scores.dtype).T)


class SelfScoreConsumer(Consumer):
    """Consumer: ``Σ_layers Σ_ij (U_Sᵀ G_b U_A)²_ij / (Λ_ij + λ)`` per sequence; ``‖G_b‖²`` without factors."""

    def __init__(self, factors: Factors | None, dampings: dict[str, float]) -> None:
        self.factors, self.dampings = factors, dampings
        self.scores: Tensor | None = None
        self._inverse: dict[str, Tensor] = {}

    def start_batch(self) -> SelfScoreConsumer:
        """Forget the last batch."""
        self.scores = None
        return self

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if self.factors is None:
            values = ops.gradient_norm(working(g), input_rows(a, layer.bias), offsets).double().square()
        else:
            factor = self.factors.layers[layer.name]
            basis = self.factors.inputs[factor.group].basis
            inverse = self._inverse.get(layer.name)
            if inverse is None:
                inverse = self._inverse[layer.name] = (factor.corrected + self.dampings[layer.name]).reciprocal_()
            parts = [
                torch.dot((G * inverse).reshape(-1), G.reshape(-1))
                for G in rotated_gradients(g, a, offsets, factor.basis, basis, layer.bias)
            ]
            values = torch.stack(parts).double()
        self.scores = values if self.scores is None else self.scores + values


def check_finite(scores: Tensor, indices: list[int]) -> None:
    """Stop at the first score that is not finite, naming the training example."""
    if bool(torch.isfinite(scores.sum())):
        return
    bad = (~torch.isfinite(scores)).any(dim=0).nonzero()
    if bad.numel():
        example = indices[min(int(bad[0]), len(indices) - 1)]
        raise NonFiniteError(
            f"the score of training example {example} is not finite; raise the damping or use a wider dtype"
        )
