"""Certificates against the truth: what they call solved is, and what they measure is what a dense matrix says."""

from __future__ import annotations

import math

import pytest
import solve_oracle as oracle
import torch

import pyinf
from pyinf.data.batching import prepare
from pyinf.methods.solvers import SOLVERS, Problem
from pyinf.solve import GGNOperator, Layout, MatrixOperator, Outcome, Solution, entries, hold, measure, verdict
from pyinf.solve.certificate import HeldBatch

TRAIN, QUERIES = oracle.data(12, 1), oracle.data(20, 2)
SOLVER_OPTIONS = {
    "block cg": ("cg", True, {"block": True}),
    "cg": ("cg", False, {"block": False}),
    "short cg": ("cg", False, {"block": False, "max_iterations": 25}),
    "neumann": ("neumann", False, {"scale": None}),
    "astra": ("astra", True, {"batch": 10**6, "step": None, "momentum": 0.9, "decay": 1.0, "decay_every": 50}),
    "lissa": ("lissa", False, {"scale": None, "batch": None}),
    "arnoldi": ("arnoldi", False, {"steps": 200, "rank": None, "complement": True}),
    "exact": ("exact", False, {"limit": 10_000}),
}


class World:
    def __init__(self) -> None:
        self.model = oracle.gpt2(width=4)
        self.attributor = pyinf.Attributor(self.model, "ekfac").fit(TRAIN)
        self.layout = Layout.of(self.attributor.selection.layers)
        self.names = self.attributor.selection.names
        self.C = oracle.ggn(self.model, self.names, TRAIN)
        self.G, self.V = (oracle.gradients(self.model, self.names, x) for x in (TRAIN, QUERIES))

    def damping(self, damping):
        return self.layout.spread(self.attributor.factors.dampings(damping, "relative"), self.C)

    def problem(self, damping, use, **options):
        factors = self.attributor.factors

        class Curvature(MatrixOperator):
            def on(self, batches, sequences=None):
                return self

        def precondition(X):
            return self.layout.pack(factors.ihvp(self.layout.unpack(X), damping))

        options = {"tol": 1e-2, "max_iterations": 2000, "curvature": "ggn"} | options
        data = prepare(TRAIN, "train", self.model)
        return Problem(
            self.V, self.layout, Curvature(self.C), self.damping(damping), precondition, use, options, data,
            [list(range(len(TRAIN)))], None, len(TRAIN),
        )  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return World()


def test_whatever_is_called_solved_agrees_with_the_exact_solve(world):
    """20 queries × 4 dampings × 8 solvers at two tolerances; a score may be off by ``tol √(τ_qq τ_ii)``, no more."""
    counts = {"solved": 0, "approximate": 0}
    for damping in (0.1, 1.0, 10.0, 100.0):
        A = world.C + torch.diag(world.damping(damping))
        exact = torch.linalg.solve(A, world.V.T).T
        scale = ((exact * world.V).sum(1)[:, None] * (torch.linalg.solve(A, world.G.T).T * world.G).sum(1)).sqrt()
        for tol in (1e-2, 1e-4):
            for name, (solver, use, options) in SOLVER_OPTIONS.items():
                solution = SOLVERS[solver](world.problem(damping, use, tol=tol, **options))
                found = entries(solution, "here", tol, {}, range(len(QUERIES)))
                true = (world.V - solution.X @ A).norm(dim=1) / world.V.norm(dim=1)
                E = solution.X - exact
                energy = ((E @ A * E).sum(1) / (exact @ A * exact).sum(1)).sqrt()
                off = ((solution.X - exact) @ world.G.T).abs() / scale
                for q, entry in enumerate(found):
                    counts[entry["verdict"]] = counts.get(entry["verdict"], 0) + 1
                    assert entry["relative_residual"] == pytest.approx(float(true[q]), rel=1e-4, abs=1e-10), name
                    assert float(energy[q]) <= entry["error_bound"] * (1 + 1e-4) + 1e-12, name
                    assert float(off[q].max()) <= entry["error_bound"] * (1 + 1e-4) + 1e-12, name
                    if entry["verdict"] == "solved":
                        assert max(float(true[q]), float(energy[q]), float(off[q].max())) <= tol, name
    assert counts["solved"] >= 500 and counts["approximate"] >= 100, counts


