"""The gradient recipes: fit a curvature, precondition the queries, meet the training set. Composition only."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyinf import artifacts
from pyinf.capture import CaptureCache, InputGroups, LayerSelection, PassSource, TracingSession
from pyinf.checkpoint import Checkpoint
from pyinf.curvature import Factors, fit_factors, planned_kind
from pyinf.data.batching import PreparedExamples, make_batches
from pyinf.errors import ArtifactError, ConfigError
from pyinf.methods import Method
from pyinf.plan import Plan
from pyinf.score import (
    DenseSink,
    QueryBlock,
    QueryConsumer,
    ScoreConsumer,
    SelfScoreConsumer,
    TokenSink,
    TopKSink,
    check_finite,
)
from pyinf.score.shared_basis import fill_shared, need_rank
from pyinf.tasks import Task

__all__ = ["GradientRun", "ScoreRequest", "check_request"]


@dataclass
class ScoreRequest:
    """How scores are wanted."""

    granularity: str = "sequence"
    per_module: bool = False
    topk: int | None = None
    dampings: Sequence[float] = (0.1,)
    damping_mode: str = "relative"
    query_rank: int | float | None = None
    query_basis: str | None = None


@dataclass
class GradientRun:
    """One model, one selection of layers, one task; fits factors and makes scores."""

    model: nn.Module
    selection: LayerSelection
    task: Task
    method: Method
    fisher: str
    eigensolver: str
    seed: int
    groups: InputGroups = field(default_factory=InputGroups)
    timings: dict[str, float] = field(default_factory=dict)
    cache: CaptureCache | None = None
    cache_of: str | None = None
    factor_block: int | None = None

    @property
    def fit_loss(self) -> str:
        """Which labels the curvature is fitted with."""
        return "sampled" if self.fisher == "sampled" else "train"

    @property
    def damped(self) -> bool:
        """Whether the scores depend on the damping."""
        return self.method.factors is not None

    @property
    def splits(self) -> bool:
        """Whether a score is a sum over tokens and over layers."""
        return not self.method.normalise

    def batches(self, data: PreparedExamples, plan: Plan, scored_only: bool) -> list[list[int]]:
        """Length-bucketed batches of every sequence with a counted position (or label)."""
        counted = data.counted
        wanted = [i for i in (data.scored if scored_only else range(len(data))) if counted[i] > 0]
        return make_batches(data.lengths, wanted, plan.batch_size, plan.token_budget)

    # -- fit -----------------------------------------------------------------------------------------------------------

    def fit(
        self, data: PreparedExamples, plan: Plan, state: Path | None, keep: bool, interval: float = 60.0
    ) -> Factors:
        """Fit the method's factors; with ``state`` the unfinished fit is kept there."""
        assert self.method.factors is not None
        self.release()
        if state is not None:  # what a killed run captured
            for stale in state.parent.glob("pyinf-capture-*"):
                shutil.rmtree(stale, ignore_errors=True)
        self.cache = CaptureCache(plan.cache_memory, plan.cache_disk, None if state is None else str(state.parent))
        checkpoint = Checkpoint(state, interval) if state is not None else None
        with TracingSession(self.model, self.selection, self.task, self.groups) as session:
            source = PassSource(session, data, self.batches(data, plan, False), self.cache)
            uses_again = planned_kind(self.method.factors) == "ekfac" or keep
            factors = fit_factors(
                source,
                self.method.factors,
                self.fit_loss,
                len(data),
                self.eigensolver,
                checkpoint,
                keep_captured=uses_again and bool(plan.cache_memory or plan.cache_disk),
                keep_rotated=keep and plan.score_rotated,
                timings=self.timings,
                factor_block=self.factor_block,
            )
        if keep and self.fit_loss == "train":
            self.cache_of = data.name
        else:
            self.release()
        return factors

    def release(self) -> None:
        """Forget what was captured."""
        if self.cache is not None:
            self.cache.close()
        self.cache, self.cache_of = None, None

    # -- queries -------------------------------------------------------------------------------------------------------

    def _query_block(
        self, queries: PreparedExamples, indices: list[int], factors: Factors | None, request: ScoreRequest, plan: Plan
    ) -> QueryBlock:
        dampings = (
            [factors.dampings(d, request.damping_mode) for d in request.dampings] if factors is not None else [{}]
        )
        block = QueryBlock(len(indices) * len(dampings))
        shared = request.query_basis == "shared"
        if not shared and (plan.score_rotated or self._holds_rotated()):
            block.factors = factors
        position_of = {index: row for row, index in enumerate(indices)}
        needs_label = self.task.measures_labels
        counted = queries.counted
        live = [i for i in indices if counted[i] > 0 and (queries.label_counts[i] > 0 or not needs_label)]
        silent = sorted(position_of[i] for i in set(indices) - set(live))
        settings = (position_of, factors, dampings, request.query_rank, self.method.normalise, self.seed, silent)
        started = time.perf_counter()
        batches = make_batches(queries.lengths, live, plan.batch_size, plan.token_budget)

        def run(consumer: QueryConsumer, stage: str = "query gradients") -> None:
            with TracingSession(self.model, self.selection, self.task, self.groups) as session:
                source = PassSource(session, queries, batches)
                source.run(lambda _, batch: consumer.for_batch(batch), "measurement", stage)

        if shared:
            fill_shared(block, settings, need_rank(request.query_rank), run)
        else:
            run(QueryConsumer(block, *settings))
        self._add_time("queries", started)
        return block

    def _holds_rotated(self) -> bool:
        return self.cache is not None and self.cache.holds_rotated()

    def _score_dtype(self) -> torch.dtype:
        parameter = next(self.model.parameters())
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32

    def _add_time(self, stage: str, started: float) -> None:
        self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - started

    # -- scores --------------------------------------------------------------------------------------------------------

    def score(
        self,
        queries: PreparedExamples,
        train: PreparedExamples,
        factors: Factors | None,
        request: ScoreRequest,
        plan: Plan,
        state: Path | None,
        interval: float = 60.0,
    ) -> tuple[Any, dict[str, Any]]:
        """Scores of every damping, ``[D·Q, …]`` in blocks put together, and facts about them.

        Returns:
            ``(values, facts)``: a tensor, a dict by layer, or ``(values, indices)`` for top k.
        """
        count = len(queries) * len(request.dampings)
        sinks = _Sinks(request, count, train, self.selection.names, state, self._score_dtype())
        progress_of = _ScoreProgress(state, interval, sinks, _identity(request, len(queries), len(train)))
        step = max(1, plan.query_block)
        for number, first in enumerate(range(0, len(queries), step)):
            if number < progress_of.block:
                continue
            indices = list(range(first, min(first + step, len(queries))))
            block = self._query_block(queries, indices, factors, request, plan)
            energy = block.captured_energy()
            if energy is not None:
                progress_of.energies[str(number)] = [round(float(e), 6) for e in energy]
            rows = [d * len(queries) + i for d in range(len(request.dampings)) for i in indices]
            self._score_block(block, rows, train, request, plan, sinks, progress_of, number)
        facts: dict[str, Any] = {}
        if progress_of.energies:
            facts["captured_energy"] = [e for part in progress_of.energies.values() for e in part]
        unlabelled = len(train) - len(train.scored)
        facts["train_without_labels"] = unlabelled
        facts["queries_without_labels"] = len(queries) - len(queries.scored) if self.task.measures_labels else 0
        result = sinks.result()
        progress_of.finish()
        return result, facts

    def _score_block(
        self,
        block: QueryBlock,
        rows: list[int],
        train: PreparedExamples,
        request: ScoreRequest,
        plan: Plan,
        sinks: _Sinks,
        progress_of: _ScoreProgress,
        number: int,
    ) -> None:
        started = time.perf_counter()
        per_token = request.granularity == "token"
        consumer = ScoreConsumer(block, per_token, request.per_module, self.method.normalise)
        reuse = (
            self.cache if self.cache is not None and self.cache_of == train.name and self.fit_loss == "train" else None
        )
        batches = self.batches(train, plan, scored_only=reuse is None)
        with TracingSession(self.model, self.selection, self.task, self.groups) as session:
            source = PassSource(session, train, batches, reuse)

            def done(batch: int) -> None:
                indices = batches[batch - 1]
                scores = consumer.by_module if request.per_module else {"": consumer.scores}
                for name, values in scores.items():
                    if values is None:
                        continue
                    check_finite(values, indices)
                    if self.method.normalise:
                        values = _cosine(values, block.norms, consumer.norms)
                    sinks.put(name, rows, indices, values, consumer.offsets)
                progress_of.advance(number, batch)

            start = progress_of.batch if number == progress_of.block else 0
            if block.reaches:
                source.run(lambda *_: consumer.start_batch(), "train", "training pass and scores", start, done)
        if request.topk is not None:  # sequences without labels, and all of them when no query has one, score 0
            ran = set().union(*batches) if block.reaches else set()
            rest = [i for i in range(len(train)) if i not in ran]
            if rest:
                sinks.put("", rows, rest, torch.zeros(len(rows), len(rest)), None)
        self._add_time("scores", started)

    def self_score(
        self, train: PreparedExamples, factors: Factors | None, dampings: dict[str, float], plan: Plan
    ) -> Tensor:
        """Self-influence ``⟨H⁻¹G_i, G_i⟩`` of every training example, ``[N]``."""
        out = torch.zeros(len(train), dtype=torch.float64)
        consumer = SelfScoreConsumer(factors, dampings)
        started = time.perf_counter()
        batches = self.batches(train, plan, scored_only=True)
        with TracingSession(self.model, self.selection, self.task, self.groups) as session:

            def done(batch: int) -> None:
                if consumer.scores is not None:
                    check_finite(consumer.scores.unsqueeze(0), batches[batch - 1])
                    out[batches[batch - 1]] = consumer.scores.cpu()

            source = PassSource(session, train, batches)
            source.run(lambda *_: consumer.start_batch(), "train", "self-influence", done=done)
        self._add_time("self-influence", started)
        if self.method.normalise:
            out = (out > 0).double()
        return out.to(self._score_dtype())


