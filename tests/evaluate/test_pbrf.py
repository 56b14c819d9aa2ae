"""The proximal Bregman response against exact and approximate influence: a tanh network in float64."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jacrev

from pyinf.errors import ConfigError, DataError
from pyinf.evaluate import ProximalBregman, five_terms, pearson


def plain_outputs(run, batch):
    return run(batch["x"]), batch["y"]


@pytest.fixture(scope="module")
def regression():
    """An 8-24-24-1 tanh network, 841 parameters, 400 examples, 400 steps of Adam: not converged, as networks are."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(410, 8, generator=generator, dtype=torch.float64)
    teacher = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    y = torch.sin(x @ teacher).sum(1, keepdim=True) / 2
    y = y + 0.3 * torch.randn(410, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)
    ).double()
    initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(400):
        adam.zero_grad()
        (0.5 * (model(x[:400]) - y[:400]).square().sum() / 400).backward()
        adam.step()
    train, queries = {"x": x[:400], "y": y[:400]}, {"x": x[400:], "y": y[400:]}
    return model, train, queries, initial


def flat_jacobian(model, batch):
    """``[B, d]``: gradient of the one output with respect to all parameters."""
    theta = {n: p.detach() for n, p in model.named_parameters()}
    blocks = jacrev(lambda t: functional_call(model, t, (batch["x"],)).squeeze(1))(theta)
    return torch.cat([blocks[n].flatten(1) for n in theta], dim=1)


def dense_scores(model, train, queries, examples, damping):
    """``∇f_qᵀ (C + λ)⁻¹ ∇L_m`` with the dense Gauss–Newton matrix, and the dot products."""
    jacobian, own = flat_jacobian(model, train), flat_jacobian(model, queries)
    curvature = jacobian.T @ jacobian / len(jacobian)
    with torch.no_grad():
        g = jacobian * (model(train["x"]) - train["y"])
        q = own * (model(queries["x"]) - queries["y"])
    solved = torch.linalg.solve(curvature + damping * torch.eye(len(curvature), dtype=g.dtype), q.T).T
    return solved @ g[examples].T, q @ g[examples].T


def ekfac_scores(model, train, queries, examples, damping):
    """EK-FAC of the same three layers, written out: every input is one token, the Gauss–Newton ``H`` is 1."""
    layers = [m for m in model if isinstance(m, torch.nn.Linear)]
    jacobian, own = flat_jacobian(model, train), flat_jacobian(model, queries)
    with torch.no_grad():
        g_scale, q_scale = model(train["x"]) - train["y"], model(queries["x"]) - queries["y"]
        a, total, start = train["x"], 0.0, 0
        for layer in layers:
            d_out, d_in = layer.weight.shape
            stop = start + d_out * (d_in + 1)

            def joined(j, start=start, stop=stop, d_out=d_out, d_in=d_in):
                w = j[:, start : start + d_out * d_in].reshape(-1, d_out, d_in)
                return torch.cat([w, j[:, start + d_out * d_in : stop, None]], dim=2)

            per_example = joined(jacobian)
            s = per_example[:, :, -1]  # the gradient of the output with respect to the layer's own output
            ones = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
            u_a = torch.linalg.eigh(ones.T @ ones / len(a)).eigenvectors
            u_s = torch.linalg.eigh(s.T @ s / len(a)).eigenvectors
            rotated = u_s.T @ per_example @ u_a
            corrected = rotated.square().mean(0)
            query = (u_s.T @ joined(own) @ u_a) * q_scale[:, :, None] / (corrected + damping)
            total = total + torch.einsum("qoi,noi->qn", query, (rotated * g_scale[:, :, None])[examples])
            a, start = torch.tanh(layer(a)), stop
    return total


def test_exact_influence_tracks_the_response_where_others_do_not(regression):
    model, train, queries, _ = regression
    jacobian = flat_jacobian(model, train)
    damping = 0.1 * float(jacobian.square().mean())
    problem = ProximalBregman(model, train, damping, outputs=plain_outputs, loss="squared")
    examples = torch.linspace(0, 399, 12).long().tolist()
    truth, norms = problem.response_scores(queries, examples, tolerance=1e-5, steps=800)
    assert float(norms.max()) < 5e-5, "the responses are not converged"
    exact, dot = dense_scores(model, train, queries, examples, damping)
    ekfac = ekfac_scores(model, train, queries, examples, damping)
    found = [float(pearson(v.flatten().numpy(), truth.flatten().numpy())) for v in (exact, ekfac, dot)]
    print(f"Pearson with PBRF: exact {found[0]:.3f}, EK-FAC {found[1]:.3f}, dot {found[2]:.3f}")
    assert found[0] >= 0.9
    assert found[0] > found[1] + 0.1 and found[1] > found[2] + 0.1