def test_direct_methods_are_held_to_the_dense_matrix(world):
    for method in ("ekfac", "kfac", "diagonal", "grad_dot"):
        attributor = pyinf.Attributor(world.model, method, certify=True).fit(TRAIN)
        for damping, scores in attributor.score(QUERIES[:3], TRAIN, dampings=[0.1, 5.0]).items():
            if attributor.factors is not None:
                lam = world.damping(damping)
                if method == "diagonal":
                    lam = world.layout.spread(attributor.factors.dampings(damping, "relative"), world.C)
                elif method == "kfac":
                    lam = world.layout.spread(attributor.factors.dampings(damping, "relative"), world.C)
                X = world.layout.pack(attributor.factors.ihvp(world.layout.unpack(world.V[:3]), damping))
            else:
                damping = 0.1
                squares = {n: float(g.square().mean()) for n, g in world.layout.unpack(world.G).items()}
                lam, X = world.layout.spread({n: damping * s for n, s in squares.items()}, world.C), world.V[:3]
            AX = X @ (world.C + torch.diag(lam))
            true = (AX - world.V[:3]).norm(dim=1) / world.V[:3].norm(dim=1)
            cosine = torch.cosine_similarity(AX, world.V[:3])
            for q, entry in enumerate(scores.certificate):
                assert entry["relative_residual"] == pytest.approx(float(true[q]), rel=1e-4), method
                best = math.sqrt(1 - float(cosine[q]) ** 2)
                assert entry["residual_at_best_scale"] == pytest.approx(best, rel=1e-3), method
                assert entry["verdict"] == ("approximate" if best < 0.9 else "not to be trusted")
                assert entry["measured_on"].startswith("all 12 training sequences")


def test_low_rank_and_rotated_queries_are_measured_as_they_are_scored(world):
    plain = pyinf.Attributor(world.model, "ekfac", certify=True).fit(TRAIN).score(QUERIES[:3], TRAIN)
    full = pyinf.Attributor(world.model, "ekfac", certify=True, query_rank=0.999999).fit(TRAIN)
    for a, b in zip(plain.certificate, full.score(QUERIES[:3], TRAIN).certificate, strict=True):
        assert a["relative_residual"] == pytest.approx(b["relative_residual"], rel=1e-2)
        assert b["captured_energy"] >= 0.999999 and "captured_energy" not in a
    one = pyinf.Attributor(world.model, "ekfac", certify=True, query_rank=1).fit(TRAIN).score(QUERIES[:3], TRAIN)
    assert one.certificate[0]["captured_energy"] < 0.999
    assert abs(one.certificate[0]["relative_residual"] - plain.certificate[0]["relative_residual"]) > 1e-3


def test_a_sample_estimates_the_residual_without_bias(world):
    """Over all halves of the data, the mean of the estimated squares is the square under all of it."""
    lam = world.damping(1.0)
    A = world.C + torch.diag(lam)
    X = torch.linalg.solve(A, world.V[:4].T).T
    X[1:] *= 1 + torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)[:, None]
    true = (X @ A - world.V[:4]).norm(dim=1) / world.V[:4].norm(dim=1)
    data = prepare(TRAIN, "train", world.model)
    squares, naive = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    parts = [oracle.ggn(world.model, world.names, [e]) for e in TRAIN]
    rounds = 3000
    for _ in range(rounds):  # the same estimate from dense matrices, many times over
        i, j = torch.randperm(12, generator=generator)[:2].tolist()
        ri, rj = X @ parts[i] + X * lam - world.V[:4], X @ parts[j] + X * lam - world.V[:4]
        squares += (ri * rj).sum(1) / world.V[:4].square().sum(1) / rounds
        naive += (0.5 * (ri + rj)).square().sum(1) / world.V[:4].square().sum(1) / rounds
    with GGNOperator(world.model, world.attributor.selection, pyinf.CausalLM(), data, []) as C:
        found = measure(C, HeldBatch([[3], [7]], 9, False, 12), X, world.V[:4], lam)
    ri, rj = X @ parts[3] + X * lam - world.V[:4], X @ parts[7] + X * lam - world.V[:4]
    one = ((ri * rj).sum(1).clamp(min=0) / world.V[:4].square().sum(1)).sqrt()
    assert torch.allclose(torch.tensor(found.residual).double(), one, rtol=1e-6, atol=1e-9) and found.bound is None
    # without replacement from 12, so a share of (12/11 − 1) of the spread is left
    assert bool((squares - true.square()).abs().max() < 0.2 * (naive - true.square()).abs().max())


