"""Layouts, checks, and the ops that are judged by what they promise rather than by an elementwise reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyinf import ops
from pyinf.errors import ConfigError
from pyinf.ops import costs, torch_backend
from tests.ops.cases import basis, layer, packed_signs, randn

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def padded():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    g = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    a = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    return g, a, mask, torch.einsum("bto,bti,bt->boi", g, a, mask.double())


def test_padding_and_masks(padded):
    g, a, mask, G = padded
    V = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.allclose(ops.dense_scores(g, a, V, mask=mask), torch.einsum("qoi,boi->qb", V, G))
    tokens = ops.dense_scores(g, a, V, mask=mask, per_token=True)
    assert tokens.shape == (2, 3, 5)
    assert torch.all(tokens[:, ~mask] == 0)
    assert torch.allclose(tokens.sum(2), torch.einsum("qoi,boi->qb", V, G))
    assert torch.allclose(ops.gradient_norm(g, a, mask=mask), G.flatten(1).norm(dim=1))
    assert torch.allclose(ops.gradient_dot(g, a, g, a, mask1=mask, mask2=mask), G.flatten(1) @ G.flatten(1).T)
    Lam = ops.accumulate_squared_gradients(torch.zeros(4, 6, dtype=torch.float64), g, a, mask=mask)
    assert torch.allclose(Lam, G.square().sum(0))
    C = ops.accumulate_covariance(torch.zeros(7, 7, dtype=torch.float64), a, bias=True, mask=mask)
    rows = torch.cat([a[mask], torch.ones(int(mask.sum()), 1, dtype=torch.float64)], 1)
    assert torch.allclose(ops.symmetrize_(C), rows.T @ rows)
    packed = ops.pack(g.flatten(0, 1), a.flatten(0, 1), torch.tensor([0, 5, 10, 15]), mask.flatten())
    assert packed.offsets.tolist() == [0, 3, 6, 6]


def test_nothing_masked_is_a_view(padded):
    g, a, mask, _ = padded
    packed = ops.pack(g, a, mask=torch.ones_like(mask))
    assert packed.g.data_ptr() == g.data_ptr()
    assert packed.offsets.tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_low_rank_preconditioning(backend):
    x = layer("odd", torch.float64)
    d_out, d_in = x.g.shape[1], x.a.shape[1]
    U_S, U_A = basis(d_out, 1, torch.float64), basis(d_in, 2, torch.float64)
    Lam = randn(d_out, d_in, seed=3, dtype=torch.float64).abs()
    G = torch.stack([x.g[s:e].T @ x.a[s:e] for s, e in zip(x.offsets, x.offsets[1:], strict=False)])
    exact = ops.precondition(G, U_S, U_A, Lam, 0.2)
    singular = torch.linalg.svdvals(exact)
    for rank in (1, 6, 100):
        with ops.use_backend(backend):
            L, R, energy = ops.precondition_low_rank(
                x.g, x.a, U_S, U_A, Lam, 0.2, rank, offsets=x.offsets, power_iterations=3
            )
        r = min(rank, d_out, d_in)
        assert L.shape == (4, d_out, r)
        assert R.shape == (4, r, d_in)
        best = singular[:, :r].square().sum(1) / singular.square().sum(1).clamp_min(1e-300)
        best[1] = 1.0  # the sequence without tokens
        assert torch.all(energy >= 0.99 * best)
        lost = (exact - L @ R).square().sum((1, 2))
        total = exact.square().sum((1, 2))
        assert torch.allclose(lost, (1 - energy) * total, atol=1e-10 * float(total.max()))
        assert torch.all(L[1] == 0)
        if rank == 6:  # a prefix is a lower rank: column norms are singular values, split evenly and falling
            assert torch.allclose(L.square().sum(1), R.square().sum(2))
            assert torch.all(L.square().sum(1).diff(dim=1) <= 1e-12)


def test_projection_epilogues():
    x = layer("odd", torch.float32)
    plain = ops.project_gradients(x.g, x.a, x.offsets, k_g=3, k_a=5)
    half = ops.project_gradients(x.g, x.a, x.offsets, k_g=3, k_a=5, epilogue="bfloat16")
    assert torch.equal(half, plain.bfloat16())
    values, scale = ops.project_gradients(x.g, x.a, x.offsets, k_g=3, k_a=5, epilogue="int8")
    assert values.dtype == torch.int8
    assert scale[1] == 0  # the sequence without tokens
    assert torch.all((values * scale[:, None, None] - plain).abs() <= 0.5001 * scale[:, None, None])
    bits = ops.project_gradients(x.g, x.a, x.offsets, k_g=3, k_a=5, epilogue="sign")
    assert bits.shape == (4, 2)
    assert torch.equal(ops.unpack_signs(bits, 15), 1 - 2 * (plain.flatten(1) < 0).float())


def test_coordinate_masks():
    x = layer("odd", torch.float64)
    rows, columns = torch.tensor([0, 5, 5, 32]), torch.tensor([64, 0, 3, 3])
    found = ops.select_gradient_coordinates(x.g, x.a, rows, columns, x.offsets)
    for b in range(4):
        part = slice(int(x.offsets[b]), int(x.offsets[b + 1]))
        assert torch.allclose(found[b], (x.g[part].T @ x.a[part])[rows, columns])
    assert torch.equal(ops.select_coordinates(x.a, columns), x.a[:, columns])


def test_sparse_projection_of_factors_is_that_of_the_gradients():
    x = layer("odd", torch.float64)
    dense = torch.stack([x.g[i:j].T @ x.a[i:j] for i, j in itertools.pairwise(x.offsets.tolist())])
    expected = ops.sparse_projection(dense.flatten(1), 50, 3, 2)
    assert torch.allclose(ops.sparse_projection_factors(x.g, x.a, x.offsets, k=50, seed=3, nnz=2), expected)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_scan_of_signs(backend):
    """Many equal scores: the lower index wins, however the rows are cut, and padding bits never count."""
    for n, d, k in ((3000, 21, 40), (70, 130, 70), (5, 8, 9), (0, 8, 3)):
        _, rows = packed_signs(n, d, 1)
        queries, bits = packed_signs(4, d, 2)
        scale = torch.rand(n, generator=torch.Generator().manual_seed(0)).round(decimals=1)
        for factor in (None, scale):
            with ops.use_backend("reference"):
                expected = ops.scan_topk(queries, rows, k, "1bit", factor)
            with ops.use_backend(backend):
                for found in (ops.scan_topk(queries, rows, k, "1bit", factor),):
                    assert torch.equal(found[0], expected[0])
                    assert torch.equal(found[1], expected[1])
                if d % 8 == 0:
                    assert torch.equal(ops.scan_topk(bits, rows, k, "1bit", factor)[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_scan_of_values(dtype, monkeypatch):
    monkeypatch.setattr(torch_backend, "_workspace", lambda device: 1 << 10)  # several chunks
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 4, (5000, 6), generator=generator).to(dtype)
    queries = torch.randint(-3, 4, (5, 6), generator=generator).to(dtype if dtype.is_floating_point else torch.float32)
    form = "bfloat16" if dtype.is_floating_point else "int8"
    with ops.use_backend("reference"):
        expected = ops.scan_topk(queries, rows, 50, form)
    with ops.use_backend("torch"):
        found = ops.scan_topk(queries, rows, 50, form)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return out


def test_memory_does_not_grow_with_the_batch():
    count, length, d = 64, 2, 256
    g, a = torch.randn(count * length, d), torch.randn(count * length, d)
    offsets, V = torch.arange(count + 1) * length, torch.randn(2, d, d)
    with Largest() as seen:
        torch_backend.accumulate_squared_gradients(torch.zeros(d, d), g, a, offsets)
        torch_backend.dense_scores(torch.zeros(2, count), g, a, offsets, V)
    assert seen.elements <= 1 << 20 < count * d * d


def test_bad_arguments():
    g, a = torch.ones(4, 3), torch.ones(4, 5)
    Lam = torch.zeros(3, 5)
    bad = [
        lambda: ops.accumulate_squared_gradients(torch.zeros(5, 3), g, a),
        lambda: ops.accumulate_squared_gradients(Lam.bfloat16(), g, a),
        lambda: ops.accumulate_squared_gradients(Lam, g.double(), a.double()),
        lambda: ops.accumulate_squared_gradients(Lam, g, a[:3]),
        lambda: ops.accumulate_squared_gradients(Lam, g, a, torch.tensor([0, 3])),
        lambda: ops.accumulate_squared_gradients(Lam, g, a, torch.tensor([0, 9, 4])),
        lambda: ops.accumulate_squared_gradients(Lam, g, a, torch.tensor([1, 4])),
        lambda: ops.accumulate_squared_gradients(Lam, g, a, mask=torch.ones(3, dtype=torch.bool)),
        lambda: ops.accumulate_covariance(torch.zeros(5, 5), a, bias=True),
        lambda: ops.symmetrize_(torch.zeros(2, 3)),
        lambda: ops.precondition(torch.ones(1, 3, 4), None, None, Lam, 0.1),
        lambda: ops.precondition(torch.ones(1, 3, 5), torch.ones(2, 2), None, Lam, 0.1),
        lambda: ops.precondition(torch.ones(1, 3, 5), None, None, Lam, -0.1),
        lambda: ops.precondition_low_rank(g, a, None, None, Lam, 0.1, 0),
        lambda: ops.dense_scores(g, a, torch.ones(2, 5, 3)),
        lambda: ops.dense_scores(g, a, torch.ones(2, 3, 5), out=torch.zeros(2, 2)),
        lambda: ops.low_rank_scores(g, a, torch.ones(2, 3, 1), torch.ones(2, 2, 5)),
        lambda: ops.gradient_dot(g, a, a, a),
        lambda: ops.project_gradients(g, a, k_g=2),
        lambda: ops.project_gradients(g, a, k_g=2, k_a=2, epilogue="int4"),
        lambda: ops.project_gradients(g, a, P_g=torch.ones(5, 2), k_a=2),
        lambda: ops.random_projection(g, 0),
        lambda: ops.sparse_projection(g, 2, nnz=0),
        lambda: ops.sparse_projection_factors(g, a),
        lambda: ops.scan_topk(g, a, 2),
        lambda: ops.scan_topk(g, g, 2, "int8"),
        lambda: ops.scan_topk(g, g, 2, "float8"),
        lambda: ops.scan_topk(g, g, 2, scale=torch.ones(3)),
    ]
    for call in bad:
        with pytest.raises(ConfigError):
            call()


def test_costs_are_the_formulas():
    assert costs.rotate_first_flops(10, 3, 5) == 2 * 10 * (25 + 9 + 15)
    assert costs.sandwich_flops(10, 3, 5, 2) == 2 * 10 * 15 + 2 * 2 * 15 * 8
    # published crossovers: tokens a sequence below which rotating first is cheaper
    for d_out, d_in, tokens in ((14336, 4096, 4868), (8192, 2048, 2410), (3072, 768, 904)):
        assert costs.rotate_first_is_cheaper(tokens - 1, d_out, d_in, 1)
        assert not costs.rotate_first_is_cheaper(tokens + 1, d_out, d_in, 1)
    sandwich = 2 * 128 * 4096 * 14336 + 4 * 4096 * 14336 * (4096 + 14336) / 1
    assert sandwich / costs.sketch_flops(128, 14336, 4096, 64, 1) > 10
    assert costs.norm_is_ghost(16, 768, 768)
    assert not costs.norm_is_ghost(2048, 768, 768)
    assert costs.dot_is_ghost(64, 64, 768, 768, 4, 4)
    assert not costs.dot_is_ghost(8192, 8192, 768, 768, 8, 8)
    assert costs.low_rank_is_cheaper(8192, 14336, 4096, 16, 64, 8)
    assert not costs.low_rank_is_cheaper(8192, 14336, 4096, 500, 64, 8)
    assert costs.ghost_norm_flops([3, 4], 5, 6) == 2 * (9 + 16) * 12
    assert costs.materialised_norm_flops([3, 4], 5, 6) == 2 * (4 + 5) * 30
