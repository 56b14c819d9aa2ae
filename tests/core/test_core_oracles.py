"""A, S, Λ, the inverse and every kind of score against dense linear algebra in float64, to 1e-8."""

from __future__ import annotations

import core_oracle as oracle
import pytest
import torch

import pyinf

TOLERANCE = 1e-8
MODELS = ["gpt2", "llama"]


class Case:
    """A model, its data, a fitted attributor and the explicit gradients."""

    def __init__(self, name: str, method: str = "ekfac", **options) -> None:
        self.model = oracle.make(name)
        self.train, self.queries = oracle.data(9, 1), oracle.data(3, 2, low=6)
        self.attributor = pyinf.Attributor(
            self.model, method, fisher="empirical", **({"eigensolver": "fp64"} | options)
        ).fit(self.train)
        self.names = self.attributor.selection.names
        self.G = oracle.gradients(self.model, self.train, self.names)
        self.V = oracle.gradients(self.model, self.queries, self.names)

    def bases(self, name: str):
        layer = self.attributor.factors.layers[name]
        return layer, self.attributor.factors.inputs[layer.group]

    def dense_inverse(self, name: str, damping: float = 0.1, mode: str = "relative") -> torch.Tensor:
        """(Σ over eigenpairs of (Λ + λ)⁻¹ (u_S ⊗ u_A)(u_S ⊗ u_A)ᵀ), as one explicit matrix on vec(V)."""
        layer, shared = self.bases(name)
        d_out, d_in = layer.corrected.shape
        U_S = layer.basis if layer.basis is not None else torch.eye(d_out, dtype=torch.float64)
        U_A = shared.basis if shared.basis is not None else torch.eye(d_in, dtype=torch.float64)
        Q = torch.kron(U_S, U_A)
        Lam = torch.stack([(U_S.T @ g[name] @ U_A).square() for g in self.G]).mean(0).reshape(-1)
        lam = damping * Lam.mean() if mode == "relative" else damping
        return Q @ torch.diag(1 / (Lam + lam)) @ Q.T

    def preconditioned(self, damping: float = 0.1, mode: str = "relative"):
        inverse = {n: self.dense_inverse(n, damping, mode) for n in self.names}
        return [{n: (inverse[n] @ v[n].reshape(-1)).reshape(v[n].shape) for n in self.names} for v in self.V]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return Case(request.param)


def test_covariances_are_means_over_counted_positions(case):
    inputs, grads = oracle.tokens_seen(case.model, case.train, case.names)
    for name in case.names:
        layer, shared = case.bases(name)
        a, g = torch.cat(inputs[name]), torch.cat(grads[name])
        assert oracle.error(shared.matrix(), a.T @ a / len(a)) < TOLERANCE
        assert oracle.error(layer.matrix(), g.T @ g / len(g)) < TOLERANCE
        assert shared.rows == layer.rows == len(a) == sum(len(e["input_ids"]) for e in case.train)
        assert layer.bias == (getattr(dict(case.model.named_modules())[name], "bias", None) is not None)


def test_corrected_eigenvalues_are_means_over_sequences(case):
    for name in case.names:
        layer, shared = case.bases(name)
        wanted = torch.stack([(layer.basis.T @ g[name] @ shared.basis).square() for g in case.G]).mean(0)
        assert oracle.error(layer.corrected, wanted) < TOLERANCE
    assert case.attributor.factors.sequences == len(case.train)
    assert case.attributor.factors.tokens == sum(len(e["input_ids"]) for e in case.train)


@pytest.mark.parametrize("mode, damping", [("relative", 0.1), ("relative", 3.0), ("absolute", 0.02)])
def test_inverse(case, mode, damping):
    V = {n: torch.stack([v[n] for v in case.V]) for n in case.names}
    found = case.attributor.factors.ihvp(V, damping=damping, damping_mode=mode)
    wanted = case.preconditioned(damping, mode)
    for name in case.names:
        assert oracle.error(found[name], torch.stack([w[name] for w in wanted])) < TOLERANCE
        single = case.attributor.factors.ihvp({name: V[name][0]}, damping=damping, damping_mode=mode)[name]
        assert single.shape == V[name][0].shape and oracle.error(single, wanted[0][name]) < TOLERANCE


