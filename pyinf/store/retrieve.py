"""The best of a store for every query: a scan of compressed rows, then exact scores of the best few.

Stage one ranks all rows by their compressed scores (and, where a prefilter is given, only the rows that it lets
through). Stage two computes the exact scores of the first ``cut`` rows of every query and orders them by these. What
the first stage leaves out is lost, so the share of the exact top k that it finds is measured, on a random sample of
sequences with exact scores (:mod:`pyinf.store.recall`), and stands in the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyinf import progress
from pyinf.errors import ConfigError, NonFiniteError
from pyinf.store.prefilter import Prefilter
from pyinf.store.recall import Calibration, RecallEstimate, draw_sample, sample_size
from pyinf.store.scan import scan
from pyinf.store.sections import section_scores

__all__ = ["Rescorer", "Retrieved", "query_store"]

_GROWTH = 1.5  # of the candidates, from one look at the recall to the next
_SHARES = {"rescore": 0.05, "recall": 0.1}  # of the store that is sampled at most, unless asked for
_LEAST_SAMPLE = 256
_BLOCK = 4096  # rows of a prefilter read at a time


class Rescorer(Protocol):
    """Exact scores. ``queries`` and ``rows`` are positions among the queries and the rows of the store.

    Attributes:
        together: all queries must come in one call (a solver that shares its work between them).
        costs: operations for one sequence's gradient, and for one query's product with it.
        certificates: by query, after a call; empty where none were made.
    """

    together: bool
    costs: tuple[float, float]
    certificates: dict[int, Any]

    def __call__(self, queries: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Float ``[len(queries), len(rows)]``."""


@dataclass
class Retrieved:
    """What was found, ``Q`` queries by ``k``.

    Attributes:
        values: scores ``[Q, k]``, descending: exact ones after a second stage, else those of the store.
        ids: the examples' numbers in the training set, int64 ``[Q, k]`` (``[Q, k, 2]``, example and position, for a
            store of tokens). rows: their rows in the store ``[Q, k]``.
        stage1: the store's scores of the same rows ``[Q, k]``.
        documents: what the store keeps beside the rows: ``documents[q][j]``, a mapping or None.
        recall: share of the exact top k that the first stage finds, estimated; None: not measured.
        prefilter: the same of the prefilter alone; None without one.
        certificate: as in :class:`pyinf.Scores`, one entry a query, or None.
        cost: rows scanned, candidates a query and their share, sequences run again, sample, seconds by stage.
    """

    values: Tensor
    ids: Tensor
    rows: Tensor
    stage1: Tensor
    documents: list[list[Any]]
    recall: RecallEstimate | None = None
    prefilter: RecallEstimate | None = None
    certificate: list[Any] | None = None
    cost: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "values": self.values.tolist(),
            "ids": self.ids.tolist(),
            "rows": self.rows.tolist(),
            "stage1": self.stage1.tolist(),
            "documents": self.documents,
            "recall": None if self.recall is None else self.recall.to_dict(),
            "prefilter": None if self.prefilter is None else self.prefilter.to_dict(),
            "certificate": self.certificate,
            "cost": self.cost,
        }


# ------------------------------------------------------------------------------------------ first stage


