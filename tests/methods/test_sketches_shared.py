"""Scores in a basis that all queries share: exact at full rank, and at any rank those of the cut queries."""

from __future__ import annotations

import pytest
import torch
from sketch_oracle import error, examples, gradients, tiny

import pyinf
from pyinf.errors import ConfigError
from pyinf.score.shared_basis import QueryMoments, shared_block

TRAIN, QUERIES = examples(10, 1), examples(4, 2)
SETTINGS = {"fisher": "empirical", "damping": 0.2, "certify": False}


def run(model, method="ekfac", batch_size=None, queries=QUERIES, score=None, **options):
    attributor = pyinf.Attributor(model, method, **{**SETTINGS, **options})
    attributor.fit(TRAIN, batch_size)
    return attributor.score(queries, TRAIN, batch_size, **(score or {})), attributor


def shared(vectors: dict[str, torch.Tensor], R: int):
    """``{layer: cut vectors}`` and energies by an explicit HOSVD: SVDs of the two unfoldings of the stack."""
    cut, energy = {}, {}
    for name, X in vectors.items():
        unit = X / X.flatten(1).norm(dim=1)[:, None, None]
        B_S = torch.linalg.svd(unit.permute(1, 0, 2).flatten(1), full_matrices=False).U[:, :R]
        B_A = torch.linalg.svd(unit.permute(2, 0, 1).flatten(1), full_matrices=False).U[:, :R]
        cut[name] = B_S @ B_S.T @ X @ B_A @ B_A.T
        energy[name] = (cut[name].flatten(1).norm(dim=1) / X.flatten(1).norm(dim=1)).square()
    return cut, energy


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "grad_dot", "grad_cos"])
def test_at_full_rank_scores_are_those_of_dense_queries(method):
    model = tiny()
    wanted, _ = run(model, method)
    found, _ = run(model, method, query_basis="shared", query_rank=1000)
    assert error(found.values, wanted.values) < 1e-9
    assert min(found.meta["captured_energy"]) > 1 - 1e-9


@pytest.mark.parametrize("R", [1, 3, 6])
def test_scores_and_energies_are_those_of_the_explicit_higher_order_svd(R):
    model = tiny()
    scores, attributor = run(model, query_basis="shared", query_rank=R)
    names = attributor.selection.names
    cut, energy = shared(attributor.factors.ihvp(gradients(model, QUERIES, names), 0.2), R)
    G = gradients(model, TRAIN, names)
    assert error(scores.values, sum(cut[n].flatten(1) @ G[n].flatten(1).T for n in names)) < 1e-7
    wanted = torch.stack(list(energy.values())).amin(0)
    assert torch.allclose(torch.tensor(scores.meta["captured_energy"], dtype=wanted.dtype), wanted, atol=2e-6)
    assert scores.meta["query_basis"] == "shared" and 0 < float(wanted.min()) < 0.9999


def test_an_energy_is_kept_on_average_over_the_queries_in_every_layer():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(6, 12, 10, generator=generator, dtype=torch.float64)
    X *= 0.7 ** torch.arange(12)[:, None] * 0.6 ** torch.arange(10) * (10.0 ** torch.arange(6))[:, None, None]
    ranks = []
    for wanted in (0.5, 0.9, 0.99, 0.9999):
        block = shared_block({"x": X}, 6, wanted)
        assert float(block.energy["x"].mean()) >= wanted
        rebuilt = block.basis_out["x"] @ block.core["x"] @ block.basis_in["x"].T
        kept = 1 - ((rebuilt - X).flatten(1).norm(dim=1) / X.flatten(1).norm(dim=1)).square()
        assert torch.allclose(kept, block.energy["x"], atol=1e-10)
        ranks.append(block.core["x"].shape[1:].numel())
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1] < 120


def test_queries_weigh_the_same_whatever_their_length_and_zero_ones_weigh_nothing():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    X[2] = 0
    one, two = QueryMoments(3), QueryMoments(3)
    for row in range(3):
        one.add("x", row, X[row])
        two.add("x", row, 1e-30 * X[row])
    assert error(one.left["x"], two.left["x"]) < 1e-12
    assert abs(float(one.left["x"].trace()) - 2) < 1e-12 and abs(float(one.right["x"].trace()) - 2) < 1e-12
    block = shared_block({"x": X}, 3, 2)
    assert not bool(block.core["x"][2].any()) and float(block.energy["x"][2]) == 1


def test_neither_batches_nor_the_way_scores_are_asked_for_change_them():
    model = tiny()
    options = {"query_basis": "shared", "query_rank": 4}
    scores, attributor = run(model, **options)
    again, _ = run(model, batch_size=1, **options)
    assert error(again.values, scores.values) < 1e-9
    tokens = attributor.score(QUERIES, TRAIN, granularity="token").values
    assert error(tokens.sum(2), scores.values) < 1e-9
    modules = attributor.score(QUERIES, TRAIN, per_module=True).values
    assert error(sum(modules.values()), scores.values) < 1e-9
    values, indices = attributor.score(QUERIES, TRAIN, topk=3).topk(3)
    assert error(values, scores.topk(3)[0]) < 1e-9 and torch.equal(indices, scores.topk(3)[1])


def test_dampings_share_the_basis_and_solvers_use_it_too():
    model = tiny()
    options = {"query_basis": "shared", "query_rank": 1000}
    _, attributor = run(model, **options)
    found = attributor.score(QUERIES, TRAIN, dampings=[0.1, 1.0])
    for damping, scores in found.items():
        assert error(scores.values, run(model, damping=damping)[0].values) < 1e-9
    solved = {"tol": 1e-6}
    wanted, _ = run(model, "ekfac_cg", **solved)
    cut, _ = run(model, "ekfac_cg", **solved, **options)
    assert error(cut.values, wanted.values) < 1e-6


def test_the_certificate_is_that_of_the_cut_solution():
    model = tiny()
    low, _ = run(model, query_basis="shared", query_rank=1, certify=True)
    full, _ = run(model, query_basis="shared", query_rank=1000, certify=True)
    plain, _ = run(model, certify=True)
    for cut, whole, dense in zip(low.certificate, full.certificate, plain.certificate, strict=True):
        assert whole["relative_residual"] == pytest.approx(dense["relative_residual"], rel=1e-4)
        assert cut["captured_energy"] < 0.95 < whole["captured_energy"]


def test_what_cannot_work_says_so():
    model = tiny()
    with pytest.raises(ConfigError, match="needs query_rank"):
        pyinf.Attributor(model, query_basis="shared")
    with pytest.raises(ConfigError, match="query_basis is 'both'"):
        pyinf.Attributor(model, query_basis="both", query_rank=4)
