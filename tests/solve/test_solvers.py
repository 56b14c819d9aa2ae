"""Every solver on explicit matrices in float64: the dense damped solve, stopping, and how each one fails."""

from __future__ import annotations

import math

import pytest
import solve_oracle as oracle
import torch
from torch import nn

from pyinf.errors import SolverError
from pyinf.solve import (
    Damped,
    MatrixOperator,
    Operator,
    Schedule,
    arnoldi,
    block_cg,
    cg,
    dense_matrix,
    lissa_settings,
    power_iteration,
    richardson,
    schulz,
    trace,
    woodbury,
)
from pyinf.solve.operators import error_bound

D, Q = 90, 5


class Case:
    def __init__(self, condition: float = 1e4, dtype: torch.dtype = torch.float64, damping: float = 1e-3) -> None:
        generator = torch.Generator().manual_seed(7)
        self.C = oracle.spd(D, condition).to(dtype)
        self.lam = torch.full((D,), damping, dtype=dtype)
        self.lam[D // 2 :] = 3 * damping  # two layers
        self.A = self.C + torch.diag(self.lam)
        self.V = torch.randn(Q, D, generator=generator, dtype=torch.float64).to(dtype)
        self.wanted = torch.linalg.solve(self.A.double(), self.V.double().T).T
        noise = torch.rand(D, generator=generator, dtype=torch.float64).to(dtype)
        self.inverse = torch.linalg.inv(self.A + torch.diag(0.05 * noise * self.A.diagonal()))

    @property
    def operator(self) -> Damped:
        return Damped(MatrixOperator(self.C), self.lam)

    def precondition(self, X):
        return X @ self.inverse

    def energy_error(self, X):
        """``‖x − x*‖_A / ‖x*‖_A`` a query."""
        E, A = X.double() - self.wanted, self.A.double()
        return ((E @ A * E).sum(1) / (self.wanted @ A * self.wanted).sum(1)).sqrt()


@pytest.mark.parametrize("solve", [block_cg, cg])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_reach_the_dense_solve(solve, preconditioned):
    case = Case()
    A = case.operator
    pre = case.precondition if preconditioned else None
    x0 = pre(case.V) if preconditioned else None
    found = solve(A, case.V, pre, x0, tol=1e-10, max_iterations=2000)
    assert all(found.solved) and max(found.residuals) <= 1e-10 and max(found.bounds) <= 1e-10
    assert oracle.error(found.X, case.wanted) < 1e-8
    assert found.products == A.products and max(found.iterations) > 1
    assert preconditioned is False or max(found.iterations) < 30


@pytest.mark.parametrize("solve", [block_cg, cg])
def test_iterates_are_shown_and_the_last_product_may_be_saved(solve):
    case, seen = Case(), []
    note = lambda iteration, X, R: seen.append((iteration, X.clone(), R.clone()))  # noqa: E731
    found = solve(case.operator, case.V, case.precondition, case.precondition(case.V), 1e-10, 2, after=note)
    assert [iteration for iteration, _, _ in seen] == [0, 1, 2] and torch.equal(seen[-1][1], found.X)
    for _, X, R in seen:
        assert oracle.error(R, case.V - X @ case.A) < 1e-9
    short = solve(case.operator, case.V, case.precondition, case.precondition(case.V), 1e-10, 2, final=False)
    assert torch.equal(short.X, found.X) and short.products == found.products - Q
    assert short.residuals is None and short.bounds is None and "was not measured" in short.outcomes[0].reason
    whole = solve(case.operator, case.V, case.precondition, None, 1e-10, 500, final=False)
    assert all(whole.solved) and whole.residuals is not None and max(whole.residuals) <= 1e-10


def test_the_block_shares_its_search_space():
    case = Case(1e6)
    one, many = (f(case.operator, case.V, tol=1e-6, max_iterations=5000, bound=False) for f in (cg, block_cg))
    assert all(one.solved) and all(many.solved) and many.products < 0.7 * one.products


def test_stopping_is_by_query_and_on_the_true_residual():
    case = Case()
    V = case.V.clone()
    V[1] = 0
    V[2] = 1e6 * case.C[3]  # another scale
    V[3] = V[2] * 2 + V[0]  # dependent on others
    V[4] = 3 * V[0]
    for solve in (block_cg, cg):
        found = solve(case.operator, V, tol=1e-6, max_iterations=3000)
        assert all(found.solved) and not found.X[1].any() and found.iterations[1] == 0
        true = (V - found.X @ case.A).norm(dim=1) / V.norm(dim=1).clamp(min=1e-300)
        assert float(true.max()) <= 1e-6 and torch.allclose(true, torch.tensor(found.residuals).double(), atol=1e-12)
    easy = torch.cat([torch.ones(1, D, dtype=torch.float64) @ case.A, case.V])
    x0 = torch.zeros_like(easy)
    x0[0] = 1.0
    found = cg(case.operator, easy, None, x0, tol=1e-6, max_iterations=3000)
    assert found.iterations[0] == 0 < min(found.iterations[1:])


@pytest.mark.parametrize("solve", [block_cg, cg])
@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-4])
def test_the_error_bound_is_one(solve, tol):
    for condition in (1e2, 1e5):
        case = Case(condition)
        for most in (3, 10, 400):
            found = solve(case.operator, case.V, tol=tol, max_iterations=most)
            true = case.energy_error(found.X)
            for row in range(Q):
                assert float(true[row]) <= found.bounds[row] * (1 + 1e-9)
                assert found.solved[row] == (max(found.residuals[row], found.bounds[row]) <= tol)
                assert not found.solved[row] or float(true[row]) <= tol
                assert found.solved[row] or "stopped after" in found.outcomes[row].reason


