"""Metrics against retraining: each against its definition written out, on banks whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pyinf.errors import DataError
from pyinf.evaluate import counterfactual as cf
from pyinf.evaluate.statistics import spearman


@pytest.fixture
def world():
    """A linear world: outcome = constant − counts · effect, so that scores = effect are perfect."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(4, 30))
    counts = (rng.random((25, 30)) < 0.5).astype(int)
    outcomes = 10 - counts @ effect.T
    return effect, counts, outcomes, rng


def test_lds_is_one_where_scores_are_the_effects_and_minus_one_reversed(world):
    effect, counts, outcomes, _ = world
    found = cf.lds(effect, counts, outcomes)
    assert found.value == pytest.approx(1) and np.allclose(found.per_query, 1) and found.retrainings == 25
    assert cf.lds(-effect, counts, outcomes).value == pytest.approx(-1)


def test_lds_by_its_definition(world):
    effect, counts, outcomes, rng = world
    scores = effect + rng.normal(size=effect.shape) * 2
    expected = []
    for q in range(4):
        predicted = [sum(scores[q, i] for i in range(30) if counts[j, i]) for j in range(25)]
        expected.append(float(spearman(np.array(predicted), -outcomes[:, q])))
    found = cf.lds(scores, counts, outcomes, resamples=300)
    assert np.allclose(found.per_query, expected, atol=1e-12)
    assert found.value == pytest.approx(np.mean(expected)) and 0.3 < found.value < 0.95
    for estimate in (found.subsets, found.queries, found.both):
        assert estimate.low < found.value < estimate.high


def test_the_difference_of_two_lds_has_its_own_narrower_interval(world):
    effect, counts, outcomes, rng = world
    shared = rng.normal(size=effect.shape) * 2
    first, second = effect + shared, effect + shared + rng.normal(size=effect.shape) * 0.3
    a, b = (cf.lds(s, counts, outcomes, resamples=400) for s in (first, second))
    found = cf.lds_difference(first, second, counts, outcomes, resamples=400)
    assert found.value == pytest.approx(a.value - b.value)
    assert np.allclose(found.per_query, a.per_query - b.per_query, atol=1e-12)
    width = found.both.high - found.both.low
    assert 0 < width < 0.6 * min(a.both.high - a.both.low, b.both.high - b.both.low)
    assert found.both.low <= found.value <= found.both.high
    same = cf.lds_difference(first, first, counts, outcomes, resamples=50)
    assert (same.value, same.both.low, same.both.high) == (0, 0, 0)
    with pytest.raises(DataError, match="29 training examples"):
        cf.lds_difference(first, second[:, 1:], counts, outcomes)


def test_interval_over_subsets_is_the_bootstrap_written_out(world):
    effect, counts, outcomes, rng = world
    scores = effect + rng.normal(size=effect.shape) * 2
    found = cf.lds(scores, counts, outcomes, resamples=50, seed=9)
    from pyinf.evaluate.statistics import resample_counts

    samples, predicted = [], scores @ counts.T
    for c in resample_counts(25, 50, 9).astype(int):
        rows = np.repeat(np.arange(25), c)
        samples.append(spearman(predicted[:, rows], -outcomes[rows].T).mean())
    assert found.subsets.low == pytest.approx(np.quantile(samples, 0.025), abs=1e-12)
    assert found.subsets.high == pytest.approx(np.quantile(samples, 0.975), abs=1e-12)


def test_removals_and_kept_sets_are_the_same_question(world):
    effect, _, _, rng = world
    removed = np.stack([rng.permutation(30)[:3] for _ in range(20)])
    counts = np.ones((20, 30), dtype=int)
    for row, gone in zip(counts, removed, strict=True):
        row[gone] = 0
    outcomes = np.stack([effect[:, gone].sum(1) for gone in removed])
    assert cf.lds(effect, counts, outcomes).value == pytest.approx(1)


