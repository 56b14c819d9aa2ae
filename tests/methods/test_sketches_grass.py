"""GraSS and FactGraSS against the explicit mask, the explicit sparse matrix and the explicit inverse, in float64."""

from __future__ import annotations

import json

import pytest
import torch
from sketch_oracle import dense, error, examples, gradients, tiny, tokens

import pyinf
from pyinf.errors import ConfigError, ResourceError
from pyinf.ops.philox import sparse_coordinates
from pyinf.ops.reference import STREAM_PROJECTION
from pyinf.store.compress.base import layer_seed
from pyinf.store.compress.grass import GraSS, masked_sketch
from pyinf.store.compress.masks import draw_subset, learn_factor_masks, learn_mask, mask_correlation

TRAIN, QUERIES = examples(14, 1), examples(3, 2)
SMALL = {"k": 9, "mask_g": 5, "mask_a": 4}


def sjlt(size: int, k: int, seed: int, nnz: int) -> torch.Tensor:
    """The sparse matrix, element by element."""
    bucket, sign = sparse_coordinates((0, size), k, nnz, seed, STREAM_PROJECTION)
    S = torch.zeros(size, k, dtype=torch.float64)
    for i in range(size):
        for s in range(nnz):
            S[i, bucket[i, s]] += float(sign[i, s])
    return S / nnz**0.5


def fitted(model, **options):
    attributor = pyinf.Attributor(model, "grass", **options)
    attributor.fit(TRAIN)
    return attributor, attributor._run.compressor, attributor.selection.names


@pytest.mark.parametrize("nnz", [1, 3])
def test_rows_of_factgrass_are_the_explicit_masked_and_sketched_gradients(nnz):
    model = tiny()
    attributor, grass, names = fitted(model, **SMALL, nnz=nnz)
    G = gradients(model, TRAIN, names)
    rows = torch.cat([batch for batch in attributor._run.table.rows])
    order = [i for batch in attributor._run.table for i in batch.indices]
    for section in grass.sections:
        own, (o, i) = G[section.name], grass.masks[section.name]
        masked = own[:, o][:, :, i].flatten(1)
        scale = (own[0].numel() / masked.shape[1]) ** 0.5
        wanted = scale * masked @ sjlt(masked.shape[1], 9, layer_seed(0, section.name, "sketch"), nnz)
        assert error(rows[:, section.offset : section.stop], wanted[order]) < 1e-12


def test_rows_of_grass_are_one_mask_and_one_sketch_of_the_flat_gradient():
    model = tiny()
    attributor, _, names = fitted(model, factorised=False, k=11, mask_size=60)
    flat = torch.cat([G.flatten(1) for G in gradients(model, TRAIN, names).values()], 1)
    indices = draw_subset(flat.shape[1], 60, layer_seed(0, "", "mask"))
    assert len(set(indices.tolist())) == 60
    wanted = (flat.shape[1] / 60) ** 0.5 * flat[:, indices] @ sjlt(60, 11, layer_seed(0, "", "sketch"), 1)
    order = [i for batch in attributor._run.table for i in batch.indices]
    assert error(torch.cat(list(attributor._run.table.rows)), wanted[order]) < 1e-12


@pytest.mark.parametrize("options", [SMALL, {"factorised": False, "k": 10, "mask_size": 50}])
@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
def test_scores_are_those_of_the_explicit_inverse_and_do_not_depend_on_the_batch_size(options, damping_mode):
    model = tiny()
    settings = {**options, "damping": 0.3, "damping_mode": damping_mode}
    attributor, grass, _ = fitted(model, **settings)
    scores = attributor.score(QUERIES, TRAIN).values
    R, Q = (one_a_row(attributor, data) for data in (TRAIN, QUERIES))
    wanted = torch.zeros(3, 14, dtype=torch.float64)
    for section in grass.sections:
        r, q = (X[:, section.offset : section.stop] for X in (R, Q))
        K = r.T @ r / 14
        lam = 0.3 * (float(K.diagonal().mean()) if damping_mode == "relative" else 1)
        wanted += q @ torch.linalg.inv(K + lam * torch.eye(len(K), dtype=K.dtype)) @ r.T
    assert error(scores, wanted) < 1e-9
    other = pyinf.Attributor(model, "grass", **settings)
    other.fit(TRAIN, batch_size=2)
    assert error(other.score(QUERIES, TRAIN, batch_size=3).values, scores) < 1e-9


def one_a_row(attributor, data):
    """Rows by a pass of the library's own consumer, one example at a time, in order."""
    run = attributor._run
    rows = []
    for example in data:
        prepared = attributor._prepare([example], "queries")
        rows.append(run.query_rows(prepared, attributor._plan, run.compressor))
    return torch.cat(rows)


def test_without_a_sketch_and_a_mask_scores_are_plain_inner_products():
    model = tiny()
    wide = {"k": 10**6, "mask_g": 10**6, "mask_a": 10**6, "curvature": "none"}
    scores = pyinf.Attributor(model, "grass", **wide).fit(TRAIN).score(QUERIES, TRAIN).values
    plain = pyinf.Attributor(model, "grad_dot").score(QUERIES, TRAIN).values
    assert error(scores, plain) < 1e-10


