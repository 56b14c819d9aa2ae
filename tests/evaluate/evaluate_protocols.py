"""Protocols of the tests: importable, so that worker processes can have them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from pyinf.evaluate import FunctionProtocol

N, Q = 20, 5
EFFECT = np.random.default_rng(0).normal(size=(Q, N))


def linear_train(counts, seed):
    noise = np.random.default_rng([seed, 7]).normal(size=Q) * 0.01
    return (counts.copy(), noise), 0.5


def linear_measure(model):
    counts, noise = model
    loss = 10 - EFFECT @ counts / N + noise
    return {"loss": loss, "margin": np.linspace(1, 2, Q) - 5 * (N - counts.sum()) / N}


def linear(**changes):
    settings = {"name": "linear", "train_size": N, "query_size": Q, **changes}
    return FunctionProtocol(train_function=linear_train, measure_function=linear_measure, **settings)


def slow_train(counts, seed):
    time.sleep(0.15)
    return linear_train(counts, seed)


def slow():
    return FunctionProtocol("slow", slow_train, linear_measure, N, Q)


def dying_train(counts, seed):
    import os

    os._exit(9)


def failing_train(counts, seed):
    raise ValueError("no convergence")


def build_slowly(directory: Path):
    """What the killed process of the test runs."""
    from pyinf.evaluate import Bank, half_subsets

    Bank(directory, slow()).build(half_subsets(N, 30), workers=2)


if __name__ == "__main__":
    import sys

    build_slowly(Path(sys.argv[1]))
