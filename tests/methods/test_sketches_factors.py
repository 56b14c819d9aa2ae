"""Factor rows and LoRIF against explicit power iteration, singular values, dense eigenvectors and dense inverses."""

from __future__ import annotations

import json

import pytest
import torch
from sketch_oracle import dense, error, examples, gradients, tiny, tokens

import pyinf
from pyinf.store.build import build_store, query_rows
from pyinf.store.compress.base import layer_seed
from pyinf.store.compress.factored import factor_start, power_factors, rebuilt, token_factors
from pyinf.store.compress.lorif import LoRIF, LowRankCurvature, streamed_curvature
from pyinf.store.reader import Store
from pyinf.store.sections import layout, section_scores

TRAIN, QUERIES = examples(14, 1), examples(3, 2)


def explicit_power(G: torch.Tensor, start: torch.Tensor, iterations: int) -> torch.Tensor:
    """``U UᵀG`` after so many steps of subspace iteration on ``GᵀG``, each basis made by Gram–Schmidt."""
    out = []
    for single in G:
        V = start.clone()
        for _ in range(iterations):
            Y = single @ V
            columns: list[torch.Tensor] = []
            for c in range(Y.shape[1]):
                y = Y[:, c]
                for _ in range(2):
                    for u in columns:
                        y = y - u * (u @ y)
                columns.append(y / y.norm())
            U = torch.stack(columns, 1)
            V = single.T @ U
        out.append(U @ U.T @ single)
    return torch.stack(out)


@pytest.mark.parametrize("c, iterations", [(1, 8), (3, 16)])
@pytest.mark.parametrize("lengths", [[2, 5, 3], [30, 40]])  # by tokens, and formed
def test_factors_are_those_of_explicit_power_iteration(c, iterations, lengths):
    g, a, offsets = tokens(lengths, 9, 7)
    G, start = dense(g, a, offsets), factor_start(7, c, 5)
    enough = [i for i, n in enumerate(lengths) if n >= c]  # below its rank nothing is left to orthogonalise
    u, v = token_factors(g, a, offsets, start, iterations)
    product = u.transpose(1, 2) @ v
    assert error(product[enough], explicit_power(G[enough], start, iterations)) < 1e-9
    again = power_factors(G, start, iterations)
    assert error(product, again[0].transpose(1, 2) @ again[1]) < 1e-8
    assert error(u @ u.transpose(1, 2), torch.eye(c, dtype=u.dtype).expand(len(lengths), -1, -1)) < 1e-10


@pytest.mark.parametrize("c", [1, 2, 4])
def test_the_energy_kept_is_close_to_the_best_possible(c):
    g, a, offsets = tokens([6, 20, 9, 40], 12, 10)
    G = dense(g, a, offsets)
    u, v = token_factors(g, a, offsets, factor_start(10, c, 0), 8 if c == 1 else 16)
    best = torch.linalg.svdvals(G)[:, :c].square().sum(1)
    kept = v.square().sum((1, 2))
    assert (kept <= best * (1 + 1e-12)).all() and (kept >= 0.98 * best).all()
    assert error(kept, (u.transpose(1, 2) @ v).square().sum((1, 2))) < 1e-12


def best_factors(model, data, names, rank, seed=0):
    """``{layer: [n, d_out, d_in + 1]}``: gradients after the power iteration of the rows."""
    out = {}
    for name, G in gradients(model, data, names).items():
        start = factor_start(G.shape[2], rank, layer_seed(seed, name, "power"))
        u, v = power_factors(G, start, 8 if rank == 1 else 16)
        out[name] = u.transpose(1, 2) @ v
    return out


