"""TKFAC, Shampoo, corrected Shampoo and split factors against explicit per-sequence gradients in float64."""

from __future__ import annotations

from itertools import pairwise

import core_oracle as oracle
import pytest
import torch

from pyinf.capture import CaptureCache, InputGroups, PassSource, TracingSession, select_layers
from pyinf.checkpoint import Checkpoint
from pyinf.curvature import Factors
from pyinf.curvature.blocks import block_bounds, block_eigenbasis, check_block
from pyinf.curvature.fit_moments import MOMENT_CURVATURES, fit_moments
from pyinf.curvature.moments import ShampooMoments, gram_is_cheaper
from pyinf.data.batching import make_batches, prepare
from pyinf.errors import ConfigError
from pyinf.tasks import CausalLM

TOLERANCE = 1e-8


class Case:
    def __init__(self, name: str) -> None:
        self.model = oracle.make(name)
        self.train = oracle.data(8, 1)
        self.selection = select_layers(self.model)
        self.names = self.selection.names
        self.G = oracle.gradients(self.model, self.train, self.names)
        self.inputs, self.grads = oracle.tokens_seen(self.model, self.train, self.names)

    def fit(self, kind: str, batch: int = 3, checkpoint=None, cache=None, stop_after: int | None = None, **options):
        data = prepare(self.train, "train", self.model)
        with TracingSession(self.model, self.selection, CausalLM(), InputGroups()) as session:
            source = PassSource(session, data, make_batches(data.lengths, None, batch, None), cache)
            if stop_after is not None:
                source = Stopping(session, data, source.batches, cache)
                source.left = stop_after
            return fit_moments(source, kind, "train", len(data), "fp64", checkpoint, cache is not None, **options)

    def mean(self, function) -> dict[str, torch.Tensor]:
        return {n: torch.stack([function(g[n]) for g in self.G]).mean(0) for n in self.names}


class Killed(Exception):
    pass


class Stopping(PassSource):
    left = 0

    def _one(self, *args) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        super()._one(*args)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request):
    return Case(request.param)


def kronecker(layer, shared) -> torch.Tensor:
    """The curvature that the factors stand for, as one dense matrix on vec(G)."""
    Q = torch.kron(layer.basis, shared.basis)
    return Q @ torch.diag(layer.corrected.reshape(-1)) @ Q.T


@pytest.mark.parametrize("kind, power", [("shampoo", 0.5), ("shampoo2", 1.0)])
def test_shampoo_is_the_scaled_product_of_powers(case, kind, power):
    factors = case.fit(kind)
    left, right = case.mean(lambda G: G @ G.T), case.mean(lambda G: G.T @ G)
    assert factors.kind == kind and factors.sequences == len(case.train)
    for name in case.names:
        layer, shared = factors.layers[name], factors.inputs[name]
        assert layer.group == name and layer.rows == sum(len(e["input_ids"]) for e in case.train)
        assert oracle.error(layer.matrix(), left[name]) < TOLERANCE
        assert oracle.error(shared.matrix(), right[name]) < TOLERANCE

        def root(M):
            d, U = torch.linalg.eigh(M)
            return (U * d.clamp(min=0).pow(power)) @ U.T

        wanted = torch.kron(root(left[name]), root(right[name]))
        total = torch.stack([g[name].square().sum() for g in case.G]).mean()
        wanted *= total / wanted.trace()
        assert oracle.error(kronecker(layer, shared), wanted) < 1e-7  # the square root of a tiny eigenvalue
        assert float(layer.corrected.sum()) == pytest.approx(float(total), rel=1e-10)


def test_tkfac_keeps_the_trace(case):
    factors = case.fit("tkfac")
    for name in case.names:
        a, g = torch.cat(case.inputs[name]), torch.cat(case.grads[name])
        A = (a * g.square().sum(1, keepdim=True)).T @ a / len(a)
        S = (g * a.square().sum(1, keepdim=True)).T @ g / len(a)
        layer, shared = factors.layers[name], factors.inputs[name]
        assert oracle.error(shared.matrix(), A) < TOLERANCE and oracle.error(layer.matrix(), S) < TOLERANCE
        # Σ over positions of the trace of E[(g aᵀ)(g aᵀ)ᵀ], a mean over sequences
        trace = (a.square().sum(1) * g.square().sum(1)).sum() / len(case.train)
        assert float(layer.corrected.sum()) == pytest.approx(float(trace), rel=1e-10)
        assert oracle.error(kronecker(layer, shared), torch.kron(S, A) * trace / (S.trace() * A.trace())) < TOLERANCE


@pytest.mark.parametrize("kind", ["ec_shampoo", "ec_tkfac"])
def test_corrected_eigenvalues_in_the_own_bases(case, kind):
    factors, plain = case.fit(kind), case.fit(kind.removeprefix("ec_"))
    for name in case.names:
        layer, shared = factors.layers[name], factors.inputs[name]
        assert torch.equal(layer.basis, plain.layers[name].basis)
        wanted = torch.stack([(layer.basis.T @ g[name] @ shared.basis).square() for g in case.G]).mean(0)
        assert oracle.error(layer.corrected, wanted) < TOLERANCE


