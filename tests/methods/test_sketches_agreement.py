"""Inner products under pyinf's projections and under plain ones: a small run of benchmarks/projection_agreement.py."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import projection_agreement as agreement


def test_means_variances_and_distributions_agree():
    result = agreement.run(size=200, k=24, seeds=250, source=None)
    assert len(result["entries"]) == 2 * 2 * 3 + 2 * 2 * 3
    for entry in result["entries"]:
        assert abs(entry["mean_error_in_standard_errors"]) < 4.5, entry
        assert abs(entry["variance_error_in_standard_errors"]) < 4.5, entry
        assert entry.get("distance_from_pyinf", 0) < 1.2 * entry.get("distance_expected_at_most", 1), entry
    assert agreement.table(result).count("\n") == 1 + len(result["entries"])


def test_another_distribution_is_noticed():
    X = agreement.pairs(200)
    right = agreement.inner_products(X, agreement.dense(24, "rademacher"), 250)
    wrong = agreement.inner_products(X, lambda X, seed: 1.1 * agreement.dense(24, "rademacher")(X, seed), 250)
    entries = agreement.compare(X, {"pyinf": right, "wrong": wrong}, 24, "rademacher", 1, "pyinf")
    worst = next(e for e in entries if e["projector"] == "wrong" and e["cosine"] == 1.0)
    assert worst["mean_error_in_standard_errors"] > 4.5 and worst["distance_from_pyinf"] > 0.146


def test_theory_is_the_moment_over_all_signs_and_buckets():
    x, y = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]], dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    every = (signs @ x) * (signs @ y)  # k = 1: all eight matrices
    mean, variance = agreement.theory(torch.stack([x, y]), 1, "rademacher")
    assert float(mean) == pytest.approx(float(every.mean()))
    assert float(variance) == pytest.approx(float(every.var(correction=0)))
    found = []
    for buckets in torch.cartesian_prod(*[torch.arange(2)] * 6).reshape(-1, 3, 2):
        for drawn in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6).reshape(-1, 3, 2):
            S = torch.zeros(3, 2, dtype=torch.float64)
            S.scatter_add_(1, buckets, drawn)
            found.append(float((x @ S) @ (y @ S)) / 2)
    mean, variance = agreement.theory(torch.stack([x, y]), 2, "sparse", 2)
    assert float(mean) == pytest.approx(sum(found) / len(found))
    assert float(variance) == pytest.approx(float(torch.tensor(found, dtype=torch.float64).var(correction=0)))


def test_the_committed_result_agrees():
    result = json.loads(agreement.RESULT.read_text())
    assert result["traker"] and result["seeds"] >= 500
    for entry in result["entries"]:
        assert abs(entry["mean_error_in_standard_errors"]) < 4.5 and 0.7 < entry["variance_over_theory"] < 1.4
        assert entry.get("distance_from_pyinf", 0) < 1.2 * entry.get("distance_expected_at_most", 1)
