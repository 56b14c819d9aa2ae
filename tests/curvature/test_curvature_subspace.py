"""EK-FAC with a Newton step in a subspace against dense linear algebra over all layers at once, in float64."""

from __future__ import annotations

from itertools import pairwise

import core_oracle as oracle
import pytest
import torch

from pyinf.capture import InputGroups, PassSource, TracingSession, select_layers
from pyinf.curvature import fit_factors
from pyinf.curvature.gradients import GradientSet, LayerGradients
from pyinf.curvature.subspace import fit_subspace, shrinkage
from pyinf.data.batching import make_batches, prepare
from pyinf.errors import ConfigError
from pyinf.tasks import CausalLM

TOLERANCE = 1e-8
LAYERS = ["*.0.*q_proj", "*.0.*v_proj", "*.1.*down_proj", "*.0.attn.c_attn", "*.1.attn.c_proj"]


class Case:
    """Everything twice: streamed, and as explicit matrices in the eigenbases of all layers together."""

    def __init__(self, name: str) -> None:
        self.model = oracle.make(name)
        self.train, self.queries = oracle.data(10, 1), oracle.data(3, 2)
        self.selection = select_layers(self.model, LAYERS)
        self.names = self.selection.names
        self.data = prepare(self.train, "train", self.model)
        self.groups = InputGroups()
        self.session = TracingSession(self.model, self.selection, CausalLM(), self.groups)
        with self.session:
            source = PassSource(self.session, self.data, make_batches(self.data.lengths, None, 3, None))
            self.factors = fit_factors(source, "ekfac", "train", len(self.data), "fp64")
        self.dampings = self.factors.dampings(0.1, "relative")
        self.G = self.rotate(oracle.gradients(self.model, self.train, self.names))
        self.V = oracle.gradients(self.model, self.queries, self.names)
        self.Lam = torch.cat([self.factors.layers[n].corrected.reshape(-1) for n in self.names])
        sizes = [self.factors.layers[n].corrected.numel() for n in self.names]
        self.lam = torch.cat(
            [self.Lam.new_full((s,), self.dampings[n]) for n, s in zip(self.names, sizes, strict=True)]
        )

    def rotate(self, gradients) -> torch.Tensor:
        """``[D, n]``: columns in the eigenbases."""
        parts = []
        for name in self.names:
            layer = self.factors.layers[name]
            U_A = self.factors.inputs[layer.group].basis
            parts.append(torch.stack([(layer.basis.T @ g[name] @ U_A).reshape(-1) for g in gradients]))
        return torch.cat(parts, dim=1).T

    def gradients(self, indices, budget: int = 1 << 30) -> GradientSet:
        batches = [list(indices)[i : i + 2] for i in range(0, len(indices), 2)]

        def run(consumer_of):
            with TracingSession(self.model, self.selection, CausalLM(), self.groups) as session:
                PassSource(session, self.data, batches).run(lambda *_: consumer_of(), "train", "subspace")

        return GradientSet(run, self.factors, sum(self.data.counted[i] for i in indices), budget, batches)

    def solve(self, inverse) -> torch.Tensor:
        """``[D, Q]`` of the queries, in the eigenbases."""
        found = inverse.ihvp({n: torch.stack([v[n] for v in self.V]) for n in self.names})
        return self.rotate([{n: found[n][q] for n in self.names} for q in range(len(self.V))])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request):
    return Case(request.param)


def dense(case: Case, span, moments, rank=None, gamma=None) -> torch.Tensor:
    """The documented formula with explicit matrices: ``H⁻¹ [D, D]``."""
    G, M = case.G[:, span], case.G[:, moments]
    D = len(case.Lam)
    U, _ = orthonormal((case.Lam + case.lam).rsqrt()[:, None] * G, rank)
    w = (case.Lam + case.lam).rsqrt()[:, None] * M
    r = w - U @ (U.T @ w)
    rho, start = torch.empty(D, dtype=torch.float64), 0
    for name in case.names:
        part = slice(start, start + case.factors.layers[name].corrected.numel())
        start = part.stop
        rho[part] = (r[part].square().sum() / w[part].square().sum()).clamp(max=1)
    W = (rho * case.Lam + case.lam).rsqrt()
    U, _ = orthonormal(W[:, None] * G, rank)
    c = U.T @ (W[:, None] * M)
    sigma, target = c @ c.T / c.shape[1], U.T @ torch.diag(W * case.Lam * W) @ U
    if gamma is None:
        spread = sum((torch.outer(x, x) - sigma).square().sum() for x in c.T) / c.shape[1] ** 2
        gamma = min(1.0, float(spread / (sigma - target).square().sum()))
    middle = (1 - gamma) * sigma + gamma * target + U.T @ torch.diag(W * case.lam * W) @ U
    eye = torch.eye(U.shape[1], dtype=torch.float64)
    return W[:, None] * (torch.eye(D, dtype=torch.float64) + U @ (torch.linalg.inv(middle) - eye) @ U.T) * W


def orthonormal(X: torch.Tensor, rank=None) -> tuple[torch.Tensor, torch.Tensor]:
    U, s, _ = torch.linalg.svd(X, full_matrices=False)
    kept = s > s[0] * 1e-6
    return U[:, kept][:, :rank], s