def test_held_batches(world):
    data = prepare(TRAIN, "train", world.model)
    whole = hold(data, 32, 10_000, 0)
    assert whole.whole and sorted(i for g in whole.groups for i in g) == list(range(12))
    part = hold(data, 4, 10_000, 0)
    assert not part.whole and part.sequences == 4 and len(part.groups) == 4 and "4 of 12" in str(part)
    assert hold(data, 32, 1, 0).sequences == 2  # fewer cannot be unbiased
    assert hold(data, 4, 10_000, 1).groups != part.groups and hold(data, 4, 10_000, 0) == part


def test_the_verdict():
    assert verdict(1e-3, 5e-3, 1e-2, True)[0] == "solved"
    assert verdict(1e-3, 5e-2, 1e-2, True) == (
        "approximate", "relative residual 0.001, but the error is bounded by no more than 0.05"
    )  # fmt: skip
    assert verdict(1e-3, None, 1e-2, False)[0] == "approximate"
    assert verdict(5.0, None, 1e-2, False, 0.5)[0] == "approximate"
    assert verdict(5.0, None, 1e-2, False, 0.95)[0] == "not to be trusted"
    assert verdict(float("nan"), None, 1e-2, True)[0] == "not to be trusted"
    assert verdict(0.99, 3.0, 1e-2, True, reason="stopped")[0] == "not to be trusted"
    failed = Solution(
        torch.full((1, 3), float("nan")), [Outcome("failed", "diverged")], [3], [float("nan")], [float("nan")]
    )
    (entry,) = entries(failed, "here", 1e-2, {}, range(1))
    assert entry["verdict"] == "not to be trusted" and entry["reason"] == "diverged"
    assert entry["relative_residual"] is None


def test_what_cannot_be_measured_says_so(world):
    class Other(pyinf.CausalLM):
        def train_loss(self, model, batch, sample=False):
            return super().train_loss(model, batch, sample)

    attributor = pyinf.Attributor(world.model, "ekfac", task=Other()).fit(TRAIN)
    entry = attributor.score(QUERIES[:2], TRAIN).certificate[0]
    assert entry["verdict"] == "not measured" and "Other is not known to be a cross-entropy" in entry["reason"]
    with pytest.raises(pyinf.errors.ConfigError, match="Other is not known"):
        pyinf.Attributor(world.model, "ekfac", task=Other(), certify=True).fit(TRAIN).score(QUERIES[:2], TRAIN)
    entry = pyinf.Attributor(world.model, "ekfac").fit(TRAIN).score(QUERIES, TRAIN).certificate[0]
    assert entry["verdict"] == "not measured" and "certify=True" in entry["reason"]
    assert pyinf.Attributor(world.model, "ekfac", certify=False).fit(TRAIN).score(QUERIES, TRAIN).certificate is None
    own = pyinf.Attributor(world.model, "ekfac_cg", task=Other(), curvature="fisher").fit(TRAIN)
    entry = own.score(QUERIES[:2], TRAIN).certificate[0]
    assert entry["verdict"] == "solved" and "Fisher matrix of sampled labels" in entry["measured_on"]


def test_many_training_sequences_make_it_cheap_enough():
    model, train = oracle.gpt2(width=4), oracle.data(150, 5)
    scores = pyinf.Attributor(model, "ekfac").fit(train).score(QUERIES[:1], train)
    entry = scores.certificate[0]
    assert entry["verdict"] in ("approximate", "not to be trusted") and entry["error_bound"] is None
    assert "of 150 training sequences, drawn at random" in entry["measured_on"]
