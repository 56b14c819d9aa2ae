"""Do scores predict what retraining does? Metrics against a bank of retrained models.

Throughout: ``scores`` is ``[Q, N]`` with the sign of :class:`pyinf.Scores` (positive = a proponent: without the example
the query's loss rises), ``counts`` ``[M, N]`` says how often each example stood in each of ``M`` training sets, and
``outcomes`` ``[M, Q]`` is the measurement (a loss: lower is better) of each query after each training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyinf.errors import DataError
from pyinf.evaluate.statistics import (
    Estimate,
    bootstrap_mean,
    interval,
    matrix,
    pearson,
    resample_counts,
    spearman,
    weighted_pearson,
    weighted_ranks,
)

__all__ = [
    "LDS",
    "Brittleness",
    "NoiseCeiling",
    "QueryLossDifference",
    "brittleness",
    "group_effect",
    "lds",
    "lds_difference",
    "leave_one_out_correlation",
    "noise_ceiling",
    "query_loss_difference",
]


@dataclass(frozen=True)
class LDS:
    """Linear datamodeling score: ``per_query`` ``[Q]`` and their mean with intervals over resampled subsets, over
    resampled queries, and over both at once.
    """

    per_query: np.ndarray
    subsets: Estimate
    queries: Estimate
    both: Estimate
    retrainings: int

    @property
    def value(self) -> float:
        """Mean over queries."""
        return self.both.value

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        parts = {name: getattr(self, name).to_dict() for name in ("subsets", "queries", "both")}
        return {
            "value": self.value,
            "interval": parts,
            "retrainings": self.retrainings,
            "per_query": [float(v) for v in self.per_query],
        }


def _checked(scores: Any, counts: Any, outcomes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    s, c, f = matrix(scores, "scores"), matrix(counts, "counts"), matrix(outcomes, "outcomes")
    if c.shape[1] != s.shape[1]:
        raise DataError(
            f"scores cover {s.shape[1]} training examples, the bank has {c.shape[1]}; score the bank's own training set"
        )
    if f.shape[1] != s.shape[0]:
        raise DataError(f"scores cover {s.shape[0]} queries, the bank measured {f.shape[1]}; score the bank's queries")
    if f.shape[0] != c.shape[0]:
        raise DataError(f"counts describe {c.shape[0]} retrainings, outcomes {f.shape[0]}; they must be the same ones")
    return s, c, f


def lds(scores: Any, counts: Any, outcomes: Any, resamples: int = 2000, seed: int = 0) -> LDS:
    """Linear datamodeling score, ``LDS_q = Spearman_j( Σ_i counts[j, i] τ(q, i), −f_q(θ(S_j)) )``, and its mean over q.

    With random half subsets it is the usual "LDS at 50 %"; with 1 % removals (``counts`` 0 at what was removed) the one
    of leave-some-out boards, where ``Σ_{i ∈ S_j} τ`` differs from ``−Σ_{removed} τ`` by a constant of the query.

    Args:
        scores: ``[Q, N]``. counts: ``[M, N]``. outcomes: ``[M, Q]``, a loss; average over seeds first, if several.
        resamples: bootstrap samples of each interval (95 %, percentiles).

    Raises:
        DataError: shapes that do not fit each other, fewer than 3 retrainings, NaN.

    Source: Park et al. 2023 (TRAK), arXiv 2303.14186, definition 2.3.
    """
    s, c, f = _checked(scores, counts, outcomes)
    drawn, chosen = _resamples(len(c), len(s), resamples, seed)
    per_query, sampled = _correlations(s, c, f, drawn)
    return _with_intervals(per_query, sampled, chosen, len(c))


def lds_difference(scores: Any, other: Any, counts: Any, outcomes: Any, resamples: int = 2000, seed: int = 0) -> LDS:
    """LDS of ``scores`` minus LDS of ``other`` on the same bank, with intervals of the **difference**.

    Both are correlated on the same resamples of subsets and queries. What all methods find hard or easy drops out, so
    that two methods whose own intervals overlap widely may still be told apart.

    Args and errors as in :func:`lds`; the fields of the result are those of the difference.
    """
    s, c, f = _checked(scores, counts, outcomes)
    o, _, _ = _checked(other, counts, outcomes)
    drawn, chosen = _resamples(len(c), len(s), resamples, seed)
    per_query, sampled = _correlations(s, c, f, drawn)
    per_query_other, sampled_other = _correlations(o, c, f, drawn)
    return _with_intervals(per_query - per_query_other, sampled - sampled_other, chosen, len(c))


def _resamples(subsets: int, queries: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if subsets < 3:
        raise DataError(f"{subsets} retrainings cannot be correlated; build a bank of at least 3 (100 is usual)")
    return resample_counts(subsets, resamples, seed), resample_counts(queries, resamples, seed + 1)


def _correlations(s: np.ndarray, c: np.ndarray, f: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman of prediction and truth a query: of the subsets as they are ``[Q]``, and of each resample ``[R, Q]``."""
    predicted, truth = s @ c.T, -f.T  # [Q, M]
    sampled = [
        weighted_pearson(weighted_ranks(p, drawn), weighted_ranks(t, drawn), drawn)
        for p, t in zip(predicted, truth, strict=True)
    ]
    return spearman(predicted, truth), np.stack(sampled, axis=1)


