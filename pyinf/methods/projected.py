"""Projected methods: every training gradient becomes a short row, and queries meet rows. Composition only.

The rows are held in memory, in the bytes of the format asked for, where the memory budget allows; otherwise each walk
over them makes a pass. Scores per token come from rows that are not rounded. For rows on disk: ``pyinf.store.build``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyinf.curvature import Factors
from pyinf.data.batching import PreparedExamples
from pyinf.errors import ConfigError
from pyinf.methods.gradient import ScoreRequest, _Sinks
from pyinf.methods.solved import SolvedRun
from pyinf.methods.subspace import content_of
from pyinf.plan import Plan
from pyinf.score import check_finite
from pyinf.store.compress import REGISTRY, Compressor
from pyinf.store.passes import Rig, RowBatch, RowPass
from pyinf.store.quantise import decode, encode, row_bytes
from pyinf.store.sections import Section, row_width, section_scores

__all__ = ["ProjectedRun", "RowTable"]


class RowTable:
    """The rows of a pass, to be walked again and again: held as ``format`` has them if they fit ``budget`` bytes.

    In ``float32`` nothing is rounded, and rows of a float64 model stay float64.
    """

    def __init__(self, source: RowPass, format: str, budget: int) -> None:
        self.source, self.format = source, format
        self.sections = source.compressor.sections
        size = row_bytes(self.sections, format) if format != "float32" else 8 * row_width(self.sections)
        count = sum(map(len, source.batches))
        self.held: list[tuple[list[int], Any]] | None = None
        self._keeps = not source.per_token and size * count <= budget

    def __iter__(self) -> Iterator[RowBatch]:
        if self.held is not None:
            for indices, kept in self.held:
                yield RowBatch(indices, self._decoded(kept))
            return
        found: list[tuple[list[int], Any]] = []
        for batch in self.source:
            kept = batch.rows if self.format == "float32" else encode(batch.rows, self.sections, self.format)
            if self._keeps:
                found.append((batch.indices, kept))
            yield RowBatch(batch.indices, self._decoded(kept), batch.offsets)
        if self._keeps:
            self.held = found

    def _decoded(self, kept: Tensor | np.ndarray) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return decode(kept, self.sections, self.format).to(self.source.compressor.device)

    @property
    def rows(self) -> Iterable[Tensor]:
        """Blocks of rows only, one row a sequence; each iteration is a walk."""
        return _Rows(self)


class _Rows:
    def __init__(self, table: RowTable) -> None:
        self.table = table

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.table:
            yield batch.by_sequence()


@dataclass
class ProjectedRun(SolvedRun):
    """A run whose training gradients go through a compressor (``pyinf.store.compress``).

    What the compressor learns comes from the data that was fitted on, or from the training set that is scored where
    ``fit`` was not called; it is kept for later calls. Not resumable (a store's build is).
    """

    certifies = False
    compressor: Compressor | None = None
    table: RowTable | None = None
    _fitted: tuple[Any, ...] = ()

    def fresh(self) -> Compressor:
        """A compressor with the run's options, not prepared."""
        assert self.method.compressor is not None
        cls = REGISTRY[self.method.compressor]
        return cls({name: self.options[name] for name in cls.defaults})

    @property
    def damped(self) -> bool:
        """Whether the scores depend on the damping."""
        return self.fresh().damped

    @property
    def splits(self) -> bool:
        """Whether a score is a sum over tokens and over layers."""
        fresh = self.fresh()
        return fresh.linear and fresh.layered and fresh.normalise == "none"

    def rig(self, plan: Plan) -> Rig:
        """What passes take."""
        return Rig(self.model, self.selection, self.task, self.groups, plan.batch_size, plan.token_budget)

    def fit(
        self, data: PreparedExamples, plan: Plan, state: Path | None, keep: bool, interval: float = 60.0
    ) -> Factors:
        """The factors that the compressor needs; nothing captured is kept."""
        return super().fit(data, plan, state, False, interval)

    # -- the compressor ------------------------------------------------------------------------------------------------

    def prepared(
        self, data: PreparedExamples, factors: Factors | None, plan: Plan, damping: float | None = None
    ) -> Compressor:
        """A compressor that makes rows, not yet finished."""
        compressor = self.fresh()
        free = max(1 << 28, plan.memory_budget - sum(plan.memory.values()))
        context = self.rig(plan).context(
            compressor,
            data,
            factors=factors,
            seed=self.seed,
            damping=self.damping[0] if damping is None else damping,
            damping_mode=self.damping[1],
            fisher=self.fisher,
            memory_budget=free,
        )
        compressor.prepare(context)
        return compressor

    def fit_rows(
        self, data: PreparedExamples, factors: Factors | None, plan: Plan, damping: float | None = None
    ) -> Compressor:
        """Prepare, make the rows of ``data`` and finish; at once where that was done before."""
        damping = self.damping[0] if damping is None else damping
        early = self.fresh().early_damping
        key = (content_of(data), damping if early else None)
        if self.compressor is not None and self._fitted[:2] == key and self._fitted[2] is factors:
            return self.compressor
        started = time.perf_counter()
        compressor = self.prepared(data, factors, plan, damping)
        self._add_time("projection", started)
        started = time.perf_counter()
        rig = self.rig(plan)
        free = max(0, plan.memory_budget - sum(plan.memory.values()))
        self.table = RowTable(
            RowPass(rig, compressor, data, rig.batches(data), stage="rows"), self.options["format"], free
        )
        compressor.finish(self.table.rows)
        self._add_time("rows", started)
        self.compressor, self._fitted = compressor, (*key, factors)
        return compressor

    def query_rows(
        self, queries: PreparedExamples, plan: Plan, compressor: Compressor, loss: str = "measurement"
    ) -> Tensor:
        """``[Q, width]``, not preconditioned; zeros for queries that measure nothing."""
        rig = self.rig(plan)
        started = time.perf_counter()
        out: Tensor | None = None
        for batch in RowPass(rig, compressor, queries, rig.batches(queries, None, loss), loss, stage="query rows"):
            if out is None:
                out = batch.rows.new_zeros(len(queries), batch.rows.shape[1])
            out[batch.indices] = batch.rows
        self._add_time("queries", started)
        if out is None:
            out = torch.zeros(
                len(queries), row_width(compressor.sections), dtype=compressor.dtype, device=compressor.device
            )
        return out

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
        """Scores of every damping, ``[D·Q, …]``, and facts about the rows."""
        self._check(request)
        names = self.selection.names
        sinks = _Sinks(request, len(queries) * len(request.dampings), train, names, None, self._score_dtype())
        source = self.fit_data if self.fit_data is not None else train
        dampings = list(request.dampings)
        early = self.fresh().early_damping
        for first, group in enumerate([[d] for d in dampings]) if early else [(0, dampings)]:
            compressor = self.fit_rows(source, factors, plan, group[0])
            raw = self.query_rows(queries, plan, compressor)
            compressor.see_queries(raw)
            self._score_rows(compressor, raw, group, first, train, request, plan, sinks)
        facts = self.facts()
        facts["train_without_labels"] = len(train) - len(train.scored)
        facts["queries_without_labels"] = len(queries) - len(queries.scored) if self.task.measures_labels else 0
        return sinks.result(), facts

    def _check(self, request: ScoreRequest) -> None:
        if request.query_rank is not None or request.query_basis is not None:
            raise ConfigError(f"method '{self.method.name}' compresses gradients itself; leave query_rank out")
        fresh = self.fresh()
        if request.granularity == "token" and (not fresh.linear or fresh.normalise != "none"):
            raise ConfigError(
                f"method '{self.method.name}' (normalise={fresh.normalise}) has no scores per token; "
                "use granularity='sequence', or an unnormalised linear method"
            )
        if request.per_module and not fresh.layered:
            hint = "; joint=False has them" if "joint" in self.options else ""
            raise ConfigError(
                f"method '{self.method.name}' projects all layers together and has no scores by module{hint}"
            )

    def _score_rows(
        self,
        compressor: Compressor,
        raw: Tensor,
        dampings: list[float],
        first: int,
        train: PreparedExamples,
        request: ScoreRequest,
        plan: Plan,
        sinks: _Sinks,
    ) -> None:
        started = time.perf_counter()
        preconditioned = [compressor.query_rows(raw, damping) for damping in dampings]
        ran: set[int] = set()
        count = raw.shape[0]
        for batch in self._train_rows(compressor, train, plan, request.granularity == "token"):
            for place, (damping, Y) in enumerate(zip(dampings, preconditioned, strict=True)):
                norms = None
                if compressor.normalise != "none":
                    norms = compressor.row_norms(batch.rows, damping)
                rows = list(range((first + place) * count, (first + place + 1) * count))
                parts = by_layer(compressor.sections) if request.per_module else {"": compressor.sections}
                for name, sections in parts.items():
                    values = _scores(Y, batch.rows, compressor.sections, sections)
                    if norms is not None:
                        values = values / torch.where(norms > 0, norms, torch.ones_like(norms))
                    check_finite(values, batch.indices)
                    sinks.put(name, rows, batch.indices, values, batch.offsets)
            ran.update(batch.indices)
        if request.topk is not None:  # sequences without labels score 0
            rest = [i for i in range(len(train)) if i not in ran]
            for place in range(len(dampings)) if rest else ():
                rows = list(range((first + place) * count, (first + place + 1) * count))
                sinks.put("", rows, rest, torch.zeros(count, len(rest)), None)
        self._add_time("scores", started)

    def _train_rows(
        self, compressor: Compressor, train: PreparedExamples, plan: Plan, per_token: bool
    ) -> Iterable[RowBatch]:
        if not per_token and self.table is not None and content_of(train) == self._fitted[0]:
            return self.table
        rig = self.rig(plan)
        rows = RowPass(rig, compressor, train, rig.batches(train), per_token=per_token, stage="training rows")
        return RowTable(rows, "float32" if per_token else self.options["format"], 0)

    def facts(self) -> dict[str, Any]:
        """What the rows are: for the scores' ``meta``."""
        compressor = self.compressor
        assert compressor is not None and self.table is not None
        format = self.options["format"]
        return {
            "bytes_per_example": row_bytes(compressor.sections, format),
            "format": format,
            "row_width": row_width(compressor.sections),
            "rows": "in memory" if self.table.held is not None else "made anew at each walk",
            "projection": compressor.settings()["options"],
            "normalise": compressor.normalise,
        }

    # -- self-influence ------------------------------------------------------------------------------------------------

    def self_score(
        self, train: PreparedExamples, factors: Factors | None, dampings: dict[str, float], plan: Plan
    ) -> Tensor:
        """The score of every training example on itself, ``[N]``; 1 under a cosine of two like rows."""
        fresh = self.fresh()
        out = torch.zeros(len(train), dtype=torch.float64)
        rig = self.rig(plan)
        if fresh.normalise == "both" and not fresh.one_sided:
            out[[i for batch in rig.batches(train) for i in batch]] = 1.0
            return out.to(self._score_dtype())
        source = self.fit_data if self.fit_data is not None else train
        compressor = self.fit_rows(source, factors, plan)
        started = time.perf_counter()
        for batch in self._train_rows(compressor, train, plan, False):
            raw = batch.rows
            if compressor.one_sided:
                own = RowPass(rig, compressor, train, [batch.indices], "train", "measurement", stage="query rows")
                raw = next(iter(own)).rows
            elif self.options["format"] != "float32":
                own = RowPass(rig, compressor, train, [batch.indices], stage="query rows")
                raw = next(iter(own)).rows  # a query's row is not quantised
            Y = compressor.query_rows(raw)
            values = _diagonal(Y, batch.rows, compressor.sections)
            if compressor.normalise != "none":
                norms = compressor.row_norms(batch.rows)
                values = values / torch.where(norms > 0, norms, torch.ones_like(norms))
            check_finite(values.unsqueeze(0), batch.indices)
            out[batch.indices] = values.double().cpu()
        self._add_time("self-influence", started)
        return out.to(self._score_dtype())

    def refined(self, tol: float) -> Any:
        """Not here: nothing is solved."""
        raise ConfigError(f"method '{self.method.name}' solves no system to a tolerance; use ekfac_cg, or no tol=")


def by_layer(sections: list[Section]) -> dict[str, list[Section]]:
    """Sections by the layer they belong to: of every checkpoint."""
    out: dict[str, list[Section]] = {}
    for section in sections:
        name = section.name.partition("@")[0]
        if name:
            out.setdefault(name, []).append(section)
    return out


def _scores(Y: Tensor, rows: Tensor, every: list[Section], sections: list[Section]) -> Tensor:
    """:func:`section_scores` of some of the sections."""
    if sections is every:
        return section_scores(Y, rows, every)
    total: Tensor | None = None
    start = 0
    for section in every:
        if section in sections:
            q, r = Y[:, start : start + section.query_width], rows[:, section.offset : section.stop]
            part = section_scores(q, r, [replace(section, offset=0)])
            total = part if total is None else total + part
        start += section.query_width
    assert total is not None
    return total


def _diagonal(Y: Tensor, rows: Tensor, sections: list[Section]) -> Tensor:
    """The score of every query row on the row of the same number, ``[B]``."""
    if all(section.kind == "vector" for section in sections):
        return (Y * rows).sum(1)
    return torch.stack([section_scores(Y[i : i + 1], rows[i : i + 1], sections)[0, 0] for i in range(len(rows))])