def test_the_objective_is_a_minimum_at_the_start_and_its_slope_is_the_influence(regression):
    model, train, queries, _ = regression
    problem = ProximalBregman(model, train, 0.05, outputs=plain_outputs, loss="squared")
    theta = {n: p.clone().requires_grad_(True) for n, p in problem.start.items()}
    none = torch.zeros(400, dtype=torch.float64)
    value = problem.objective(theta, none)
    gradients = torch.autograd.grad(value, list(theta.values()))
    assert float(value.detach()) == 0 and all(float(g.abs().max()) < 1e-10 for g in gradients)
    # The central difference quotient is the exact influence, to second order in ε.
    exact, _ = dense_scores(model, train, queries, [7], 0.05)
    slope = 0
    for sign in (1, -1):
        values, norms = problem.response_scores(queries, [7], epsilon=sign * 1e-4, tolerance=1e-9, steps=1000)
        assert float(norms[0]) < 1e-7
        slope = slope + values / 2
    error = float((slope - exact).norm() / exact.norm())
    print(f"central difference against the exact solve: {error:.2e}")
    assert error < 1e-3


def test_cross_entropy_on_a_language_model_and_damping_by_layer():
    """A linear bigram model: the Gauss–Newton matrix of softmax cross-entropy is the Hessian, known in closed form."""

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())

        def forward(self, ids):
            return type("Output", (), {"logits": self.table[ids]})

    model = Bigram()
    ids = torch.randint(0, 6, (12, 5), generator=torch.Generator().manual_seed(1))
    train, queries = {"input_ids": ids[:10]}, {"input_ids": ids[10:]}
    problem = ProximalBregman(model, train, {"table": 0.3})
    hessian = torch.zeros(6, 6, 6, dtype=torch.float64)
    p = model.table.detach().softmax(1)
    for token in ids[:10, :-1].flatten().tolist():
        hessian[token] += (torch.diag(p[token]) - torch.outer(p[token], p[token])) / 10
    gradients = []
    for row in ids:
        g = torch.zeros(6, 6, dtype=torch.float64)
        for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            g[a] += p[a] - torch.nn.functional.one_hot(torch.tensor(b), 6)
        gradients.append(g)
    damped = hessian + 0.3 * torch.eye(6, dtype=torch.float64)
    exact = torch.tensor(
        [[float((torch.linalg.solve(damped, gradients[q][..., None])[..., 0] * gradients[m]).sum()) for m in (2, 5)]
         for q in (10, 11)], dtype=torch.float64)  # fmt: skip
    up, down = (problem.response_scores(queries, [2, 5], epsilon=e, tolerance=1e-12)[0] for e in (1e-3, -1e-3))
    assert torch.allclose((up + down) / 2, exact, rtol=1e-4, atol=1e-5)
    both = 0
    for epsilon in (1e-3, -1e-3):
        group, _ = problem.response([2, 5], epsilon=epsilon, tolerance=1e-12)
        with torch.no_grad():
            both = both - (problem.losses(group, queries) - problem.losses(problem.start, queries)) / epsilon / 2
    assert torch.allclose(both, exact.sum(1), rtol=1e-4, atol=1e-5)
    adam, norm = problem.response(2, epsilon=0.01, optimizer="adam", steps=2000, rate=1e-2)
    newton, _ = problem.response(2, epsilon=0.01)
    assert norm < 1e-4 and torch.allclose(adam["table"], newton["table"], atol=1e-4)


def test_five_terms_add_up(regression):
    model, train, queries, initial = regression
    damping = 0.05
    problem = ProximalBregman(model, train, damping, outputs=plain_outputs, loss="squared")
    few = {k: v[:3] for k, v in queries.items()}
    examples = [3, 200]
    exact, dot = dense_scores(model, train, few, examples, damping)
    cold = {"optimizer": "adam", "steps": 60, "rate": 5e-3}
    found = five_terms(problem, few, examples, exact, dot, initial, cold_options=cold, steps=60, tolerance=1e-6)
    terms = [found.warm_start, found.proximity, found.non_convergence, found.linearisation, found.solver]
    assert torch.allclose(sum(terms), found.approximate - found.cold, atol=1e-12)
    assert torch.allclose(found.exact, exact / 400) and found.cold.shape == (3, 2)
    summary = found.to_dict()
    assert set(summary) == {"warm_start", "proximity", "non_convergence", "linearisation", "solver", "total"}
    assert summary["linearisation"] < summary["warm_start"] + summary["proximity"] + summary["non_convergence"]
    with pytest.raises(DataError, match=r"needed: \(3, 2\)"):
        five_terms(problem, few, examples, exact[:1], dot, initial)


def test_bad_problems_are_refused(regression):
    model, train, _, _ = regression
    with pytest.raises(ConfigError, match="damping must be above 0"):
        ProximalBregman(model, train, 0.0, outputs=plain_outputs, loss="squared")
    with pytest.raises(ConfigError, match="unknown loss"):
        ProximalBregman(model, train, 0.1, outputs=plain_outputs, loss="hinge")
    with pytest.raises(ConfigError, match="no parameter 'x'"):
        ProximalBregman(model, train, 0.1, parameters=["x"], outputs=plain_outputs, loss="squared")
    problem = ProximalBregman(model, train, 0.1, outputs=plain_outputs, loss="squared")
    with pytest.raises(DataError, match="not in the training set of 400"):
        problem.response(400)
    with pytest.raises(ConfigError, match="unknown optimizer"):
        problem.response(3, optimizer="sgd")