def _with_intervals(per_query: np.ndarray, sampled: np.ndarray, chosen: np.ndarray, retrainings: int) -> LDS:
    value, queries = float(per_query.mean()), len(per_query)
    return LDS(
        per_query,
        interval(value, sampled.mean(1)),
        interval(value, chosen @ per_query / queries),
        interval(value, (chosen * sampled).sum(1) / queries),
        retrainings,
    )


@dataclass(frozen=True)
class NoiseCeiling:
    """How far retraining agrees with itself: the same subsets trained with two seeds (or twice with one).

    ``agreement`` is the mean over queries of ``Spearman_j(f_q(S_j; seed a), f_q(S_j; seed b))``. ``ceiling`` is its
    square root: what scores that predict the expected outcome exactly would reach against one retraining each.
    ``largest_difference`` is ``max |f(S; a) − f(S; b)|`` (0 for a deterministic repeat), ``spread`` the mean standard
    deviation of ``f_q`` over subsets, for comparison.
    """

    agreement: float
    ceiling: float
    largest_difference: float
    spread: float
    subsets: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dict(self.__dict__)


def noise_ceiling(first: Any, second: Any) -> NoiseCeiling:
    """Agreement of two trainings of the same subsets: ``first`` and ``second`` are ``[M, Q]``.

    Classical test theory: with two single measurements of reliability ρ, an exact prediction of the expected outcome
    correlates ``√ρ`` with either (Spearman 1904).
    """
    a, b = matrix(first, "first"), matrix(second, "second")
    if a.shape != b.shape:
        raise DataError(f"two trainings of the same subsets must have equal shapes, not {a.shape} and {b.shape}")
    if len(a) < 3:
        raise DataError(f"{len(a)} subsets trained twice cannot be correlated; train at least 3 twice")
    agreement = float(spearman(a.T, b.T).mean())
    return NoiseCeiling(
        agreement, math.sqrt(max(agreement, 0.0)), float(np.abs(a - b).max()), float(a.std(0).mean()), len(a)
    )


@dataclass(frozen=True)
class QueryLossDifference:
    """Rise of the query's loss after its own top examples were removed and the model retrained.

    ``removed`` is the mean of ``f_q(θ(without q's top k)) − f_q(θ(all))``, ``control`` the same after a random removal
    of as many, ``net`` the difference of the two; each with an interval over queries.
    """

    per_query: np.ndarray
    removed: Estimate
    control: Estimate | None
    net: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        parts = {"removed": self.removed, "control": self.control, "net": self.net}
        found: dict[str, Any] = {name: None if e is None else e.to_dict() for name, e in parts.items()}
        return {**found, "per_query": [float(v) for v in self.per_query]}


def query_loss_difference(
    outcomes: Any, full: Any, control: Any = None, resamples: int = 2000, seed: int = 0
) -> QueryLossDifference:
    """Query loss difference (proponent removal).

    Args:
        outcomes: ``[Q]``; entry q: the loss of query q after retraining without its own top k.
        full: ``[Q]``, the losses after training on everything, same seed; or ``[R, Q]``, averaged over R trainings.
        control: ``[M, Q]`` losses after M random removals of k; their mean rise is what removal costs by itself.

    Source: the removal test of Grosse et al. 2023 and of the bergson board (there on the top 1 %).
    """
    f = matrix(outcomes, "outcomes", 1)
    base = matrix(full, "full", 2).mean(0) if np.ndim(full) == 2 else matrix(full, "full", 1)
    if base.shape != f.shape:
        raise DataError(f"outcomes are of {len(f)} queries, the full training measured {len(base)}; give the same ones")
    rise = f - base
    removed = bootstrap_mean(rise, resamples, seed)
    if control is None:
        return QueryLossDifference(rise, removed, None, None)
    random = matrix(control, "control", 2)
    if random.shape[1] != len(f):
        raise DataError(f"control measured {random.shape[1]} queries, outcomes are of {len(f)}; give the same ones")
    cost = random.mean(0) - base
    net = bootstrap_mean(rise - cost, resamples, seed)
    return QueryLossDifference(rise, removed, bootstrap_mean(cost, resamples, seed), net)