@pytest.mark.parametrize("rank", [1, 2])
def test_factor_store_scores_without_curvature_and_under_ekfac(rank):
    model = tiny()
    plain = pyinf.Attributor(model, "factors", rank=rank).fit(TRAIN)
    names = plain.selection.names
    cut, V = best_factors(model, TRAIN, names, rank), gradients(model, QUERIES, names)
    wanted = sum(V[n].flatten(1) @ cut[n].flatten(1).T for n in names)
    assert error(plain.score(QUERIES, TRAIN, batch_size=2).values, wanted) < 1e-9
    under = pyinf.Attributor(model, "factors", rank=rank, curvature="ekfac", fisher="empirical", damping=0.2)
    under.fit(TRAIN, batch_size=3)
    solved = under.factors.ihvp(V, 0.2)
    wanted = sum(solved[n].flatten(1) @ cut[n].flatten(1).T for n in names)
    assert error(under.score(QUERIES, TRAIN).values, wanted) < 1e-9
    own = under.self_score(TRAIN)
    G = gradients(model, TRAIN, names)
    solved = under.factors.ihvp(G, 0.2)
    assert error(own, sum((solved[n] * cut[n]).sum((1, 2)) for n in names)) < 1e-9


def test_at_full_rank_the_scores_are_those_of_ekfac():
    model = tiny()
    settings = {"fisher": "empirical", "damping": 0.2}
    exact = pyinf.Attributor(model, "ekfac", certify=False, **settings).fit(TRAIN).score(QUERIES, TRAIN).values
    whole = pyinf.Attributor(model, "factors", rank=99, curvature="ekfac", **settings).fit(TRAIN)
    assert error(whole.score(QUERIES, TRAIN).values, exact) < 1e-9


# -- LoRIF -------------------------------------------------------------------------------------------------------------


