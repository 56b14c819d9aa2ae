"""Retrieval metrics: hand-computed values, ties by averaging over all orders, scikit-learn's published examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pyinf.errors import ConfigError, DataError
from pyinf.evaluate import retrieval as r

SCORES = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]])
RELEVANT = np.array([[True, False, True, False, False]])


def test_by_hand():
    assert r.accuracy(SCORES, RELEVANT) == 1 and r.accuracy(-SCORES, RELEVANT) == 0
    assert r.cover(SCORES, RELEVANT) == 0.5  # c = 2 relevant ones: first yes, second no
    assert r.cover(SCORES, RELEVANT, c=3) == pytest.approx(2 / 3)
    assert r.recall_at(SCORES, RELEVANT, 1) == 0.5 and r.recall_at(SCORES, RELEVANT, 3) == 1
    assert r.auroc(SCORES, RELEVANT) == pytest.approx(5 / 6)  # 6 pairs, one the wrong way round
    assert r.auprc(SCORES, RELEVANT) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert r.mean_reciprocal_rank(SCORES, RELEVANT) == 1
    assert r.mean_reciprocal_rank(-SCORES, RELEVANT) == pytest.approx(1 / 3)


def test_published_examples_of_scikit_learn():
    # roc_auc_score and average_precision_score document y = [0, 0, 1, 1], scores = [0.1, 0.4, 0.35, 0.8].
    scores, relevant = np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([[False, False, True, True]])
    assert r.auroc(scores, relevant) == pytest.approx(0.75)
    assert r.auprc(scores, relevant) == pytest.approx(0.83, abs=0.005)


def test_cover_with_the_right_c_can_reach_one_and_the_papers_cannot():
    relevant = np.zeros((1, 250), dtype=bool)
    relevant[0, :20] = True
    perfect = relevant.astype(float) + np.random.default_rng(0).random((1, 250)) * 0.1
    assert r.cover(perfect, relevant) == 1
    assert r.cover(perfect, relevant, c="classes", classes=2) == pytest.approx(20 / 125)
    with pytest.raises(ConfigError, match="needs the number of classes"):
        r.cover(perfect, relevant, c="classes")
    with pytest.raises(ConfigError, match="from 1 to 250"):
        r.cover(perfect, relevant, c=0)


@pytest.mark.parametrize("metric", ["accuracy", "cover", "recall"])
def test_ties_are_the_mean_over_all_orders(metric):
    scores = np.array([2.0, 1.0, 1.0, 1.0, 0.0])
    relevant = np.array([False, True, False, True, True])
    k = {"accuracy": 1, "cover": 3, "recall": 2}[metric]
    found = {
        "accuracy": lambda: r.accuracy(scores[None], relevant[None]),
        "cover": lambda: r.cover(scores[None], relevant[None], c=3),
        "recall": lambda: r.recall_at(scores[None], relevant[None], 2),
    }[metric]()
    hits = []
    for order in itertools.permutations(range(5)):
        ranked = sorted(order, key=lambda i: -scores[i])  # stable: ties in the order of the permutation
        hits.append(sum(relevant[i] for i in ranked[:k]))
    share = {"accuracy": 1, "cover": 3, "recall": 3}[metric]
    assert found[0] == pytest.approx(np.mean(hits) / share)


def test_scores_that_say_nothing_are_worth_chance_wherever_the_relevant_ones_stand():
    relevant = np.zeros((2, 100), dtype=bool)
    relevant[0, :20] = relevant[1, 80:] = True
    flat = np.zeros((2, 100))
    for metric in (r.accuracy, r.cover, r.auprc):
        assert np.allclose(metric(flat, relevant), 0.2)
    assert np.allclose(r.auroc(flat, relevant), 0.5)
    assert np.allclose(r.recall_at(flat, relevant, 10), 0.1)
    assert np.allclose(r.mean_reciprocal_rank(flat, relevant), 1 / 81)


def test_auroc_and_auprc_by_their_definitions_with_ties():
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 6, (3, 40)).astype(float)
    relevant = rng.random((3, 40)) < 0.3
    for q in range(3):
        p, n = scores[q][relevant[q]], scores[q][~relevant[q]]
        pairs = [(a > b) + 0.5 * (a == b) for a in p for b in n]
        assert r.auroc(scores, relevant)[q] == pytest.approx(np.mean(pairs))
        area, before = 0.0, 0.0
        for threshold in sorted(set(scores[q]), reverse=True):
            chosen = scores[q] >= threshold
            recall = relevant[q][chosen].sum() / relevant[q].sum()
            area += (recall - before) * relevant[q][chosen].mean()
            before = recall
        assert r.auprc(scores, relevant)[q] == pytest.approx(area)


def test_ndcg():
    reference = np.array([[5.0, 4, 3, 2, 1, 0]])
    assert r.ndcg(reference, reference, 3) == pytest.approx(1)
    assert r.ndcg(np.array([[3.0, 4, 5, 2, 1, 0]]), reference, 3) == pytest.approx(1)  # the same three, another order
    assert r.ndcg(-reference, reference, 3) == 0
    # only the reference's third is found, at rank 2
    found = r.ndcg(np.array([[0.0, 0.0, 4, 5, 3, 2]]), reference, 3)
    assert found == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3) + 0.5))
    flat = r.ndcg(np.zeros((1, 6)), reference, 3)
    assert flat == pytest.approx(0.5)  # every place at its mean discount: 3 of 6
    with pytest.raises(ConfigError, match="from 1 to 6"):
        r.ndcg(reference, reference)
    with pytest.raises(DataError, match="same queries and examples"):
        r.ndcg(reference, reference[:, 1:], 2)


def test_labels_and_bad_input():
    assert np.array_equal(r.same_label([1, 2], [2, 1, 2]), [[False, True, False], [True, False, True]])
    with pytest.raises(DataError, match="must be boolean"):
        r.accuracy(SCORES, RELEVANT.astype(int))
    with pytest.raises(DataError, match="query 0 has no relevant"):
        r.accuracy(SCORES, np.zeros((1, 5), dtype=bool))
    with pytest.raises(DataError, match="AUROC is not defined"):
        r.auroc(SCORES, np.ones((1, 5), dtype=bool))
    with pytest.raises(DataError, match="both must be queries"):
        r.auroc(SCORES, RELEVANT[:, 1:])
