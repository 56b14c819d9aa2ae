"""Ranks, correlations and bootstrap against definitions written out."""

from __future__ import annotations

import numpy as np
import pytest

from pyinf.errors import ConfigError, DataError
from pyinf.evaluate import statistics as st


def brute_ranks(row):
    return [sum(v < x for v in row) + (sum(v == x for v in row) + 1) / 2 for x in row]


def brute_pearson(x, y):
    x, y = np.asarray(x, float), np.asarray(y, float)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / np.sqrt((x @ x) * (y @ y)))


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("distinct", [3, 1000])
def test_ranks_with_and_without_ties(rng, distinct):
    values = rng.integers(0, distinct, (4, 5, 17)).astype(float)
    expected = [[brute_ranks(row) for row in block] for block in values]
    assert np.array_equal(st.average_ranks(values), expected)


def test_ranks_of_different_rows_do_not_mix():
    assert np.array_equal(
        st.average_ranks(np.array([[1.0, 2.0], [2.0, 2.0], [2.0, 1.0]])), [[1, 2], [1.5, 1.5], [2, 1]]
    )


def test_correlations(rng):
    x, y = rng.integers(0, 6, (3, 25)).astype(float), rng.normal(size=(3, 25))
    assert np.allclose(st.pearson(x, y), [brute_pearson(a, b) for a, b in zip(x, y, strict=True)], atol=1e-12)
    expected = [brute_pearson(brute_ranks(a), brute_ranks(b)) for a, b in zip(x, y, strict=True)]
    assert np.allclose(st.spearman(x, y), expected, atol=1e-12)


def test_a_known_spearman():
    # 1 − 6 Σd² / (n(n² − 1)) with d = (1, −1, 0, 0, 0): 0.9
    assert st.spearman(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 3, 4, 5])) == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1e6 + 1 / 3])
def test_a_constant_side_has_no_correlation(rng, value):
    assert st.pearson(np.full(20, value), rng.normal(size=20)) == 0
    assert st.spearman(rng.normal(size=20), np.full(20, value)) == 0


def test_weighted_ranks_are_those_of_the_sample_written_out(rng):
    values = rng.integers(0, 7, 12).astype(float)
    counts = st.resample_counts(12, 20, seed=1)
    assert counts.sum(1).tolist() == [12] * 20
    found = st.weighted_ranks(values, counts)
    for row, c in zip(found, counts.astype(int), strict=True):
        items = np.repeat(np.arange(12), c)
        ranks = brute_ranks(values[items])
        for item, rank in zip(items, ranks, strict=True):
            assert row[item] == rank


def test_weighted_pearson_is_that_of_the_sample_written_out(rng):
    x, y = rng.normal(size=15), rng.normal(size=15)
    counts = st.resample_counts(15, 10, seed=2)
    for c in counts:
        items = np.repeat(np.arange(15), c.astype(int))
        assert st.weighted_pearson(x, y, c) == pytest.approx(brute_pearson(x[items], y[items]), abs=1e-12)


def test_interval_of_a_mean_covers_as_often_as_it_says(rng):
    hits = 0
    for seed in range(200):
        estimate = st.bootstrap_mean(rng.normal(size=60), resamples=400, seed=seed)
        hits += estimate.low <= 0 <= estimate.high
        assert estimate.low <= estimate.value <= estimate.high
    assert 176 <= hits <= 199  # 95 % of 200, give or take


def test_same_seed_same_interval(rng):
    values = rng.normal(size=30)
    assert st.bootstrap_mean(values, 100, seed=5) == st.bootstrap_mean(values, 100, seed=5)
    assert st.bootstrap_mean(values, 100, seed=5) != st.bootstrap_mean(values, 100, seed=6)


def test_bad_numbers_are_refused():
    with pytest.raises(DataError, match=r"scores has nan at \(1, 2\)"):
        st.matrix([[1, 2, 3], [1, 2, np.nan]], "scores")
    with pytest.raises(DataError, match="2 axes are needed"):
        st.matrix([1, 2], "scores")
    with pytest.raises(DataError, match="empty"):
        st.matrix(np.zeros((0, 3)), "scores")
    with pytest.raises(DataError, match="no array of numbers"):
        st.matrix([["a"]], "scores")
    with pytest.raises(ConfigError, match="resamples is 0"):
        st.resample_counts(3, 0)
