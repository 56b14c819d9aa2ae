"""Which training sets to retrain on: seeded plans of retrainings of every kind."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyinf.errors import ConfigError, DataError
from pyinf.evaluate.statistics import matrix

__all__ = [
    "Retraining",
    "full",
    "group_copies",
    "half_subsets",
    "leave_one_out",
    "random_removals",
    "top_k_removals",
]


@dataclass(frozen=True)
class Retraining:
    """One training to do: ``counts[i]`` is how often example i stands in the training set (0 = left out).

    ``seed`` is the training's own (order of the data, and whatever else the protocol draws); ``repeat`` tells two runs
    of the same subset and seed apart, which should not differ; ``about`` is kept in the entry (the query or the method
    that a removal is for).
    """

    kind: str
    counts: np.ndarray
    seed: int = 0
    repeat: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of its entry: a hash of counts, seed and repeat."""
        digest = hashlib.sha256(np.ascontiguousarray(self.counts, dtype=np.int64).tobytes())
        digest.update(f"|{self.seed}|{self.repeat}".encode())
        return digest.hexdigest()[:20]


def _number(value: int, low: int, high: int, name: str) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
    return int(value)


def _without(n: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    counts = np.ones(n, dtype=np.int64)
    counts[np.asarray(indices, dtype=np.int64)] = 0
    return counts


def full(n: int, seeds: Sequence[int] = (0,), repeats: int = 1) -> list[Retraining]:
    """Training on all ``n`` examples, once a seed and repeat."""
    return [Retraining("full", np.ones(n, dtype=np.int64), int(s), r) for s in seeds for r in range(repeats)]


def half_subsets(
    n: int, number: int = 100, fraction: float = 0.5, draw_seed: int = 0, seed: int = 0, repeats: int = 1
) -> list[Retraining]:
    """``number`` random subsets of ``fraction`` of the examples, without replacement: the bank of the usual LDS.

    The j-th subset depends on ``draw_seed`` and j only, so that a larger bank contains the smaller one. ``seed`` is the
    seed of the trainings; the same call with another ``seed`` trains the same subsets again (noise ceiling).
    """
    _number(number, 1, 10**6, "number")
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction is {fraction}; a subset must be a share between 0 and 1 of the training set")
    size = max(1, round(n * fraction))
    plan = []
    for j in range(number):
        kept = np.random.default_rng([draw_seed, 1, j]).permutation(n)[:size]
        counts = np.zeros(n, dtype=np.int64)
        counts[kept] = 1
        plan += [Retraining("half", counts, seed, r, {"draw": j}) for r in range(repeats)]
    return plan


def random_removals(
    n: int, number: int = 100, fraction: float = 0.01, draw_seed: int = 0, seed: int = 0, size: int | None = None
) -> list[Retraining]:
    """``number`` removals of ``size`` random examples (default: ``fraction`` of them, at least one).

    For LDS at 1 %, and the control of removal tests.
    """
    _number(number, 1, 10**6, "number")
    if size is None:
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction is {fraction}; it must be between 0 and 1")
        size = max(1, round(n * fraction))
    size = _number(size, 1, n - 1, "size")
    kind = "removal" if size == max(1, round(n * 0.01)) else f"removal-{size}"
    plan = []
    for j in range(number):
        gone = np.random.default_rng([draw_seed, 2, size, j]).permutation(n)[:size]
        plan.append(Retraining(kind, _without(n, gone), seed, 0, {"draw": j}))
    return plan


def leave_one_out(
    n: int, number: int | None = None, draw_seed: int = 0, seed: int = 0, indices: Sequence[int] | None = None
) -> list[Retraining]:
    """One retraining without each of ``indices`` (default: ``number`` random ones, or all)."""
    if indices is None:
        order = np.random.default_rng([draw_seed, 3]).permutation(n)
        indices = sorted(order[: n if number is None else _number(number, 1, n, "number")].tolist())
    plan = []
    for i in indices:
        if not 0 <= int(i) < n:
            raise DataError(f"example {i} cannot be left out of {n}; indices go from 0 to {n - 1}")
        plan.append(Retraining("leave-one-out", _without(n, [int(i)]), seed, 0, {"removed": int(i)}))
    return plan


def top_k_removals(
    scores: Any, k: int, method: str, queries: Sequence[int] | None = None, seed: int = 0
) -> list[Retraining]:
    """One retraining a query, without the ``k`` examples that ``scores`` ``[Q, N]`` rank first for it.

    Methods that agree on a query's top k share the retraining: the entry is found by the subset.
    """
    s = matrix(scores, f"scores of {method}")
    k = _number(k, 1, s.shape[1] - 1, "k")
    plan = []
    for q in range(len(s)) if queries is None else queries:
        top = np.argsort(-s[q], kind="stable")[:k]
        plan.append(Retraining(f"top-{k}", _without(s.shape[1], top), seed, 0, {"method": method, "query": int(q)}))
    return plan


def group_copies(n: int, groups: Sequence[Sequence[int]], copies: Sequence[int], seed: int = 0) -> list[Retraining]:
    """One retraining a group and number of copies: every example of the group stands that often (0 = removed)."""
    plan = []
    for number, group in enumerate(groups):
        index = np.asarray(group, dtype=np.int64)
        if index.size == 0 or index.min() < 0 or index.max() >= n:
            raise DataError(f"group {number} must name examples from 0 to {n - 1}, at least one")
        for c in copies:
            counts = np.ones(n, dtype=np.int64)
            counts[index] = _number(int(c), 0, 10**6, "copies")
            plan.append(Retraining("copies", counts, seed, 0, {"group": number, "copies": int(c)}))
    return plan
