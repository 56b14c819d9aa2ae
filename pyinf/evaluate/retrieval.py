"""Do scores find what they should? Metrics against labels, a known relevant set, or a reference ranking.

``scores`` is ``[Q, N]``, larger = more relevant; ``relevant`` is a boolean ``[Q, N]`` (see :func:`same_label`). Equal
scores are never ordered by their place in the file: Acc, Cover and recall take the expectation over a random order of
the tied ones, AUROC counts a tie as one half, AUPRC moves through tied groups in one step, NDCG averages the discount
within a group, and MRR puts tied irrelevant examples first (the pessimistic order).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyinf.errors import ConfigError, DataError
from pyinf.evaluate.statistics import average_ranks, matrix

__all__ = [
    "accuracy",
    "auprc",
    "auroc",
    "cover",
    "mean_reciprocal_rank",
    "ndcg",
    "recall_at",
    "same_label",
]


def same_label(query_labels: Any, train_labels: Any) -> np.ndarray:
    """``relevant[q, i]``: query q and training example i carry the same label."""
    q, t = np.asarray(query_labels), np.asarray(train_labels)
    if q.ndim != 1 or t.ndim != 1:
        raise DataError(f"labels must be one a query and one an example, not arrays of shape {q.shape} and {t.shape}")
    return q[:, None] == t[None, :]


def _checked(scores: Any, relevant: Any) -> tuple[np.ndarray, np.ndarray]:
    s, r = matrix(scores, "scores"), np.asarray(relevant)
    if r.dtype != bool:
        raise DataError(f"relevant must be boolean, not {r.dtype}; compare labels with same_label()")
    if r.shape != s.shape:
        raise DataError(f"scores have shape {s.shape}, relevant {r.shape}; both must be queries × training examples")
    lacking = np.flatnonzero(~r.any(1))
    if len(lacking):
        raise DataError(f"query {lacking[0]} has no relevant training example; leave such queries out")
    return s, r


def _hits(scores: np.ndarray, relevant: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Expected number of relevant examples among the top ``k[q]`` of each row, over random orders of tied scores."""
    ordered = -np.sort(-scores, axis=1)
    edge = np.take_along_axis(ordered, (k - 1)[:, None], axis=1)
    above, tied = scores > edge, scores == edge
    room = k - above.sum(1)
    return (above & relevant).sum(1) + room * (tied & relevant).sum(1) / tied.sum(1)


def accuracy(scores: Any, relevant: Any) -> np.ndarray:
    """Acc: whether the top-ranked training example is relevant, ``[Q]`` (expected value under ties); report the mean.

    Source: "Do Influence Functions Work on Large Language Models?", arXiv 2409.19998, section 4.
    """
    s, r = _checked(scores, relevant)
    return _hits(s, r, np.ones(len(s), dtype=np.int64))