def test_pairwise_scores(case):
    scores = case.attributor.score(case.queries, case.train)
    assert scores.values.shape == (3, 9)
    assert oracle.error(scores.values, oracle.dot(case.preconditioned(), case.G)) < TOLERANCE


def test_absolute_damping_scores():
    case = Case("gpt2", damping=0.02, damping_mode="absolute")
    wanted = oracle.dot(case.preconditioned(0.02, "absolute"), case.G)
    assert oracle.error(case.attributor.score(case.queries, case.train).values, wanted) < TOLERANCE


def test_self_scores(case):
    inverse = {n: case.dense_inverse(n) for n in case.names}
    wanted = torch.stack([sum(g[n].reshape(-1) @ inverse[n] @ g[n].reshape(-1) for n in case.names) for g in case.G])
    found = case.attributor.self_score(case.train)
    assert oracle.error(found, wanted) < TOLERANCE and bool((found > 0).all())


def test_token_scores_are_the_positions_own_share(case):
    found = case.attributor.score(case.queries, case.train, granularity="token").values
    inputs, grads = oracle.tokens_seen(case.model, case.train, case.names)
    X = case.preconditioned()
    wanted = torch.zeros_like(found)
    for q in range(3):
        for i in range(9):
            n = len(case.train[i]["input_ids"])
            wanted[q, i, :n] = sum(((grads[m][i] @ X[q][m]) * inputs[m][i]).sum(1) for m in case.names)
    assert found.shape == (3, 9, max(len(e["input_ids"]) for e in case.train))
    assert oracle.error(found, wanted) < TOLERANCE
    assert oracle.error(found.sum(2), case.attributor.score(case.queries, case.train).values) < TOLERANCE


def test_token_scores_stand_where_the_user_put_the_tokens(case):
    moved = [oracle.padded(e, i % 3, (i + 1) % 2) for i, e in enumerate(case.train)]
    plain = case.attributor.score(case.queries, case.train, granularity="token").values
    found = case.attributor.score(case.queries, moved, granularity="token").values
    for i, e in enumerate(case.train):
        n, left = len(e["input_ids"]), i % 3
        assert oracle.error(found[:, i, left : left + n], plain[:, i, :n]) < TOLERANCE
        rest = found[:, i].clone()
        rest[:, left : left + n] = 0
        assert not rest.any()


def test_module_scores(case):
    found = case.attributor.score(case.queries, case.train, per_module=True)
    X = case.preconditioned()
    assert list(found.values) == case.names
    for name in case.names:
        wanted = oracle.dot([{name: x[name]} for x in X], [{name: g[name]} for g in case.G])
        assert oracle.error(found.values[name], wanted) < TOLERANCE
    assert oracle.error(found.total(), oracle.dot(X, case.G)) < TOLERANCE
    both = case.attributor.score(case.queries, case.train, per_module=True, granularity="token")
    assert oracle.error(both.total(), found.total()) < TOLERANCE


def test_top_k_equals_the_matrix(case):
    dense = case.attributor.score(case.queries, case.train)
    for k in (1, 4, 9, 50):
        kept = case.attributor.score(case.queries, case.train, topk=k, batch_size=2)
        values, indices = dense.topk(k)
        assert kept.values is None and kept.kept[1].shape == (3, min(k, 9))
        assert torch.equal(kept.topk(k)[1], indices) if k <= 9 else torch.equal(kept.kept[1], indices)
        assert oracle.error(kept.kept[0], values) < TOLERANCE