class _Filtered:
    """The rows that a prefilter lets through, ``keep`` of them a query, by their compressed scores."""

    def __init__(self, store: Any, queries: Tensor, prefilter: Prefilter, keep: int, normalise: str) -> None:
        self.prefilter, self.keep = prefilter, keep
        self.allowed = prefilter.top(keep).sort(dim=1).values  # [Q, keep]
        union = self.allowed.unique()
        self.scanned = len(union)
        scores = torch.empty(len(queries), len(union))
        for start in range(0, len(union), _BLOCK):
            part = union[start : start + _BLOCK]
            found = section_scores(queries.float(), store.take(part), store.sections)
            if normalise == "norm":
                norms = torch.as_tensor(store.norms[part.numpy()])
                found = torch.where(norms > 0, found / norms.clamp(min=1e-30), torch.zeros_like(found))
            scores[:, start : start + len(part)] = found
        own = scores.gather(1, torch.searchsorted(union, self.allowed))
        order = own.argsort(dim=1, descending=True, stable=True)
        self.values, self.rows = own.gather(1, order), self.allowed.gather(1, order)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Scores and rows ``[Q, k]``, best first."""
        if k > self.keep:
            raise ConfigError(f"the prefilter keeps {self.keep} rows a query and {k} candidates are wanted; keep more")
        return self.values[:, :k], self.rows[:, :k]

    def lets_through(self, sample: Tensor) -> Tensor:
        """Which of the sampled rows, bool ``[Q, n]``."""
        place = torch.searchsorted(self.allowed, sample.expand(len(self.allowed), -1).contiguous())
        return self.allowed.gather(1, place.clamp(max=self.keep - 1)) == sample


# ------------------------------------------------------------------------------------------ second stage


class _Exact:
    """Exact scores as far as they were computed, and what that took."""

    def __init__(self, rescorer: Rescorer, queries: int) -> None:
        self.rescorer, self.queries = rescorer, queries
        self.rows = torch.empty(0, dtype=torch.int64)  # ascending; with the scores of all queries
        self.table = torch.empty(queries, 0)
        self.run, self.strategies = 0, set()

    def of_all(self, rows: Tensor) -> Tensor:
        """Of every query with these rows, ascending: ``[Q, n]``."""
        missing = rows[~torch.isin(rows, self.rows)]
        if len(missing):
            found = self._call(list(range(self.queries)), missing)
            both = torch.cat([self.rows, missing])
            table = torch.cat([self.table.to(found.dtype), found], dim=1)
            order = both.argsort()
            self.rows, self.table = both[order], table[:, order]
        return self.table[:, torch.searchsorted(self.rows, rows)]

    def of(self, rows: Tensor) -> Tensor:
        """Of every query with its own candidates, ``[Q, c]``.

        Together: every candidate of any query is run once and meets all queries, ``U(g + Qs)`` operations for ``U``
        sequences with ``g`` a gradient and ``s`` a product with it. Alone: the candidates of a query are run for that
        query, ``Qc(g + s)``. The cheaper one is taken; a solver that shares its work between queries takes them
        together always.
        """
        new = ~torch.isin(rows, self.rows)
        union = rows[new].unique()
        gradient, product = self.rescorer.costs
        together = len(union) * (gradient + self.queries * product)
        alone = int(new.sum()) * (gradient + product)
        if self.rescorer.together or self.queries == 1 or together <= alone:
            self.of_all(union)
            self.strategies.add("together")
            return self.table.gather(1, torch.searchsorted(self.rows, rows.contiguous()))
        self.strategies.add("alone")
        out = torch.zeros(rows.shape, dtype=torch.float64)
        for q in range(self.queries):
            if bool((~new[q]).any()):
                out[q, ~new[q]] = self.table[q, torch.searchsorted(self.rows, rows[q, ~new[q]])].double()
            if bool(new[q].any()):
                out[q, new[q]] = self._call([q], rows[q, new[q]])[0].double()
        return out if self.table.dtype == torch.float64 else out.float()

    def _call(self, queries: list[int], rows: Tensor) -> Tensor:
        found = self.rescorer(queries, rows.tolist()).detach().cpu()
        if found.shape != (len(queries), len(rows)):
            raise ConfigError(f"the rescorer gave scores {tuple(found.shape)} for {len(queries)} × {len(rows)} pairs")
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError("an exact score is not finite; raise the damping or use a wider dtype")
        self.run += len(rows)
        return found


# ------------------------------------------------------------------------------------------ the query


def query_store(
    store: Any,
    queries: Tensor,
    k: int,
    rescorer: Rescorer | None = None,
    rescore: float | int | None = None,
    recall: float | None = None,
    sample: int | None = None,
    prefilter: Prefilter | None = None,
    keep: float | int = 0.1,
    recall_by: str = "low",
    most: float | int = 0.1,
    level: float = 0.95,
    normalise: str = "none",
    coarse: str | None = None,
    documents: bool = True,
    seed: int = 0,
) -> Retrieved:
    """The ``k`` strongest proponents of every query among the rows of a store.

    Without a rescorer: the scan alone. With one, exactly one of ``rescore`` and ``recall`` says how many rows a query
    get exact scores, and the result states the recall that this has.

    Args:
        queries: rows as the store's compressor makes them, float ``[Q, query_width]``.
        rescorer: exact scores of any queries and rows.
        rescore: candidates a query: a share below 1, or a number; at least k of them are taken.
        recall: take candidates until their recall is at least this, from k on, half as many again each time: until the
            lower end of the interval reaches it, or, with ``recall_by="value"``, the estimate.
        sample: sequences with exact scores to measure the recall on. None: as many as make a lower end of 0.97 (of
            ``recall`` and half of what it leaves to 1) possible, at least 256, at most 5 % (10 %) of the store;
            0: not measured, and the result says so.
        prefilter: rows to leave out before the scan. Its recall is measured as well; that cannot be turned off.
        keep: rows that the prefilter lets through: a share below 1, or a number; at least k.
        most: the most candidates that ``recall`` may take: a share below 1, or a number.
        level: confidence of the intervals.
        normalise, coarse: as in :func:`pyinf.store.scan.scan`; not ``coarse`` with a prefilter, which scans few rows.
        documents: read what the store keeps beside the rows.

    Raises:
        ConfigError: options that do not fit; a recall that was not reached.
        NonFiniteError: a score is not finite.
    """
    count, asked = int(store.count), len(queries)
    _check(store, asked, k, rescorer, rescore, recall, sample, prefilter)
    if coarse is not None and prefilter is not None:
        raise ConfigError("coarse scans all rows and a prefilter leaves most of them out; give one of the two")
    if recall_by not in ("low", "value"):
        raise ConfigError(f"recall_by is {recall_by!r}; use 'low' (the interval's lower end) or 'value' (the estimate)")
    started = time.perf_counter()
    filtered = None
    if prefilter is not None:
        if prefilter.count != count:
            raise ConfigError(f"the prefilter ranks {prefilter.count} rows, the store has {count}; give it those rows")
        kept = max(k, _number(keep, count, "keep"))
        filtered = _Filtered(store, queries, prefilter, kept, normalise)
    limit = count if filtered is None else filtered.keep
    cut = k
    if rescore is not None:
        cut = max(k, _number(rescore, count, "rescore"))
    elif recall is not None:
        cut = min(limit, max(k, _number(most, count, "most")))
    with progress.stage("scan of the store", count, "rows") as running:
        if filtered is not None:
            stage1, rows = filtered.top(cut)
        else:
            stage1, rows = scan(store, queries, cut, normalise=normalise, coarse=coarse)
        stage1, rows = stage1.cpu(), rows.cpu()
        running.advance(count)
    seconds = {"scan": time.perf_counter() - started}
    cost: dict[str, Any] = {"queries": asked, "rows": count}
    cost["scanned"] = count if filtered is None else filtered.scanned
    if rescorer is None:
        return _result(store, stage1, rows, stage1, documents, {**cost, "seconds": seconds})

    known, measured, drawn = _Exact(rescorer, asked), None, torch.empty(0, dtype=torch.int64)
    size = _sample_size(sample, count, asked, k, recall, level)
    if size:
        started = time.perf_counter()
        drawn = draw_sample(count, size, seed)
        with progress.stage("exact scores of the sample", size) as running:
            measured = Calibration(known.of_all(drawn), drawn, count, k, level)
            running.advance(size)
        seconds["sample"] = time.perf_counter() - started
    started = time.perf_counter()
    estimate = None
    with progress.stage("exact scores of the candidates", asked * cut, "pairs") as running:
        values, steps = torch.empty(asked, 0), _steps(k, cut) if recall is not None else [cut]
        for step in steps:
            new = known.of(rows[:, values.shape[1] : step])
            values = torch.cat([values.to(new.dtype), new], dim=1)
            running.advance(new.numel())
            if measured is not None:
                estimate = measured.of(rows[:, :step], values)
            if recall is not None and getattr(estimate, recall_by) >= recall:
                break
        else:
            if recall is not None:
                assert estimate is not None and measured is not None
                raise ConfigError(_too_low(estimate, recall, recall_by, size, count))
    seconds["rescoring"] = time.perf_counter() - started
    taken = values.shape[1]
    cost |= {
        "candidates": taken,
        "share": taken / count,
        "sequences_run": known.run,
        "sample": size,
        "strategy": "+".join(sorted(known.strategies)),
        "recall_measured": estimate is not None,
        "seconds": seconds,
    }
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    picked = rows[:, :taken].gather(1, order)
    result = _result(store, values.gather(1, order), picked, stage1[:, :taken].gather(1, order), documents, cost)
    result.recall = estimate
    if filtered is not None:
        assert measured is not None
        result.prefilter = measured.of(rows[:, :taken], values, filtered.lets_through(drawn).numpy())
    certificates = [rescorer.certificates.get(q) for q in range(asked)]
    result.certificate = certificates if any(c is not None for c in certificates) else None
    return result


def _steps(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(min(last, math.ceil(found[-1] * _GROWTH)))
    return found


def _too_low(estimate: RecallEstimate, recall: float, by: str, size: int, count: int) -> str:
    text = f"with {estimate.cut} candidates a query {estimate} does not reach {recall:g}; raise most="
    if by == "low" and estimate.value >= recall:
        text = f"{text}, take a larger sample (now {size} of {count}), or go by the estimate (recall_by='value')"
    return text


def _check(
    store: Any,
    asked: int,
    k: int,
    rescorer: Rescorer | None,
    rescore: float | int | None,
    recall: float | None,
    sample: int | None,
    prefilter: Prefilter | None,
) -> None:
    if asked < 1:
        raise ConfigError("there is no query; give at least one")
    if not 1 <= k <= store.count:
        raise ConfigError(f"k is {k}; the store has {store.count} rows, so k can be 1 to {store.count}")
    if rescorer is None:
        for name, value in (("rescore", rescore), ("recall", recall)):
            if value is not None:
                raise ConfigError(
                    f"{name}={value} needs exact scores: give the model, its factors and its training data"
                )
        if prefilter is not None:
            raise ConfigError(
                "a prefilter is never used without measuring what it loses, which needs exact scores: give the model, "
                "its factors and its training data, or leave the prefilter out"
            )
        return
    if store.spec.granularity != "sequence":
        raise ConfigError("exact scores are of whole sequences and this store has a row a token: query it without them")
    if (rescore is None) == (recall is None):
        raise ConfigError("give rescore (how many candidates) or recall (how much of the top k to find), one of them")
    if recall is not None and not 0 < recall < 1:
        raise ConfigError(f"recall is {recall}; it must be between 0 and 1")
    if sample == 0 and (recall is not None or prefilter is not None):
        raise ConfigError("recall= and a prefilter need a sample with exact scores; sample must not be 0")


def _number(value: float | int, count: int, name: str) -> int:
    """A share below 1 of ``count``, rounded down, or a number."""
    if isinstance(value, bool) or not value > 0 or (value >= 1 and value != int(value)):
        raise ConfigError(f"{name} is {value}; give a share below 1 or a number of rows")
    return min(count, max(1, math.floor(value * count + 1e-9)) if value < 1 else int(value))


def _sample_size(sample: int | None, count: int, queries: int, k: int, recall: float | None, level: float) -> int:
    if sample is None:
        wanted = 0.97 if recall is None else (1 + recall) / 2
        share = _SHARES["rescore" if recall is None else "recall"]
        most = max(min(_LEAST_SAMPLE, count), math.ceil(share * count))
        return min(most, max(min(_LEAST_SAMPLE, count), sample_size(count, queries, k, wanted, level)))
    if not 0 <= sample <= count:
        raise ConfigError(f"a sample of {sample} cannot be drawn from {count} rows; give 0 to {count}")
    return sample


def _result(
    store: Any, values: Tensor, rows: Tensor, stage1: Tensor, documents: bool, cost: dict[str, Any]
) -> Retrieved:
    ids = torch.as_tensor(store.ids[rows.numpy()]).to(torch.int64)
    kept = [[store.document(int(row)) for row in line] for line in rows] if documents else [[] for _ in rows]
    return Retrieved(values, ids, rows, stage1, kept, cost=cost)