def test_the_bound_knows_zero_and_useless_vectors():
    case = Case()
    X = torch.stack([torch.zeros(D).double(), -case.wanted[1]])
    bound = error_bound(X, case.V[:2] - X @ case.A, case.V[:2], case.lam)
    assert bool(torch.isinf(bound).all())
    assert float(error_bound(X[:1], X[:1], X[:1], case.lam)) == 0


class Indefinite(Operator):
    """A curvature with one clearly negative direction."""

    def __init__(self, value: float = -1.0) -> None:
        self.size = D
        self.values = torch.linspace(0.1, 2, D, dtype=torch.float64)
        self.values[7] = value

    def apply(self, X):
        return X * self.values


@pytest.mark.parametrize("solve", [block_cg, cg])
def test_an_indefinite_operator_is_no_solution(solve):
    case = Case()
    found = solve(Damped(Indefinite(), case.lam), case.V, tol=1e-6, max_iterations=500)
    assert not any(found.solved) and any(o.failed for o in found.outcomes)
    for row, outcome in enumerate(found.outcomes):
        if outcome.failed:
            assert "not positive definite" in outcome.reason and "raise the damping" in outcome.reason
            assert bool(torch.isnan(found.X[row]).all()) and math.isnan(found.residuals[row])


@pytest.mark.parametrize("solve", [block_cg, cg])
def test_products_that_are_not_finite_are_no_solution(solve):
    class Overflow(Operator):
        size = D

        def apply(self, X):
            return X * (float("inf") if self.products > 3 * Q else 1.7) + X.roll(1, 1) * 0.1 + X.roll(-1, 1) * 0.1

    case = Case()
    found = solve(Damped(Overflow(), case.lam), case.V, tol=1e-12, max_iterations=500)
    assert all(o.failed for o in found.outcomes) and not torch.isfinite(found.X).any()


@pytest.mark.parametrize("solve", [block_cg, cg])
def test_stagnation_is_said(solve):
    case = Case(1e7, torch.float32, damping=1e-6)
    found = solve(case.operator, case.V, tol=1e-7, max_iterations=3000)
    assert not any(found.solved) and not any(o.failed for o in found.outcomes)
    assert all("stagnated" in o.reason and "float64" in o.reason for o in found.outcomes)
    assert max(found.iterations) < 3000
    true = (case.V.double() - found.X.double() @ case.A.double()).norm(dim=1) / case.V.double().norm(dim=1)
    assert torch.allclose(true, torch.tensor(found.residuals).double(), rtol=0.3)