def _cosine(values: Tensor, query_norms: Tensor | None, train_norms: Tensor | None) -> Tensor:
    assert query_norms is not None and train_norms is not None
    scale = query_norms.to(values.device).sqrt().unsqueeze(1) * train_norms.to(values.device).sqrt().unsqueeze(0)
    return torch.where(scale > 0, values.double() / scale.clamp(min=1e-300), torch.zeros_like(scale))


def _identity(request: ScoreRequest, queries: int, train: int) -> str:
    text = json.dumps([str(request), queries, train])
    return hashlib.sha256(text.encode()).hexdigest()


class _Sinks:
    """Where the scores of one request go: a matrix (in memory, or mapped from a file), one per layer, tokens or top
    k.
    """

    def __init__(
        self,
        request: ScoreRequest,
        count: int,
        train: PreparedExamples,
        names: list[str],
        state: Path | None,
        dtype: torch.dtype,
    ) -> None:
        self.request, self.state = request, state
        self.matrices: dict[str, Any] = {}
        for name in names if request.per_module else [""]:
            if request.granularity == "token":
                longest = max(train.full_lengths)
                self.matrices[name] = TokenSink(count, len(train), longest, lambda i: _positions(train, i), dtype)
            elif request.topk is not None:
                self.matrices[name] = TopKSink(count, min(request.topk, len(train)), dtype)
            else:
                self.matrices[name] = DenseSink(count, len(train), dtype)
        self.mapped: dict[str, np.memmap] = {}
        self.fresh = False
        if state is not None and request.granularity == "sequence" and request.topk is None:
            state.mkdir(parents=True, exist_ok=True)
            for number, (name, sink) in enumerate(self.matrices.items()):
                path = state / f"scores-{number:04d}.partial"
                shape = tuple(sink.values.shape)
                fresh = self.fresh or not path.exists() or path.stat().st_size != dtype.itemsize * shape[0] * shape[1]
                mapped = np.memmap(
                    path,
                    dtype=np.float64 if dtype == torch.float64 else np.float32,
                    mode="w+" if fresh else "r+",
                    shape=shape,
                )
                self.mapped[name], self.fresh = mapped, fresh
                sink.values = torch.from_numpy(mapped)

    @property
    def resumable(self) -> bool:
        return bool(self.mapped)

    def flush(self) -> None:
        for mapped in self.mapped.values():
            mapped.flush()

    def put(self, name: str, rows: list[int], indices: list[int], values: Tensor, offsets: Tensor | None) -> None:
        self.matrices[name].put(rows, indices, values, offsets)

    def result(self) -> Any:
        """What the request asked for; a mapped matrix is copied into memory of its own."""
        if self.request.topk is not None:
            sink = self.matrices[""]
            return sink.values, sink.indices
        values = {n: s.values.clone() if n in self.mapped else s.values for n, s in self.matrices.items()}
        return values if self.request.per_module else values[""]