def test_all_gradients_give_the_exact_damped_empirical_fisher(case):
    """The limit: Woodbury on the training gradients, cross-layer blocks included."""
    everything = range(len(case.train))
    inverse = fit_subspace(case.factors, case.dampings, case.gradients(everything), None, gamma=0.0)
    assert inverse.facts["captured"] == pytest.approx(1) and inverse.facts["rank"] == len(case.train)
    v = case.rotate(case.V)
    C = case.G @ case.G.T / case.G.shape[1]
    wanted = torch.linalg.solve(C + torch.diag(case.lam), v)
    assert oracle.error(case.solve(inverse), wanted) < TOLERANCE
    # … and it is not what EK-FAC or the exact blocks of single layers give
    assert oracle.error(v / (case.Lam + case.lam)[:, None], wanted) > 1e-2


@pytest.mark.parametrize("rank, gamma", [(None, None), (None, 0.0), (3, None), (2, 0.3)])
@pytest.mark.parametrize("split", [True, False])
def test_against_the_dense_formula(case, rank, gamma, split):
    span, moments = range(0, 4), range(4, 10) if split else range(0, 4)
    inverse = fit_subspace(
        case.factors, case.dampings, case.gradients(span), case.gradients(moments) if split else None, rank, gamma
    )
    wanted = dense(case, list(span), list(moments), rank, gamma)
    assert oracle.error(case.solve(inverse), wanted @ case.rotate(case.V)) < TOLERANCE
    assert bool((torch.linalg.eigvalsh(wanted) > 0).all())
    own = (case.G * (wanted @ case.G)).sum(0)
    assert oracle.error(inverse.self_scores(case.gradients(range(10))), own) < TOLERANCE


def test_full_shrinkage_outside_the_span_is_ekfac(case):
    inverse = fit_subspace(
        case.factors, case.dampings, case.gradients(range(4)), case.gradients(range(4, 10)), gamma=1.0, complement=1.0
    )
    wanted = case.rotate(case.V) / (case.Lam + case.lam)[:, None]
    assert oracle.error(case.solve(inverse), wanted) < TOLERANCE
    assert inverse.facts["eigenvalues"] == pytest.approx([1, 1])


def test_layers_by_layers_within_a_budget(case):
    span, moments = range(4), range(4, 10)
    whole = fit_subspace(case.factors, case.dampings, case.gradients(span), case.gradients(moments))
    small = case.gradients(span, budget=1)
    assert len(small.groups) == len(case.names)
    pieces = fit_subspace(case.factors, case.dampings, small, case.gradients(moments, budget=20_000))
    assert small._held is None
    assert oracle.error(case.solve(pieces), case.solve(whole)) < 1e-11


def test_sampled_moments_that_follow_ekfac_leave_it_alone(case):
    """Gradients drawn from EK-FAC's own model: shrinkage sees only noise, and M stays near one."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    assert shrinkage(c, c @ c.T / 40, torch.eye(6, dtype=torch.float64)) > 0.5
    c[0] *= 4  # a direction with sixteen times the expected curvature is believed
    assert shrinkage(c, c @ c.T / 40, torch.eye(6, dtype=torch.float64)) < 0.2


def test_curvature_from_products(case):
    """The exact matrix in the span, whatever gradients were sampled: here the empirical Fisher of all examples."""
    C, bases = case.G @ case.G.T / case.G.shape[1], case.factors

    def product(vectors):
        flat = case.rotate([{n: vectors[n][i] for n in case.names} for i in range(len(vectors[case.names[0]]))])
        out, start, found = {}, 0, C @ flat
        for name in case.names:
            layer = bases.layers[name]
            part = found[start : start + layer.corrected.numel()].T.reshape(-1, *layer.corrected.shape)
            start += layer.corrected.numel()
            out[name] = layer.basis @ part @ bases.inputs[layer.group].basis.T
        return out

    span, others = case.gradients(range(4)), case.gradients(range(4, 10))
    inverse = fit_subspace(case.factors, case.dampings, span, others, complement=1.0, product=product)
    W = (case.Lam + case.lam).rsqrt()
    U, _ = orthonormal(W[:, None] * case.G[:, :4])
    M = U.T @ (W[:, None] * (C + torch.diag(case.lam)) * W) @ U
    v = W[:, None] * case.rotate(case.V)
    wanted = W[:, None] * (v + U @ (torch.linalg.inv(M) - torch.eye(4, dtype=M.dtype)) @ (U.T @ v))
    assert inverse.facts["shrinkage"] == 0 and oracle.error(case.solve(inverse), wanted) < TOLERANCE


@pytest.mark.parametrize("options", [{"rank": 0}, {"gamma": 1.5}, {"complement": -0.1}])
def test_impossible_options(case, options):
    with pytest.raises(ConfigError, match="subspace_"):
        fit_subspace(case.factors, case.dampings, case.gradients(range(4)), None, **options)


@pytest.mark.parametrize("bounds", [[0, 3, 6], [0, 2, 6], [0, 0, 6]])
def test_rows_of_gradients(bounds, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    a = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    gradients = LayerGradients(g, a, bounds)
    wanted = torch.stack([g[i:j].T @ a[i:j] for i, j in pairwise(bounds)])
    monkeypatch.setattr("pyinf.curvature.gradients._WORKSPACE", 16)
    blocks = list(gradients.blocks())
    assert len(blocks) == 3
    assert oracle.error(torch.cat([gradients.rows(rows) for rows in blocks], dim=1), wanted) < 1e-12