def test_shapes_that_do_not_fit_are_named(world):
    effect, counts, outcomes, _ = world
    with pytest.raises(DataError, match="29 training examples, the bank has 30"):
        cf.lds(effect[:, 1:], counts, outcomes)
    with pytest.raises(DataError, match="3 queries, the bank measured 4"):
        cf.lds(effect[1:], counts, outcomes)
    with pytest.raises(DataError, match="24 retrainings, outcomes 25"):
        cf.lds(effect, counts[1:], outcomes)
    with pytest.raises(DataError, match="2 retrainings cannot be correlated"):
        cf.lds(effect, counts[:2], outcomes[:2])


def test_noise_ceiling_predicts_what_the_true_effects_reach():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(400, 6))
    first, second = (truth + rng.normal(size=truth.shape) * 0.7 for _ in range(2))
    found = cf.noise_ceiling(first, second)
    reached = spearman(truth.T, first.T).mean()
    assert found.ceiling == pytest.approx(reached, abs=0.03) and found.agreement < reached
    same = cf.noise_ceiling(first, first)
    assert same.ceiling == pytest.approx(1) and same.largest_difference == 0 and same.subsets == 400


def test_query_loss_difference():
    full = np.array([[1.0, 2.0, 3.0], [1.2, 2.2, 3.2]])  # two full trainings
    outcomes, control = np.array([2.1, 3.1, 5.1]), np.array([[1.2, 2.2, 3.2], [1.2, 2.2, 3.2]])
    found = cf.query_loss_difference(outcomes, full, control)
    assert np.allclose(found.per_query, [1.0, 1.0, 2.0])
    assert found.removed.value == pytest.approx(4 / 3) and found.control.value == pytest.approx(0.1)
    assert found.net.value == pytest.approx(4 / 3 - 0.1)
    assert cf.query_loss_difference(outcomes, full).net is None
    with pytest.raises(DataError, match="3 queries, the full training measured 2"):
        cf.query_loss_difference(outcomes, full[0, :2])


def test_brittleness():
    margin = np.array([1.0, 2.0, -1.0, 0.5])  # the third is wrong from the start
    found = cf.brittleness(margin, {5: [-1, -1, -1, 1.0], 1: [0.5, 1, -1, -0.1]})
    assert (
        found.flipped == {1: pytest.approx(1 / 3), 5: pytest.approx(2 / 3)} and found.half == 5 and found.queries == 3
    )
    assert cf.brittleness(margin, {1: margin}).half is None
    with pytest.raises(DataError, match="none can flip"):
        cf.brittleness([-1.0], {1: [-1.0]})


def test_leave_one_out_correlation(world):
    effect, _, _, rng = world
    removed = rng.permutation(30)[:12]
    full = rng.normal(size=4)
    outcomes = full + effect[:, removed].T ** 3  # monotone: ranks are kept, proportions are not
    found = cf.leave_one_out_correlation(effect, outcomes, full, removed)
    assert found["spearman"].value == pytest.approx(1) and 0.5 < found["pearson"].value < 0.999
    with pytest.raises(DataError, match="at least 3"):
        cf.leave_one_out_correlation(effect, outcomes[:2], full, removed[:2])


def test_group_effect_of_copies_has_slope_one_in_a_linear_world(world):
    effect, _, _, _ = world
    counts = np.ones((6, 30), dtype=int)
    for j, c in enumerate([0, 2, 4, 0, 2, 4]):
        counts[j, 5 * (j // 3) : 5 * (j // 3) + 5] = c
    full = np.zeros(4)
    outcomes = -(counts - 1) @ effect.T / 30
    found = cf.group_effect(effect, counts, outcomes, full)
    assert found["slope"] == pytest.approx(1) and found["pearson"] == pytest.approx(1)
    half = cf.group_effect(effect, counts, outcomes / 2, full)
    assert half["slope"] == pytest.approx(0.5) and half["spearman"] == pytest.approx(1)