def factor_rows(n: int, c: int, m: int, k: int, seed: int = 0):
    """Rows whose second moment falls off fast enough that leading eigenvectors are defined."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, c, m, generator=generator, dtype=torch.float64) * 0.6 ** torch.arange(m)
    v = torch.randn(n, c, k, generator=generator, dtype=torch.float64) * 0.7 ** torch.arange(k)
    rows = torch.cat([u.flatten(1), v.flatten(1)], 1)
    return rows, (u.transpose(1, 2) @ v).flatten(1)


@pytest.mark.parametrize("budget", [1 << 30, 1])  # all layers in one walk, and one layer at a time
def test_streamed_curvature_finds_the_leading_eigenpairs(budget):
    sections = layout([("x", "factors", (2, 6, 5)), ("y", "factors", (1, 4, 7))])
    (rx, X), (ry, Y) = factor_rows(50, 2, 6, 5), factor_rows(50, 1, 4, 7, 1)
    rows = torch.cat([rx, ry], 1)
    blocks = [rows[:7], rows[7:31], rows[31:]]
    found = streamed_curvature(blocks, sections, 8, 50, 0, budget)
    for name, R in (("x", X), ("y", Y)):
        K = R.T @ R / 50
        values, vectors = torch.linalg.eigh(K)
        V, squares = found[name].V, found[name].squares
        assert error(squares, values.flip(0)[:8]) < 1e-4
        assert error(V.T @ V, torch.eye(8, dtype=V.dtype)) < 1e-10
        assert error(V * squares @ V.T, (vectors[:, -8:] * values[-8:]) @ vectors[:, -8:].T) < 1e-3
        assert abs(found[name].mean - float(K.diagonal().mean())) < 1e-10 * found[name].mean
        assert abs(found[name].leading - float(values[-18:].mean())) < 1e-3 * found[name].leading


def test_woodbury_is_the_dense_inverse():
    generator = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64)).Q
    squares = torch.tensor([3.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    Q = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    K = LowRankCurvature(V, squares, 0.9, 0.4)
    dense_inverse = torch.linalg.inv(V * squares @ V.T + 0.3 * torch.eye(12, dtype=torch.float64))
    assert error(K.solve(Q, 0.3), Q @ dense_inverse) < 1e-12
    assert K.damping(0.1, "relative", "leading") == pytest.approx(0.09)
    assert K.damping(0.1, "relative", "mean") == pytest.approx(0.04)
    assert K.damping(0.1, "absolute", "mean") == 0.1


@pytest.mark.parametrize("options", [{"shrink": 2, "rank": 1}, {"shrink": 1, "rank": 2, "damping_unit": "mean"}])
def test_lorif_scores_are_those_of_the_explicit_computation(options):
    model = tiny()
    attributor = pyinf.Attributor(model, "lorif", curvature_rank=200, damping=0.3, **options).fit(TRAIN)
    lorif = attributor._run.compressor
    scores = attributor.score(QUERIES, TRAIN, batch_size=2).values
    wanted = torch.zeros(3, 14, dtype=torch.float64)
    for layer in attributor.selection.layers:
        name, cut = layer.name, []
        for data in (TRAIN, QUERIES):
            G = gradients(model, data, [name])[name]
            if options["shrink"] > 1:
                P_g, P_a = lorif.sides(layer)
                assert error(P_g.abs(), torch.full_like(P_g, P_g.shape[1] ** -0.5)) < 1e-12
                G = P_g.T @ G @ P_a
            start = factor_start(G.shape[2], options["rank"], layer_seed(0, name, "power"))
            u, v = power_factors(G, start, 8 if options["rank"] == 1 else 16)
            cut.append((u.transpose(1, 2) @ v).flatten(1))
        R, Q = cut
        K = R.T @ R / 14  # all 14 directions are kept: the low-rank curvature is the whole one
        values = torch.linalg.eigvalsh(K).flip(0)
        lam = 0.3 * float((values[:210] if options.get("damping_unit") is None else values).mean())
        wanted += Q @ torch.linalg.inv(K + lam * torch.eye(len(K), dtype=K.dtype)) @ R.T
    assert error(scores, wanted) < 1e-7
    other = pyinf.Attributor(model, "lorif", curvature_rank=200, damping=0.3, **options).fit(TRAIN, batch_size=1)
    assert error(other.score(QUERIES, TRAIN, batch_size=5).values, scores) < 1e-7


@pytest.mark.parametrize(("method", "options"), [("factors", {"rank": 2}), ("lorif", {"shrink": 2})])
def test_layers_add_up(method, options):
    attributor = pyinf.Attributor(tiny(), method, **options).fit(TRAIN)
    whole = attributor.score(QUERIES, TRAIN).values
    parts = attributor.score(QUERIES, TRAIN, per_module=True).values
    assert set(parts) == set(attributor.selection.names)
    total = sum(parts.values())
    assert (total - whole).norm() < 1e-9 * whole.norm() and whole.norm() > 0


def test_a_truncated_curvature_only_keeps_its_rank():
    attributor = pyinf.Attributor(tiny(), "lorif", shrink=2, curvature_rank=3).fit(TRAIN)
    for section in attributor._run.compressor.sections:
        K = attributor._run.compressor.curvature[section.name]
        assert K.V.shape == (section.query_width, 3) and K.squares.shape == (3,)
        rows = torch.cat([b[:, section.offset : section.stop] for b in attributor._run.table.rows])
        R = rebuilt(rows, section).flatten(1)
        assert error(K.squares, torch.linalg.eigvalsh(R.T @ R / 14).flip(0)[:3]) < 1e-4


def test_a_saved_lorif_makes_the_same_query_rows():
    attributor = pyinf.Attributor(tiny(), "lorif", shrink=2, curvature_rank=5).fit(TRAIN)
    run = attributor._run
    tensors = {name: t.clone() for name, t in run.compressor.tensors().items()}
    again = LoRIF.restore(json.loads(json.dumps(run.compressor.settings())), tensors, attributor.selection)
    data = attributor._prepare(QUERIES, "queries")
    one, two = (run.query_rows(data, attributor._plan, c) for c in (run.compressor, again))
    assert torch.equal(one, two)
    assert torch.equal(run.compressor.query_rows(one), again.query_rows(two))


@pytest.mark.parametrize(
    "method, options", [("factors", {"curvature": "ekfac"}), ("lorif", {"shrink": 2}), ("grass", {})]
)
def test_a_store_on_disk_scores_as_memory_does(method, options, tmp_path):
    settings = {"fisher": "empirical", "damping": 0.2, **options}
    attributor = pyinf.Attributor(tiny(), method, **settings).fit(TRAIN)
    wanted = attributor.score(QUERIES, TRAIN).values
    store = build_store(attributor, TRAIN, tmp_path / "store", format="float32")
    queries = query_rows(attributor, QUERIES, Store.open(tmp_path / "store"))
    found = torch.zeros(3, 14)
    found[:, torch.as_tensor(store.ids.astype("int64"))] = section_scores(
        queries.float(), store.rows(0, store.count), store.sections
    )
    assert error(found, wanted) < 1e-4
