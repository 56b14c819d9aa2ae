from __future__ import annotations

import numpy as np
import pytest
import torch

from pyinf.errors import ConfigError, DataError
from pyinf.store.recall import Calibration, draw_sample, poisson_limits, sample_size


def world(seed, count=3000, queries=12, k=40, cut=90, noise=0.2, shared=0.3, uneven=0.0):
    """Exact scores, the candidates of a noisy first stage, and the recall that these have."""
    rng = np.random.default_rng(seed)
    exact = shared * rng.standard_normal(count) + (1 - shared) * rng.standard_normal((queries, count))
    error = rng.standard_normal((queries, count)) + rng.standard_normal(count)
    scale = noise * exact.std() / 2**0.5 * np.exp(uneven * rng.standard_normal((queries, 1)))
    candidates = np.argsort(-(exact + scale * error), axis=1)[:, :cut]
    best = np.argsort(-exact, axis=1)[:, :k]
    true = np.mean([np.isin(b, c).mean() for b, c in zip(best, candidates, strict=True)])
    return exact, candidates, true


def estimate(exact, candidates, sample, k=40):
    calibration = Calibration(exact[:, sample], sample, exact.shape[1], k)
    return calibration.of(candidates, np.take_along_axis(exact, candidates, axis=1))


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("shared", "uneven"), [(0.3, 0.0), (0.7, 0.0), (0.3, 0.4)])
def test_the_interval_holds_the_truth(noise, shared, uneven):
    held, errors = 0, []
    for trial in range(20):
        exact, candidates, true = world(trial % 5, noise=noise, shared=shared, uneven=uneven)
        sample = np.sort(np.random.default_rng(100 + trial).choice(exact.shape[1], 300, replace=False))
        found = estimate(exact, candidates, sample)
        held += found.low - 1e-9 <= true <= found.high + 1e-9
        errors.append(found.value - true)
        assert found.low <= found.value <= found.high
    assert held >= 18, (held, np.mean(errors))
    assert abs(np.mean(errors)) < 0.04


def test_a_sample_of_everything_is_exact():
    for seed, noise in ((0, 0.2), (1, 1.0)):
        exact, candidates, true = world(seed, count=300, queries=5, cut=60, noise=noise)
        found = estimate(exact, candidates, np.arange(300))
        assert found.value == pytest.approx(true, abs=1e-12)
        assert found.low == found.high == found.value


def test_one_query_and_equal_scores():
    exact, candidates, true = world(3, queries=1, noise=0.6)
    sample = np.sort(np.random.default_rng(0).choice(3000, 1500, replace=False))
    found = estimate(exact, candidates, sample)
    assert found.low <= true <= found.high
    flat = Calibration(np.zeros((2, 10)), np.arange(10), 50, 5).of(np.arange(12).reshape(2, 6), np.zeros((2, 6)))
    assert flat.value == 1.0  # all scores are equal, so any five are a top five


def test_no_miss_seen_gives_a_wide_interval_where_the_sample_is_small():
    exact, candidates, _ = world(0, noise=0.0)
    widths = []
    for size in (30, 300, 1500):
        sample = np.sort(np.random.default_rng(1).choice(3000, size, replace=False))
        found = estimate(exact, candidates, sample)
        assert (found.value, found.high, found.missed) == (1.0, 1.0, 0)
        widths.append(1 - found.low)
    assert widths[0] > 0.5 > widths[1] > widths[2] > 0
    unseen = 1 - 1500 / 3000
    assert 1 - found.low == pytest.approx(unseen * 3.689 * found.clustering / (1500 / 3000 * 12 * 40), rel=0.1)


def test_recall_of_a_prefilter():
    exact, candidates, _ = world(2, noise=0.05)
    rng = np.random.default_rng(0)
    allowed = rng.random(exact.shape) < 0.8  # a prefilter that loses a fifth of everything, at random
    inside = np.where(allowed, exact, -np.inf)
    candidates = np.argsort(-inside, axis=1)[:, :90]
    best = np.argsort(-exact, axis=1)[:, :40]
    true = np.take_along_axis(allowed, best, axis=1).mean()
    sample = np.sort(rng.choice(3000, 600, replace=False))
    calibration = Calibration(exact[:, sample], sample, 3000, 40)
    values = np.take_along_axis(exact, candidates, axis=1)
    found = calibration.of(candidates, values, allowed[:, sample])
    assert found.low <= true <= found.high and abs(found.value - true) < 0.06
    everything = calibration.of(candidates, values, np.ones((12, 600), dtype=bool))
    assert everything.value == 1.0 and everything.low < 1


def test_all_rows_as_candidates_have_recall_one():
    exact, _, _ = world(0, count=60, queries=2)
    found = estimate(exact, np.tile(np.arange(60), (2, 1)), np.arange(0, 60, 3))
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_poisson_limits():
    assert poisson_limits(0) == pytest.approx((0.0, 3.688879), abs=1e-5)
    assert poisson_limits(10) == pytest.approx((4.795389, 18.390356), abs=1e-5)  # Garwood's table
    low, high = poisson_limits(2.5, 0.9)
    assert poisson_limits(2, 0.9)[0] < low < 2.5 < high < poisson_limits(3, 0.9)[1]


def test_samples():
    drawn = draw_sample(1000, 100, seed=4)
    assert len(drawn.unique()) == 100 and torch.equal(drawn, drawn.sort().values)
    assert torch.equal(drawn, draw_sample(1000, 100, seed=4)) and not torch.equal(drawn, draw_sample(1000, 100, seed=5))
    size = sample_size(20_000, 20, 100, 0.95)
    assert 1 - 3.689 / (size / 20_000 * 20 * 100) == pytest.approx(0.95, abs=1e-3)
    assert sample_size(100, 1, 1, 0.99) == 100


def test_errors():
    with pytest.raises(ConfigError, match="sample of 11 cannot be drawn from 10"):
        draw_sample(10, 11)
    scores = np.zeros((2, 3))
    with pytest.raises(DataError, match="different sampled rows"):
        Calibration(scores, [1, 1, 2], 10, 2)
    with pytest.raises(DataError, match="not among the 3 rows"):
        Calibration(scores, [1, 2, 3], 3, 2)
    with pytest.raises(DataError, match="not finite"):
        Calibration(np.full((2, 3), np.nan), [0, 1, 2], 10, 2)
    with pytest.raises(ConfigError, match="k is 11"):
        Calibration(scores, [0, 1, 2], 10, 11)
    calibration = Calibration(scores, [0, 1, 2], 10, 2)
    with pytest.raises(DataError, match="fewer than k = 2"):
        calibration.of(np.zeros((2, 1), dtype=int), np.zeros((2, 1)))
    with pytest.raises(DataError, match="do not fit"):
        calibration.of(np.zeros((2, 4), dtype=int), np.zeros((2, 3)))