def cover(scores: Any, relevant: Any, c: int | str = "relevant", classes: int | None = None) -> np.ndarray:
    """Cover: share of the top c that is relevant, ``[Q]``.

    Args:
        c: ``"relevant"``, the number of relevant examples of each query, so that 1 can be reached; an integer; or
            ``"classes"``, ``N // classes`` for all queries, as the paper's code has it. With sets of unequal size that
            last c caps the metric below 1 (20 harmful examples of 250: c = 125, cap 0.16).

    Raises:
        ConfigError: c outside 1 … N.

    Source: arXiv 2409.19998, section 4.
    """
    s, r = _checked(scores, relevant)
    n = s.shape[1]
    if c == "relevant":
        k = r.sum(1)
    elif c == "classes":
        if classes is None or classes < 1 or n // classes < 1:
            raise ConfigError(f"c='classes' needs the number of classes, from 1 to {n}; it is {classes}")
        k = np.full(len(s), n // classes)
    elif isinstance(c, (int, np.integer)) and 1 <= c <= n:
        k = np.full(len(s), int(c))
    else:
        raise ConfigError(f"c is {c!r}; use 'relevant', 'classes' or a number from 1 to {n}")
    return _hits(s, r, k) / k


def recall_at(scores: Any, relevant: Any, k: int) -> np.ndarray:
    """Recall at k: share of the relevant examples that is among the top k, ``[Q]``."""
    s, r = _checked(scores, relevant)
    if not 1 <= k <= s.shape[1]:
        raise ConfigError(f"k is {k}; it must be from 1 to {s.shape[1]}")
    return _hits(s, r, np.full(len(s), k)) / r.sum(1)


def auroc(scores: Any, relevant: Any) -> np.ndarray:
    """Area under the ROC curve, ``P(relevant > irrelevant) + ½ P(equal)``, ``[Q]``; from the rank sum (Mann–Whitney).

    Raises:
        DataError: a query to which everything is relevant.
    """
    s, r = _checked(scores, relevant)
    positive, negative = r.sum(1), (~r).sum(1)
    if (negative == 0).any():
        query = int(np.argmax(negative == 0))
        raise DataError(f"to query {query} every training example is relevant; AUROC is not defined: leave it out")
    ranks = (average_ranks(s) * r).sum(1)
    return (ranks - positive * (positive + 1) / 2) / (positive * negative)


def auprc(scores: Any, relevant: Any) -> np.ndarray:
    """Average precision, ``Σ_n (R_n − R_{n−1}) P_n`` over distinct thresholds, ``[Q]``: no interpolation."""
    s, r = _checked(scores, relevant)
    found = np.empty(len(s))
    for q in range(len(s)):
        order = np.argsort(-s[q], kind="stable")
        ordered, hits = s[q][order], np.cumsum(r[q][order])
        last = np.append(ordered[1:] != ordered[:-1], True)  # the end of each group of equal scores
        precision, recall = hits[last] / (np.flatnonzero(last) + 1), hits[last] / hits[-1]
        found[q] = (np.diff(recall, prepend=0.0) * precision).sum()
    return found


def mean_reciprocal_rank(scores: Any, relevant: Any) -> np.ndarray:
    """1 / rank of the best-ranked relevant example, ``[Q]``; tied irrelevant examples rank before it."""
    s, r = _checked(scores, relevant)
    best = np.where(r, s, -np.inf).max(1)
    ahead = ((s >= best[:, None]) & ~r).sum(1)
    return 1.0 / (1 + ahead)


def ndcg(scores: Any, reference: Any, k: int = 20) -> np.ndarray:
    """NDCG@k against a reference ranking, ``[Q]``: gain 1 for the reference's own top k, discount ``1/log2(1 + rank)``.

    Fidelity of approximate scores to exact ones: 1 when the first k are the reference's first k, in any order.

    Args:
        scores: ``[Q, N]``. reference: ``[Q, N]``, the scores taken for exact; its k-th and next values should differ.

    Source: Järvelin & Kekäläinen 2002; with binary gain as in the work on compressed EK-FAC stores.
    """
    s, ref = matrix(scores, "scores"), matrix(reference, "reference")
    if s.shape != ref.shape:
        raise DataError(f"scores have shape {s.shape}, the reference {ref.shape}; score the same queries and examples")
    n = s.shape[1]
    if not 1 <= k <= n:
        raise ConfigError(f"k is {k}; it must be from 1 to {n}")
    discount = np.zeros(n)
    discount[:k] = 1 / np.log2(np.arange(2, k + 2))
    found = np.empty(len(s))
    for q in range(len(s)):
        gain = np.zeros(n)
        gain[np.argsort(-ref[q], kind="stable")[:k]] = 1
        order = np.argsort(-s[q], kind="stable")
        ordered = s[q][order]
        group = np.cumsum(np.append(False, ordered[1:] != ordered[:-1]))
        mean_discount = np.bincount(group, weights=discount) / np.bincount(group)
        found[q] = (gain[order] * mean_discount[group]).sum() / discount.sum()
    return found