def test_a_grid_of_dampings_is_one_fit_each(case):
    grid = case.attributor.score(case.queries, case.train, dampings=[0.01, 0.1, 10.0])
    for damping in (0.01, 0.1, 10.0):
        wanted = oracle.dot(case.preconditioned(damping), case.G)
        assert oracle.error(grid[damping].values, wanted) < TOLERANCE
        assert grid[damping].meta["damping"] == damping
    token = case.attributor.score(case.queries, case.train, dampings=[0.5, 0.1], granularity="token")
    assert oracle.error(token[0.1].total(), grid[0.1].values) < TOLERANCE


# -- low rank ----------------------------------------------------------------------------------------------------------


def _with_rank(case, rank):
    other = pyinf.Attributor(case.model, fisher="empirical", query_rank=rank)
    other.factors = case.attributor.factors
    other._run.groups.of_layer = dict(case.attributor._run.groups.of_layer)
    return other


@pytest.mark.parametrize("rank", [16, 17, 1000])
def test_full_rank_is_dense(case, rank):
    found = _with_rank(case, rank).score(case.queries, case.train)
    assert oracle.error(found.values, case.attributor.score(case.queries, case.train).values) < TOLERANCE


def test_energy_is_reached_and_reported_honestly(case):
    X = case.preconditioned()
    for energy in (0.5, 0.9, "0.999"):
        other = _with_rank(case, energy)
        scores = other.score(case.queries, case.train)
        wanted, reported = torch.zeros(3, 9, dtype=torch.float64), []
        for q in range(3):
            shares = []
            for name in case.names:
                U, s, Vh = torch.linalg.svd(X[q][name], full_matrices=False)
                share = s.square().cumsum(0) / s.square().sum()
                r = int((share < float(energy)).sum()) + 1
                cut = (U[:, :r] * s[:r]) @ Vh[:r]
                shares.append(float(share[r - 1]))
                wanted[q] += torch.stack([(cut * g[name]).sum() for g in case.G])
            reported.append(min(shares))
        assert scores.meta["captured_energy"] == pytest.approx(reported, abs=2e-6)
        assert min(scores.meta["captured_energy"]) >= float(energy) - 1e-6
        assert oracle.error(scores.values, wanted) < TOLERANCE


def test_fixed_rank_keeps_and_reports_its_share(case):
    X = case.preconditioned()
    exact = case.attributor.score(case.queries, case.train).values
    last = 0.0
    for rank in (1, 2, 4, 8):
        scores = _with_rank(case, rank).score(case.queries, case.train)
        best = [
            min(float((s := torch.linalg.svdvals(x[n]).square())[:rank].sum() / s.sum()) for n in case.names) for x in X
        ]
        found = scores.meta["captured_energy"]
        assert all(f <= b + 1e-6 and f > 0.8 * b for f, b in zip(found, best, strict=True))
        assert min(found) >= last - 1e-3
        last = min(found)
        # |⟨X − LR, G⟩| ≤ ‖X − LR‖‖G‖: the reported energy bounds the error of every score.
        for q in range(3):
            bound = sum(
                (1 - found[q] + 1e-6) ** 0.5 * float(X[q][n].norm()) * torch.stack([g[n].norm() for g in case.G])
                for n in case.names
            )
            assert bool(((scores.values[q] - exact[q]).abs() <= bound).all())


