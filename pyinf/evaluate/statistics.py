"""Ranks, correlations and bootstrap intervals, in NumPy: many rows at once, ties at their average rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyinf.errors import ConfigError, DataError

__all__ = [
    "Estimate",
    "average_ranks",
    "bootstrap_mean",
    "pearson",
    "resample_counts",
    "spearman",
    "weighted_pearson",
    "weighted_ranks",
]


@dataclass(frozen=True)
class Estimate:
    """A mean with a percentile interval: ``value``, ``low``, ``high`` at the given ``level``."""

    value: float
    low: float
    high: float
    level: float = 0.95

    def to_dict(self) -> dict[str, float]:
        """As JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "level": self.level}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def matrix(values: Any, name: str, ndim: int = 2) -> np.ndarray:
    """``values`` as a finite float64 array of ``ndim`` axes.

    Raises:
        DataError: another number of axes, empty, NaN or infinite; names the array and the place.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is no array of numbers: {error}") from None
    if array.ndim != ndim:
        raise DataError(f"{name} has shape {array.shape}; {ndim} axes are needed")
    if array.size == 0:
        raise DataError(f"{name} is empty (shape {array.shape}); give at least one value")
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DataError(
            f"{name} has {array[place]} at {place}; such scores cannot be ranked: find out where it is from"
        )
    return array


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1, equal values at the mean of their places: ``[..., M]`` → ``[..., M]``."""
    values = np.asarray(values, dtype=np.float64)
    flat = values.reshape(-1, values.shape[-1])
    rows, size = flat.shape
    order = np.argsort(flat, axis=1, kind="stable")
    ordered = np.take_along_axis(flat, order, axis=1)
    new = np.ones((rows, size), dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = np.cumsum(new.reshape(-1)) - 1  # of equal neighbours, numbered through all rows
    place = np.tile(np.arange(1, size + 1, dtype=np.float64), rows)
    mean = np.bincount(group, weights=place) / np.bincount(group)
    ranks = np.empty_like(flat)
    np.put_along_axis(ranks, order, mean[group].reshape(rows, size), axis=1)
    return ranks.reshape(values.shape)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis, ``Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²)``; 0 where one side is constant."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return weighted_pearson(x, y, np.ones(x.shape[-1]))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman correlation along the last axis: Pearson of the average ranks; 0 where one side is constant."""
    return pearson(average_ranks(x), average_ranks(y))


def weighted_pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis with item weights (the counts of a resample); all broadcast."""
    total = np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    dx = x - (weights * x).sum(-1, keepdims=True) / total
    dy = y - (weights * y).sum(-1, keepdims=True) / total
    sxx, syy, sxy = ((weights * p).sum(-1) for p in (dx * dx, dy * dy, dx * dy))
    # Relative to the size of the numbers: a constant row differs from its own mean by rounding.
    tiny = 1e-24 * (weights * x * x).sum(-1), 1e-24 * (weights * y * y).sum(-1)
    good = (sxx > tiny[0]) & (syy > tiny[1])
    return np.where(good, sxy / np.sqrt(np.where(good, sxx * syy, 1.0)), 0.0)


def weighted_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average ranks in the samples in which item ``j`` stands ``counts[r, j]`` times.

    ``rank_j = Σ_{x_k < x_j} w_k + (Σ_{x_k = x_j} w_k + 1) / 2``: what :func:`average_ranks` gives on the written-out
    sample, without writing it out.

    Args:
        values: ``[M]``.
        counts: ``[R, M]``.

    Returns:
        ``[R, M]``.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    start = np.searchsorted(ordered, values, side="left")
    end = np.searchsorted(ordered, values, side="right")
    below = np.zeros((counts.shape[0], counts.shape[1] + 1))
    np.cumsum(counts[:, order], axis=1, out=below[:, 1:])
    return below[:, start] + (below[:, end] - below[:, start] + 1) / 2


def resample_counts(size: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each of ``size`` items stands in each bootstrap sample of the same size: ``[resamples, size]``.

    Raises:
        ConfigError: fewer than one resample.
    """
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; it must be at least 1 (2000 is usual)")
    rng = np.random.default_rng(seed)
    return rng.multinomial(size, np.full(size, 1.0 / size), size=resamples).astype(np.float64)


def interval(value: float, samples: np.ndarray, level: float = 0.95) -> Estimate:
    """The percentile interval of bootstrap ``samples`` around ``value``."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high), level)


def bootstrap_mean(values: Any, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Estimate:
    """Mean of ``values`` ``[Q]`` with a percentile interval over resamples of the items (queries, as a rule).

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    array = matrix(values, "values", 1)
    counts = resample_counts(len(array), resamples, seed)
    return interval(float(array.mean()), counts @ array / len(array), level)


def bootstrap(statistic: Callable[[np.ndarray], float], values: np.ndarray, counts: np.ndarray) -> Estimate:
    """Any ``statistic`` of the rows of ``values``, with the interval over the resamples ``counts`` ``[R, rows]``."""
    rows = np.arange(len(values))
    samples = [statistic(values[np.repeat(rows, c.astype(int))]) for c in counts]
    return interval(statistic(values), np.asarray(samples))