# -- stationary iterations ---------------------------------------------------------------------------------------------


def test_power_iteration_and_trace():
    case = Case()
    C = MatrixOperator(case.C)
    assert 0.9 < power_iteration(C, D, case.lam[None], 200) / float(torch.linalg.eigvalsh(case.C)[-1]) <= 1.0001
    assert abs(trace(C, case.lam[None], 400) / float(case.C.trace()) - 1) < 0.1


def test_neumann_reaches_the_dense_solve_and_stops_by_itself():
    case = Case(30, damping=0.05)
    C = MatrixOperator(case.C)
    found = richardson(C, case.V, case.lam, Schedule(1 / 1.2), 3000, tol=1e-10)
    assert all(found.solved) and max(found.iterations) < 3000
    assert oracle.error(found.X, case.wanted) < 1e-8


def samples(case, parts=6):
    """``t ↦ C_t`` with mean C: C plus noise of mean zero over each round."""
    generator = torch.Generator().manual_seed(5)
    roots = torch.linalg.cholesky(case.C)
    weights = [0.5 + torch.rand(D, generator=generator, dtype=torch.float64) for _ in range(parts)]
    mean = sum(weights) / parts
    return lambda t: MatrixOperator(roots @ torch.diag(weights[t % parts] / mean) @ roots.T)


def test_lissa_averages_its_samples():
    case = Case(30, damping=0.05)
    C = MatrixOperator(case.C)
    found = richardson(samples(case), case.V, case.lam, Schedule(1 / 1.8, average=True), 4000, 1e-2, system=C)
    assert oracle.error(found.X, case.wanted) < 2e-2
    true = (case.V - found.X @ case.A).norm(dim=1) / case.V.norm(dim=1)
    assert torch.allclose(true, torch.tensor(found.residuals).double())


def test_astra_reaches_the_dense_solve():
    case = Case()
    C, lam = MatrixOperator(case.C), case.lam
    largest = power_iteration(lambda x: case.precondition(x @ case.A), D, lam[None], 100)
    schedule = Schedule(1 / largest, 0.5)
    found = richardson(C, case.V, lam, schedule, 400, 1e-10, case.precondition, case.precondition(case.V))
    assert all(found.solved) and oracle.error(found.X, case.wanted) < 1e-8
    schedule = Schedule(0.3 / largest, 0.5, 0.5, 60)
    start = case.precondition(case.V)
    found = richardson(samples(case), case.V, lam, schedule, 400, 1e-2, case.precondition, start, C)
    assert oracle.error(found.X, case.wanted) < oracle.error(start, case.wanted)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_divergence_is_no_solution(sampled, preconditioned):
    case = Case(30, damping=0.05)
    curvature = samples(case) if sampled else MatrixOperator(case.C)
    pre = case.precondition if preconditioned else None
    step = 3.0 if preconditioned else 1 / 0.4  # below λ_max / 2 for a scale
    found = richardson(curvature, case.V, case.lam, Schedule(step), 2000, 1e-2, pre, system=MatrixOperator(case.C))
    assert all(o.failed and "diverged" in o.reason and "raise scale" in o.reason for o in found.outcomes)
    assert bool(torch.isnan(found.X).all()) and all(math.isnan(r) for r in found.residuals)
    assert max(found.iterations) < 200


def test_lissa_settings_follow_the_spectrum():
    case = Case(1e3, damping=0.01)
    found = lissa_settings(MatrixOperator(case.C), case.lam, 1000, 1e-2, 10_000)
    largest = float(torch.linalg.eigvalsh(case.C)[-1])
    assert found.scale > largest + float(case.lam.max())
    assert found.batch >= float(case.C.trace()) / largest
    assert found.depth == math.ceil(math.log(100) * found.scale / float(case.lam.min()))
    assert lissa_settings(MatrixOperator(case.C), case.lam, 2, 1e-2, 50).depth == 50


