"""What share of the exact top k a first stage finds, estimated from a random sample with exact scores.

**What is estimated.** Query ``q`` has ``c`` candidates, the first by the first stage; ``T_q`` are its ``k`` best of all
``N`` sequences by exact score. The recall is the mean over the queries at hand, which are fixed, of
``|T_q ∩ candidates| / k``. It is the recall of the final list too: whatever of ``T_q`` is among the candidates comes
out on top once they have their exact scores.

**What is known.** The exact scores of all candidates, and those of ``n`` sequences drawn at random without
replacement, for every query. A sampled sequence that is no candidate and stands above the query's j-th best candidate
is one of ``μ_q(j)`` such sequences; each of these is in the sample with probability ``f = n_q/(N − c)``, ``n_q`` being
the sampled sequences that are no candidates. ``x_q(j)`` of them are seen. The j-th best candidate has the exact rank
``j + μ_q(j)``, so the number of candidates in the top k is the largest ``j`` with ``j + μ_q(j) ≤ k``.

**The estimator.** A query alone sees few misses or none, so ``μ_q`` leans on the mean over the queries,
``X(j) = mean_q x_q(j)/f``: the posterior mean under a gamma prior of that mean, whose shape ``a`` is as large as the
counts of different queries are alike (moments, a = 1 counting as two queries),

    μ̂_q(j) = x_q(j) + (1 − f) (a + x_q(j)) / (a/X(j) + f).

Its mean over the queries is ``X(j)`` again, and a sample of everything makes it exact. The estimate is
``mean_q j_q / k`` with ``j_q + μ̂_q(j_q) = k`` (between whole ``j`` by a straight line).

**The interval.** Seen misses are counts: the exact Poisson limits (Garwood 1936) of ``Σ_q x_q(j)`` bound ``X(j)``, and
the same equations solved with these bounds give an interval. One sequence may be missed by many queries at once, so the
count is divided by ``s = Σ_i y_i² / Σ_i y_i``, ``y_i`` the queries that miss sequence ``i`` (Kish's design effect).
Where few different sequences were missed ``s`` leans on the same ratio for the sequences that were found. A bootstrap
of the sampled sequences (2.4 standard errors) adds what differs between queries; the wider counts at each end. No miss
seen is no proof that there is none: the lower end is then ``1 − 3.7 (1 − f) s/(f Q k)`` at 95 %, so a small sample
gives a wide interval.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyinf.errors import ConfigError, DataError

__all__ = ["Calibration", "RecallEstimate", "draw_sample", "poisson_limits", "sample_size"]

_RESAMPLES, _WIDTH = 60, 2.4  # of the bootstrap, in standard errors: few sequences carry it, so its own error is large
_FEW = 8  # different sequences missed; below it their design effect is not to be relied on alone


@dataclass(frozen=True)
class RecallEstimate:
    """Recall of a first stage: the mean over the queries of the share of their exact top ``k`` among the candidates.

    Attributes:
        value: the estimate. low, high: its interval of confidence ``level``.
        cut: candidates a query.
        sample: sequences with exact scores, drawn at random.
        missed: pairs of query and sampled sequence in the top k that the candidates lack.
        clustering: ``s`` of the module: how many queries share a missed sequence, about.
    """

    k: int
    cut: int
    value: float
    low: float
    high: float
    level: float
    sample: int
    missed: int
    clustering: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"recall@{self.k} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def draw_sample(count: int, size: int, seed: int = 0) -> Tensor:
    """``size`` of ``count`` rows at random without replacement, ascending: int64 ``[size]``.

    Raises:
        ConfigError: not between 1 and ``count``.
    """
    if not 1 <= size <= count:
        raise ConfigError(f"a sample of {size} cannot be drawn from {count} sequences; give 1 to {count}")
    generator = torch.Generator().manual_seed(seed + 0x5EC)
    return torch.randperm(count, generator=generator)[:size].sort().values


def sample_size(count: int, queries: int, k: int, recall: float = 0.95, level: float = 0.95) -> int:
    """Sequences to sample so that the lower end reaches ``recall`` where no miss is seen and no two queries share one.

    ``−ln((1 − level)/2) · N / (Q k (1 − recall))``, at most ``N``.
    """
    if recall >= 1:
        return count
    return min(count, math.ceil(-math.log((1 - level) / 2) * count / (queries * k * (1 - recall))))


class Calibration:
    """Recall of any candidates of these queries, from a random sample with exact scores; see the module.

    Args:
        exact: exact scores of the sampled rows, float ``[Q, n]``.
        sample: the sampled rows, int64 ``[n]``, no two alike.
        count: rows in all, ``N``.
        k: of recall@k.
        level: of the interval.

    Raises:
        ConfigError: k or level out of range.
        DataError: shapes that do not fit, scores that are not finite.
    """

    def __init__(
        self, exact: Tensor | np.ndarray, sample: Tensor | np.ndarray, count: int, k: int, level: float = 0.95
    ) -> None:
        self.exact, self.sample = _numbers(exact, "the sample"), np.asarray(sample, dtype=np.int64)
        if self.sample.shape != self.exact.shape[1:] or len(np.unique(self.sample)) != len(self.sample):
            raise DataError(f"{self.exact.shape[1]} exact scores a query for {len(self.sample)} different sampled rows")
        if len(self.sample) and not 0 <= self.sample.min() <= self.sample.max() < count:
            raise DataError(f"a sampled row is not among the {count} rows")
        if not 1 <= k <= count:
            raise ConfigError(f"k is {k}; recall@k needs k from 1 to {count}")
        if not 0 < level < 1:
            raise ConfigError(f"level is {level}; it must be between 0 and 1")
        self.count, self.k, self.level = count, k, level

    def of(
        self, rows: Tensor | np.ndarray, exact: Tensor | np.ndarray, allowed: np.ndarray | None = None
    ) -> RecallEstimate:
        """The recall of ``rows`` ``[Q, c]``, ``c ≥ k`` candidates a query whose exact scores are ``exact`` ``[Q, c]``.

        Args:
            allowed: bool ``[Q, n]``, the sampled rows that a prefilter lets through. The recall of that prefilter is
                estimated then; the candidates only tell where the top k ends.

        Raises:
            DataError: shapes that do not fit, fewer candidates than k, scores that are not finite.
        """
        values, candidates = _numbers(exact, "the candidates"), np.asarray(rows, dtype=np.int64)
        if values.shape != candidates.shape or len(values) != len(self.exact):
            raise DataError(f"candidates {candidates.shape} and their exact scores {values.shape} do not fit")
        queries, cut = candidates.shape
        k, n = self.k, len(self.sample)
        if cut < k:
            raise DataError(f"{cut} candidates a query are fewer than k = {k}")
        if cut == self.count:
            return RecallEstimate(k, cut, 1.0, 1.0, 1.0, self.level, n, 0, 1.0)
        above, fraction = self._places(candidates, values)
        seen = np.stack([np.cumsum(np.bincount(a + 1, minlength=k + 2)[: k + 1]) for a in above]).astype(float)
        inside = _solve(seen, fraction, k, 1.0, 0.0)
        missed = self._missed(above, fraction, inside)
        every = int(missed.sum())
        if allowed is not None:
            missed &= ~np.asarray(allowed)
        s = self._clustering(missed, candidates, values)
        if n == self.count:
            value = 1 - float((k - inside).mean()) / k if allowed is None else 1 - missed.sum() / (queries * k)
            return RecallEstimate(k, cut, value, value, value, self.level, n, int(missed.sum()), s)
        nothing = poisson_limits(0, self.level)[1] * s / (queries * max(float(fraction.mean()), 1e-12))
        if allowed is not None:
            found = int(missed.sum())
            unit = float((k - inside).mean()) / max(every, 1)
            least, most = (s * limit * unit for limit in poisson_limits(found / s, self.level))
            ends = found * unit, least, most if found else nothing
        else:
            counts = seen.sum(axis=0)
            limits = np.array([poisson_limits(c / s, self.level) for c in counts]).T * s / np.maximum(counts, 1e-300)
            low = _solve(seen, fraction, k, np.where(counts > 0, limits[1], 0.0), nothing)
            high = _solve(seen, fraction, k, np.where(counts > 0, limits[0], 0.0), 0.0)
            error = _WIDTH * self._error(above, fraction)
            ends = tuple(float((k - j).mean()) for j in (inside, high, low))
            ends = ends[0], max(0.0, min(ends[1], ends[0] - error)), max(ends[2], ends[0] + error)
        value, high_end, low_end = (1 - min(1.0, m / k) for m in ends)
        return RecallEstimate(k, cut, value, low_end, high_end, self.level, n, int(missed.sum()), s)

    def _places(self, candidates: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every query and sampled sequence, how many candidates stand above it, ``[Q, n]`` (k where that is k or
        more, or where it is a candidate itself); and the share ``f_q`` of the other sequences that was sampled.
        """
        above = np.full(self.exact.shape, self.k, dtype=np.int64)
        fraction = np.empty(len(candidates))
        for q in range(len(candidates)):
            outside = ~np.isin(self.sample, candidates[q])
            fraction[q] = outside.sum() / (self.count - candidates.shape[1])
            ordered = np.sort(values[q])
            place = len(ordered) - np.searchsorted(ordered, self.exact[q], side="left")  # equal ones count as above
            above[q, outside] = np.minimum(place[outside], self.k)
        return above, fraction

    def _missed(self, above: np.ndarray, fraction: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Which sampled sequences are taken for misses in the top k, bool ``[Q, n]``: those above the last candidate in
        it, and of those next to it as many as the sampled share of the misses.
        """
        out = above < np.floor(inside)[:, None]
        for q in range(len(above)):
            near = np.flatnonzero((above[q] == math.floor(inside[q])) & (above[q] < self.k))
            wanted = round(fraction[q] * (self.k - inside[q])) - int(out[q].sum())
            if wanted > 0 and len(near):
                out[q, near[np.argsort(-self.exact[q, near], kind="stable")[:wanted]]] = True
        return out

    def _error(self, above: np.ndarray, fraction: np.ndarray) -> float:
        """Standard error of the mean ``j_q`` over samples of sequences, by a bootstrap of the sequences."""
        query, sequence = np.nonzero(above < self.k)
        if not len(query):
            return 0.0
        place, n = above[query, sequence] + 1, above.shape[1]
        used, index = np.unique(sequence, return_inverse=True)
        rng = np.random.default_rng(0)
        counts = rng.multinomial(n, [*np.full(len(used), 1 / n), max(0.0, 1 - len(used) / n)], size=_RESAMPLES)
        found = []
        for own in counts:
            seen = np.zeros((len(above), self.k + 1))
            np.add.at(seen, (query, place), own[index])
            found.append(_solve(np.cumsum(seen, axis=1), fraction, self.k, 1.0, 0.0).mean())
        return float(np.std(found, ddof=1)) * math.sqrt(1 - n / self.count)

    def _clustering(self, missed: np.ndarray, candidates: np.ndarray, values: np.ndarray) -> float:
        """``Σy²/Σy`` of the missed sequences, or, where they are few, between that and the one of those found."""
        best = np.take_along_axis(candidates, np.argsort(-values, axis=1, kind="stable")[:, : self.k], axis=1)
        among = np.unique(best, return_counts=True)[1].astype(float)
        found = float((among**2).sum() / among.sum())
        y = missed.sum(axis=0).astype(float)
        different = int((y > 0).sum())
        own = float((y**2).sum() / y.sum()) if different else 0.0
        weight = min(1.0, different / _FEW)
        return max(1.0, weight * own + (1 - weight) * max(own, found))


def _solve(seen: np.ndarray, fraction: np.ndarray, k: int, ratio: np.ndarray | float, nothing: float) -> np.ndarray:
    """``j_q`` with ``j_q + μ̂_q(j_q) = k``, ``[Q]``; the unseen part of ``μ̂`` is multiplied by ``ratio`` ``[k + 1]``,
    and is ``nothing`` where no query has seen a miss.
    """
    f = fraction[:, None]
    mean = (seen / np.maximum(f, 1e-300)).mean(axis=0, keepdims=True)
    shape = _shape(seen)
    hidden = (1 - f) * (shape + seen) / (shape / np.maximum(mean, 1e-300) + f) * ratio
    hidden = np.where(mean > 0, hidden, (1 - f) * nothing)
    rank = np.maximum.accumulate(np.arange(k + 1) + seen + hidden, axis=1)
    last = (rank <= k).sum(axis=1) - 1
    found = np.maximum(last, 0).astype(float)
    inner = np.flatnonzero((last >= 0) & (last < k) & (fraction < 1))
    j = last[inner]
    found[inner] += (k - rank[inner, j]) / (rank[inner, j + 1] - rank[inner, j])
    return found


def _shape(seen: np.ndarray) -> np.ndarray:
    """Shape of the prior from the spread of the counts between queries, ``[1, k + 1]``: ``m²/(var − m)``, at most 10;
    1 (an exponential prior) counts as much as two queries.
    """
    queries, mean = len(seen), seen.mean(axis=0, keepdims=True)
    if queries == 1:
        return np.ones_like(mean)
    spread = np.maximum(seen.var(axis=0, ddof=1, keepdims=True) - mean, 0.0)
    square = np.maximum(mean**2, 1e-300)
    inverse = ((queries - 1) * spread / square + 2.0) / (queries + 1)
    return 1 / np.maximum(inverse, 0.1)


def _numbers(values: Tensor | np.ndarray, what: str) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"exact scores of {what} have shape {array.shape}; they must be queries × sequences")
    if not np.isfinite(array).all():
        raise DataError(f"an exact score of {what} is not finite; raise the damping or use a wider dtype")
    return array


def poisson_limits(count: float, level: float = 0.95) -> tuple[float, float]:
    """Exact limits of a Poisson mean, also for fractional counts: quantiles of Gamma(x) and Gamma(x + 1).

    Source: Garwood 1936.
    """
    tail = (1 - level) / 2
    return (0.0 if count <= 0 else _gamma_quantile(tail, count)), _gamma_quantile(1 - tail, count + 1)


@functools.lru_cache(maxsize=4096)
def _gamma_quantile(p: float, shape: float) -> float:
    low, high = 0.0, shape + 12 * math.sqrt(shape) + 40
    a = torch.tensor(shape, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.special.gammainc(a, torch.tensor(middle, dtype=torch.float64))) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2