def test_masked_and_sketched_inner_products_are_unbiased():
    g, a, offsets = tokens([4, 4], 10, 8)
    g[4:], a[4:] = g[:4] + 0.5 * g[4:], a[:4]  # two alike, so that a mean near zero would be noticed
    G = dense(g, a, offsets)
    found = []
    for seed in range(3000):
        o, i = draw_subset(10, 6, 2 * seed), draw_subset(8, 5, 2 * seed + 1)
        row = masked_sketch(g, a, offsets, o, i, 7, seed, 1, (80 / 30) ** 0.5)
        found.append(float(row[0] @ row[1]))
    found, exact = torch.tensor(found), float((G[0] * G[1]).sum())
    assert abs(found.mean() - exact) < 4 * found.std() / 3000**0.5 < exact / 5


def test_a_saved_compressor_makes_the_same_rows():
    model = tiny()
    for options in (SMALL, {"factorised": False, "k": 10, "mask_size": 50}):
        attributor, grass, _ = fitted(model, **options)
        tensors = {name: t.clone() for name, t in grass.tensors().items()}
        again = GraSS.restore(json.loads(json.dumps(grass.settings())), tensors, attributor.selection)
        run = attributor._run
        data = attributor._prepare(QUERIES, "queries")
        one, two = (run.query_rows(data, attributor._plan, c) for c in (grass, again))
        assert torch.equal(one, two)
        assert error(again.query_rows(two), grass.query_rows(one)) < 1e-12


# -- masks -------------------------------------------------------------------------------------------------------------


def test_subsets_are_uniform_and_without_repetition():
    for total, count in ((50, 3), (50, 40), (50, 80)):
        hits = torch.zeros(total)
        for seed in range(2000):
            drawn = draw_subset(total, count, seed)
            assert drawn.tolist() == sorted(set(drawn.tolist())) and len(drawn) == min(count, total)
            hits[drawn] += 1
        share = min(count, total) / total
        assert (hits / 2000 - share).abs().max() < 5 * (share * (1 - share) / 2000) ** 0.5 + 1e-12


def planted(n: int, rows: list[int], columns: list[int], d_out: int, d_in: int) -> torch.Tensor:
    """Gradients that differ from each other in a block only; elsewhere all of them are nearly the same."""
    generator = torch.Generator().manual_seed(3)
    G = torch.randn(1, d_out, d_in, generator=generator, dtype=torch.float64).repeat(n, 1, 1)
    G += 0.01 * torch.randn(n, d_out, d_in, generator=generator, dtype=torch.float64)
    block = torch.randn(n, len(rows), len(columns), generator=generator, dtype=torch.float64)
    G[:, torch.tensor(rows)[:, None], torch.tensor(columns)] = 3 * block
    return G


def test_selective_masks_keep_what_tells_gradients_apart():
    rows, columns = [1, 4, 9], [0, 7, 8, 11]
    G = planted(40, rows, columns, 12, 14)
    found = learn_factor_masks(G, (3, 4), 150, 0.1, seed=0)
    assert [index.tolist() for index in found] == [rows, columns]
    block = {r * 14 + c for r in rows for c in columns}
    flat = set(learn_mask(G.flatten(1), 12, 150, 0.1, seed=0).tolist())
    assert len(flat & block) >= 10

    def kept(o, i):
        part = G[:, o][:, :, i].flatten(1)
        return float(mask_correlation(G.flatten(1)[:10] @ G.flatten(1)[10:].T, part[:10] @ part[10:].T))

    by_chance = [kept(draw_subset(12, 3, s), draw_subset(14, 4, s + 100)) for s in range(20)]
    assert kept(*found) > 0.99 > max(by_chance)


def test_the_correlation_is_the_usual_one():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 20, generator=generator, dtype=torch.float64)
    y += x
    wanted = torch.stack([torch.corrcoef(torch.stack([x[q], y[q]]))[0, 1] for q in range(3)]).mean()
    assert abs(mask_correlation(x, y) - wanted) < 1e-12


def test_selective_masks_of_a_model_beat_random_ones_on_held_out_scores_averaged_over_layers():
    model = tiny()
    train = examples(40, 5)
    exact = pyinf.Attributor(model, "grad_dot").score(QUERIES, train, per_module=True).values

    def agreement(mask, seed=0):
        options = {"k": 10**6, "mask_g": 4, "mask_a": 3, "mask": mask, "curvature": "none", "mask_examples": 40}
        attributor = pyinf.Attributor(model, "grass", seed=seed, **options).fit(train)
        scores = attributor.score(QUERIES, train, per_module=True).values
        return torch.tensor([float(mask_correlation(exact[name], scores[name])) for name in exact])

    by_chance = torch.stack([agreement("random", seed) for seed in range(4)]).mean(0)
    assert float((agreement("selective") - by_chance).mean()) > 0.05  # not in every layer: queries are new


def test_what_cannot_work_says_so():
    with pytest.raises(ConfigError, match="at least 8"):
        learn_mask(torch.randn(5, 4), 2, 1, 0.1, 0)
    with pytest.raises(ResourceError, match="mask='random'"):
        big = pyinf.Attributor(tiny(), "grass", mask="selective", factorised=False, memory_budget="500MB")
        context = big._run
        context.fit_rows(big._prepare(TRAIN, "train"), None, cramped(big))


def cramped(attributor):
    """A plan whose budget leaves the compressor next to nothing."""
    plan = attributor.plan(TRAIN)

    class Rig(type(attributor._run.rig(plan))):
        def context(self, *args, **settings):
            return super().context(*args, **{**settings, "memory_budget": 1000})

    own = attributor._run.rig(plan)
    attributor._run.rig = lambda plan: Rig(**vars(own))
    return plan