def test_lissa_on_the_mlp_of_the_seed_paper_study():
    """1,377 parameters, 400 examples: cosine to the exact solve rises to 0.99 and more at 10,000 steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    x = torch.randn(400, 8, dtype=torch.float64)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * x[:, :1]
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (net(x) - y).square().mean()).backward()
        optimizer.step()
    w = {k: p.detach() for k, p in net.named_parameters()}
    J = torch.func.vmap(torch.func.jacrev(lambda w, x: torch.func.functional_call(net, w, (x,))[0]), (None, 0))(w, x)
    J = torch.cat([j.flatten(1) for j in J.values()], 1)
    assert J.shape == (400, 1377)
    lam = torch.full((1377,), 0.1 * float(J.square().mean()), dtype=torch.float64)
    V = ((net(x) - y).detach() * J)[:1]
    exact = woodbury(J, V, lam, 400)
    factor = J / 20
    C = MatrixOperator(lambda X: (X @ factor.T) @ factor, 1377)
    assert oracle.error(exact @ (J.T @ J / 400 + torch.diag(lam)), V) < 1e-8
    scale = lissa_settings(C, lam, 400, 1e-3, 10_000).scale
    last = 0.0
    for steps in (10, 100, 1000, 10_000):
        found = richardson(C, V, lam, Schedule(1 / scale), steps, tol=1e-12).X
        cosine = float(torch.cosine_similarity(found, exact, dim=1).min())
        assert cosine > last
        last = cosine
    assert last >= 0.99


# -- Krylov space and closed forms -------------------------------------------------------------------------------------


def test_arnoldi_with_all_steps_is_the_dense_solve():
    case = Case()
    C = MatrixOperator(case.C)
    found = arnoldi(C, case.V, case.lam, D, tol=1e-8)
    assert all(found.solved) and oracle.error(found.X, case.wanted) < 1e-8
    assert min(found.facts["captured_energy"]) > 0.999999
    errors = [oracle.error(arnoldi(C, case.V, case.lam, k, complement=True).X, case.wanted) for k in (5, 20, 60)]
    assert errors[0] > errors[1] > errors[2]
    short = arnoldi(C, case.V, case.lam, 30, rank=4)
    assert not any(short.solved) and "raise steps" in short.outcomes[0].reason and short.facts["steps"] == 4
    root = case.lam.rsqrt()
    _, U = torch.linalg.eigh(root[:, None] * case.C * root)
    top = U[:, -4:]
    share = (case.V * root @ top).square().sum(1) / (case.V * root).square().sum(1)
    assert torch.allclose(torch.tensor(short.facts["captured_energy"]).double(), share, rtol=1e-3)


def test_arnoldi_ends_where_the_space_does():
    low = torch.zeros(D, D, dtype=torch.float64)
    low[0, 0], low[1, 1] = 3.0, 2.0
    lam = torch.full((D,), 0.5, dtype=torch.float64)
    V = torch.randn(2, D, dtype=torch.float64)
    found = arnoldi(MatrixOperator(low), V, lam, 50, complement=True, tol=1e-8)
    assert all(found.solved) and found.facts["steps"] <= 3


def test_woodbury_equals_the_dense_solve():
    G = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    case = Case()
    for lam in (case.lam, 100 * case.lam):
        dense = torch.linalg.solve(G.T @ G / 44 + torch.diag(lam), case.V.T).T
        assert oracle.error(woodbury(G, case.V, lam, 44), dense) < 1e-8


def test_schulz_inverts_and_says_when_it_cannot():
    case = Case(1e5)
    inverse, iterations = schulz(case.A, tol=1e-10)
    assert oracle.error(inverse, torch.linalg.inv(case.A)) < 1e-8 and iterations < 60
    with pytest.raises(SolverError, match="Schulz iteration stopped"):
        schulz(case.A - 0.5 * torch.eye(D, dtype=torch.float64))
    with pytest.raises(SolverError, match="float64"):
        schulz(Case(1e12, damping=1e-12).A.float(), tol=1e-7)


def test_dense_matrix_from_products():
    case = Case()
    assert oracle.error(dense_matrix(MatrixOperator(case.C), case.lam, 17), case.C) < 1e-14