@dataclass(frozen=True)
class Brittleness:
    """``flipped[k]``: share of the queries answered rightly at first whose answer is lost once their top k are removed;
    ``half`` is the smallest k at which at least half of them are, or None.
    """

    flipped: dict[int, float]
    half: int | None
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"flipped": {str(k): v for k, v in self.flipped.items()}, "half": self.half, "queries": self.queries}


def brittleness(margin: Any, margins: Mapping[int, Any]) -> Brittleness:
    """Brittleness (subset flip): how many of a query's top examples must go before the model changes its answer.

    Args:
        margin: ``[Q]``, positive where the fully trained model answers rightly (log-odds of the right answer against
            the best other one); queries it fails are left out.
        margins: ``{k: [Q]}``, the same after retraining without each query's own top k.

    Raises:
        DataError: no query is right at first.

    Source: Ilyas et al. 2022, arXiv 2202.00622, section 4.2; Park et al. 2023.
    """
    start = matrix(margin, "margin", 1)
    right = start > 0
    if not right.any():
        raise DataError("no query has a positive margin after full training, so none can flip; choose other queries")
    flipped = {}
    for k in sorted(margins):
        after = matrix(margins[k], f"margins[{k}]", 1)
        if after.shape != start.shape:
            raise DataError(f"margins[{k}] are of {len(after)} queries, margin of {len(start)}; give the same ones")
        flipped[int(k)] = float((after[right] <= 0).mean())
    half = next((k for k, share in flipped.items() if share >= 0.5), None)
    return Brittleness(flipped, half, int(right.sum()))


def leave_one_out_correlation(
    scores: Any, outcomes: Any, full: Any, removed: Any, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Correlation of ``τ(q, i)`` with ``f_q(θ(without i)) − f_q(θ(all))`` over the i left out, mean over queries.

    Args:
        scores: ``[Q, N]``. outcomes: ``[M, Q]``. full: ``[Q]`` or ``[R, Q]``. removed: ``[M]``, which example each
            retraining left out.

    Returns:
        ``{"pearson", "spearman"}``: :class:`Estimate` over queries; ``"per_query"``: Spearman ``[Q]``.
    """
    s, f = matrix(scores, "scores"), matrix(outcomes, "outcomes")
    base = matrix(full, "full", 2).mean(0) if np.ndim(full) == 2 else matrix(full, "full", 1)
    index = np.asarray(removed, dtype=np.int64)
    if f.shape != (len(index), len(s)) or base.shape != (len(s),):
        raise DataError(
            f"outcomes have shape {f.shape} and full {base.shape}; for {len(index)} examples left out and {len(s)} "
            f"queries they must be {(len(index), len(s))} and {(len(s),)}"
        )
    if len(index) < 3 or index.min() < 0 or index.max() >= s.shape[1]:
        raise DataError(f"removed must name at least 3 of the {s.shape[1]} training examples; it has {len(index)}")
    truth, own = (f - base).T, s[:, index]
    ranks = spearman(own, truth)
    return {
        "pearson": bootstrap_mean(pearson(own, truth), resamples, seed),
        "spearman": bootstrap_mean(ranks, resamples, seed),
        "per_query": ranks,
    }


def group_effect(scores: Any, counts: Any, outcomes: Any, full: Any) -> dict[str, float]:
    """Copies or removals of groups: predicted against measured change of the loss, over all (retraining, query) pairs.

    Predicted: ``−Σ_i (counts[j, i] − 1) τ(q, i) / N``; measured: ``f_q(θ_j) − f_q(θ(all))``. The scale ``1/N`` is that
    of a training loss that is a mean over N examples, τ being from a curvature that is a mean over examples.

    Returns:
        ``pearson``, ``spearman``, and ``slope`` of the measured change on the predicted one (1 = calibrated; below 1 =
        the effect is smaller than linear).
    """
    s, c, f = _checked(scores, counts, outcomes)
    base = matrix(full, "full", 2).mean(0) if np.ndim(full) == 2 else matrix(full, "full", 1)
    predicted = -(s @ (c - 1).T).T.reshape(-1) / s.shape[1]
    measured = (f - base).reshape(-1)
    variance = float(((predicted - predicted.mean()) ** 2).sum())
    if variance == 0:
        raise DataError("the predicted changes are all equal; the groups or the scores carry no information")
    slope = float(((predicted - predicted.mean()) * (measured - measured.mean())).sum() / variance)
    return {
        "pearson": float(pearson(predicted, measured)),
        "spearman": float(spearman(predicted, measured)),
        "slope": slope,
    }