# -- other curvatures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_kfac_eigenvalues_are_tokens_per_sequence_times_the_outer_product(name):
    case = Case(name, "kfac")
    ratio = sum(len(e["input_ids"]) for e in case.train) / len(case.train)
    wanted = torch.zeros(3, 9, dtype=torch.float64)
    inputs, grads = oracle.tokens_seen(case.model, case.train, case.names)
    for layer_name in case.names:
        layer, shared = case.bases(layer_name)
        a, g = torch.cat(inputs[layer_name]), torch.cat(grads[layer_name])
        A, S = a.T @ a / len(a), g.T @ g / len(g)
        assert oracle.error(layer.corrected, ratio * torch.outer(layer.eigenvalues, shared.eigenvalues)) < TOLERANCE
        full = ratio * torch.kron(S, A)
        lam = 0.1 * full.diagonal().sum() / full.shape[0]
        inverse = torch.linalg.inv(full + lam * torch.eye(len(full), dtype=torch.float64))
        X = [{layer_name: (inverse @ v[layer_name].reshape(-1)).reshape(v[layer_name].shape)} for v in case.V]
        wanted += oracle.dot(X, [{layer_name: g[layer_name]} for g in case.G])
    assert oracle.error(case.attributor.score(case.queries, case.train).values, wanted) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_diagonal(name):
    case = Case(name, "diagonal")
    X = []
    for v in case.V:
        x = {}
        for n in case.names:
            Lam = torch.stack([g[n].square() for g in case.G]).mean(0)
            assert oracle.error(case.attributor.factors.layers[n].corrected, Lam) < TOLERANCE
            x[n] = v[n] / (Lam + 0.1 * Lam.mean())
        X.append(x)
    assert oracle.error(case.attributor.score(case.queries, case.train).values, oracle.dot(X, case.G)) < TOLERANCE
    wanted = torch.stack(
        [
            sum(
                (
                    g[n].square()
                    / (
                        case.attributor.factors.layers[n].corrected
                        + 0.1 * case.attributor.factors.layers[n].corrected.mean()
                    )
                ).sum()
                for n in case.names
            )
            for g in case.G
        ]
    )
    assert oracle.error(case.attributor.self_score(case.train), wanted) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_gradient_products(name):
    model, train, queries = oracle.make(name), oracle.data(9, 1), oracle.data(3, 2, low=6)
    attributor = pyinf.Attributor(model, "grad_dot")
    names = attributor.selection.names
    G, V = oracle.gradients(model, train, names), oracle.gradients(model, queries, names)
    products = oracle.dot(V, G)
    assert oracle.error(attributor.score(queries, train).values, products) < TOLERANCE
    assert oracle.error(attributor.self_score(train), oracle.dot(G, G).diagonal()) < TOLERANCE
    norms = oracle.dot(V, V).diagonal().sqrt()[:, None] * oracle.dot(G, G).diagonal().sqrt()
    cosine = pyinf.attribute(model, train, queries, "grad_cos").values
    assert oracle.error(cosine, products / norms) < TOLERANCE
    same = pyinf.attribute(model, train, train, "grad_cos").values
    assert torch.allclose(same.diagonal(), torch.ones(9, dtype=torch.float64), atol=1e-12)
    grid = attributor.score(queries, train, dampings=[0.1, 1.0])
    assert torch.equal(grid[0.1].values, grid[1.0].values) and grid[0.1].meta["damping"] is None


def test_a_proponent_is_positive():
    """A training step on a proponent lowers the query's loss: the sign convention, checked on the model itself."""
    model, train, queries = oracle.make("gpt2"), oracle.data(4, 1), oracle.data(1, 2)
    names = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]
    scores = pyinf.attribute(model, train, queries, "grad_dot", modules=names).values[0]
    for i, G in enumerate(oracle.gradients(model, train, names)):
        modules = dict(model.named_modules())
        step = 1e-7
        with torch.no_grad():
            losses = []
            for sign in (-1, 2, -1):  # W − step·G, W + step·G, W
                for n in names:
                    modules[n].weight += sign * step * G[n][:, :-1].T
                    modules[n].bias += sign * step * G[n][:, -1]
                losses.append(oracle.causal_loss(model, queries[0]))
        falls = float(losses[1] - losses[0]) / (2 * step)
        assert falls == pytest.approx(float(scores[i]), rel=1e-4)


# -- eigensolvers ------------------------------------------------------------------------------------------------------


def test_any_orthogonal_basis_keeps_the_correction_exact():
    case = Case("llama", eigensolver="orthogonal-iteration")
    wanted = oracle.dot(case.preconditioned(), case.G)  # Λ measured in whatever basis the solver gave
    assert oracle.error(case.attributor.score(case.queries, case.train).values, wanted) < TOLERANCE
    for name in case.names:
        layer, shared = case.bases(name)
        for basis in (layer.basis, shared.basis):
            assert oracle.error(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64)) < 1e-10