def _positions(train: PreparedExamples, index: int) -> Tensor:
    """Where the counted positions of an example stand in it as the user gave it."""
    mask = train.masks[index]
    inner = torch.arange(train.input_ids[index].numel()) if mask is None else mask.nonzero().squeeze(1)
    return inner + train.shifts[index]


class _ScoreProgress:
    """How far an interrupted scoring run came: block of queries and batch; only for matrices mapped from files."""

    def __init__(self, state: Path | None, interval: float, sinks: _Sinks, identity: str) -> None:
        self.block = self.batch = 0
        self.energies: dict[str, list[float]] = {}
        self.sinks, self.interval, self.identity = sinks, interval, identity
        self.path = state / "progress.json" if state is not None and sinks.resumable else None
        self._last = time.monotonic()
        if self.path is not None and sinks.fresh:
            self.path.unlink(missing_ok=True)  # without the scores that it counts it means nothing
        if self.path is not None and self.path.exists():
            found = artifacts.read_json(self.path, "scoring progress")
            if not isinstance(found, dict) or found.get("identity") != identity:
                raise ArtifactError(
                    f"{self.path} belongs to another scoring run; delete {self.path.parent} or use another directory"
                )
            self.block, self.batch = int(found["block"]), int(found["batch"])
            self.energies = dict(found["energies"])

    def advance(self, block: int, batch: int) -> None:
        """Note a finished batch; written when the interval has gone by."""
        if self.path is None or time.monotonic() - self._last < self.interval:
            return
        self.sinks.flush()
        found = {"identity": self.identity, "block": block, "batch": batch, "energies": self.energies}
        artifacts.atomic_write_json(self.path, found)
        self._last = time.monotonic()

    def finish(self) -> None:
        """Remove the partial files."""
        if self.path is None:
            return
        for path in [self.path, *self.path.parent.glob("scores-*.partial")]:
            path.unlink(missing_ok=True)


def check_request(request: ScoreRequest, method: Method) -> None:
    """Refuse combinations that have no meaning."""
    if request.granularity not in ("sequence", "token"):
        raise ConfigError(f"unknown granularity '{request.granularity}'; use 'sequence' or 'token'")
    if request.granularity == "token" and (request.topk is not None or method.normalise):
        raise ConfigError("token scores are kept whole and unnormalised; leave topk out and use an unnormalised method")
    if request.topk is not None and (request.topk < 1 or request.per_module):
        raise ConfigError(
            f"topk is {request.topk} (with per_module={request.per_module}); give topk ≥ 1 and no per_module"
        )
    if request.per_module and method.normalise:
        raise ConfigError("a cosine does not split into modules; use grad_dot with per_module")