def test_inverse_against_the_dense_matrix(case):
    factors = case.fit("ec_shampoo")
    for name in case.names:
        V = case.G[0][name]
        dense = kronecker(factors.layers[name], factors.inputs[name])
        lam = 0.1 * float(factors.layers[name].corrected.mean())
        wanted = torch.linalg.solve(dense + lam * torch.eye(len(dense), dtype=V.dtype), V.reshape(-1))
        assert oracle.error(factors.ihvp({name: V})[name].reshape(-1), wanted) < TOLERANCE


def test_both_routes_of_the_second_moments(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 4, 4, 9, 10])
    a = torch.randn(10, 7, generator=generator, dtype=torch.float64)
    g = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    G = [g[i:j].T @ a[i:j] for i, j in pairwise(bounds)]
    for cheaper in (True, False):
        monkeypatch.setattr("pyinf.curvature.moments.gram_is_cheaper", lambda *_, c=cheaper: c)
        A, S = torch.zeros(7, 7, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
        ShampooMoments().accumulate(A, S, a, g, bounds)
        assert oracle.error(A.tril(), sum(x.T @ x for x in G).tril()) < 1e-12
        assert oracle.error(S.tril(), sum(x @ x.T for x in G).tril()) < 1e-12


def test_the_route_follows_the_length():
    assert gram_is_cheaper(64, 768, 3072) and not gram_is_cheaper(1 << 14, 768, 3072)


def test_blocks_bound_the_decomposition(case):
    factors = case.fit("ec_shampoo", factor_block=10)
    whole = case.mean(lambda G: G.T @ G)
    for name in case.names:
        layer, shared = factors.layers[name], factors.inputs[name]
        bounds = block_bounds(shared.basis.shape[0], 10)
        assert len(bounds) > 2
        mask = torch.block_diag(*[torch.ones(b - a, b - a) for a, b in pairwise(bounds)]) > 0
        assert not bool(shared.basis[~mask].any())
        assert oracle.error(shared.matrix(), whole[name] * mask) < TOLERANCE
        wanted = torch.stack([(layer.basis.T @ g[name] @ shared.basis).square() for g in case.G]).mean(0)
        assert oracle.error(layer.corrected, wanted) < TOLERANCE


def test_block_bounds():
    assert block_bounds(10, 4) == [0, 4, 7, 10] and block_bounds(8, 4) == [0, 4, 8]
    assert block_bounds(5, None) == [0, 5] and block_bounds(5, 5) == [0, 5] and block_bounds(3, 1) == [0, 1, 2, 3]
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="factor_block"):
            check_block(bad)
    matrix = torch.arange(9.0).reshape(3, 3)
    assert block_eigenbasis(matrix @ matrix.T)[0].shape == (3, 3)


def test_unknown_curvature_is_named(case):
    with pytest.raises(ConfigError, match="soap"):
        case.fit("soap")


def test_saved_loaded_and_batch_independent(case, tmp_path):
    factors = case.fit("ec_shampoo")
    factors.save(tmp_path)
    loaded = Factors.load(tmp_path)
    other = case.fit("ec_shampoo", batch=1)
    assert loaded.kind == "ec_shampoo"
    for name in case.names:
        assert torch.equal(loaded.layers[name].corrected, factors.layers[name].corrected)
        assert torch.equal(loaded.inputs[name].basis, factors.inputs[name].basis)
        assert oracle.error(other.layers[name].matrix(), factors.layers[name].matrix()) < 1e-10


@pytest.mark.parametrize("kind", sorted(MOMENT_CURVATURES))
def test_resumed_fit_is_bit_identical(kind, tmp_path):
    case = Case("llama")
    whole = case.fit(kind)
    for number, passes in enumerate([2] if not kind.startswith("ec_") else [2, 4]):
        directory = tmp_path / str(number)
        with pytest.raises(Killed):
            case.fit(kind, checkpoint=Checkpoint(directory, 0.0), stop_after=passes)
        resumed = case.fit(kind, checkpoint=Checkpoint(directory, 0.0))
        for name in case.names:
            assert torch.equal(resumed.layers[name].corrected, whole.layers[name].corrected)
            assert resumed.layers[name].rows == whole.layers[name].rows


def test_captured_batches_serve_the_second_pass(case, tmp_path):
    whole = case.fit("ec_shampoo")
    for cache in (CaptureCache(1 << 30), CaptureCache(0, 1 << 30, str(tmp_path))):
        factors = case.fit("ec_shampoo", cache=cache)
        cache.close()
        for name in case.names:
            assert torch.equal(factors.layers[name].corrected, whole.layers[name].corrected)
