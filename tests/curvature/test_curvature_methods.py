"""The curvatures through the public call: names, options, scores, self-influence, files."""

from __future__ import annotations

import core_oracle as oracle
import pytest
import torch

import pyinf
from pyinf.errors import ArtifactError, ConfigError
from pyinf.methods.subspace import draw_sets

TOLERANCE = 1e-8
KINDS = {"ec_shampoo": "ec_shampoo", "ekfac": "ec_tkfac", "kfac": "shampoo2"}
LAYERS = ["*.0.*q_proj", "*.0.*v_proj", "*.1.*down_proj"]


@pytest.fixture(scope="module")
def case():
    class Case:
        model = oracle.make("llama")
        train, queries = oracle.data(9, 1), oracle.data(3, 2)

    case = Case()
    case.names = pyinf.Attributor(case.model, "grad_dot", modules=LAYERS).selection.names
    case.G = oracle.gradients(case.model, case.train, case.names)
    case.V = oracle.gradients(case.model, case.queries, case.names)
    return case


def attributor(case, method: str, **options) -> pyinf.Attributor:
    return pyinf.Attributor(case.model, method, modules=LAYERS, fisher="empirical", eigensolver="fp64", **options)


@pytest.mark.parametrize("method", list(KINDS))
@pytest.mark.parametrize("query_rank", [None, 4])
def test_scores_of_every_curvature(case, method, query_rank):
    """Shared inputs with separate bases, dense and low-rank queries, several dampings, self-influence."""
    options = {} if method == "ec_shampoo" else {"approximation": KINDS[method]}
    found = attributor(case, method, query_rank=query_rank, **options).fit(case.train)
    factors = found.factors
    assert factors.kind == KINDS[method] and len(factors.inputs) == len(case.names)
    scores = found.score(case.queries, case.train, dampings=[0.1, 1.0])
    for damping, values in scores.items():
        X = factors.ihvp({n: torch.stack([v[n] for v in case.V]) for n in case.names}, damping)
        wanted = oracle.dot([{n: X[n][q] for n in case.names} for q in range(3)], case.G)
        error = oracle.error(values.values, wanted)
        assert error < TOLERANCE if query_rank is None else error < 0.7
    if query_rank is None:
        own = found.score(case.train, case.train).values.diagonal()
        assert oracle.error(found.self_score(case.train), own) < TOLERANCE


def test_scores_in_the_eigenbases_and_in_the_layers_own_coordinates_agree(case):
    many, first = oracle.data(30, 5), None
    for rotated in (True, False):
        found = attributor(case, "ec_shampoo").fit(case.train)
        plan = found._make_plan(found._prepare(case.train, "train"), found._prepare(many, "queries"), None)
        plan.score_rotated = rotated
        found._make_plan = lambda *_, plan=plan: plan
        values = found.score(many, case.train).values
        first = values if rotated else first
    assert oracle.error(values, first) < TOLERANCE


def test_one_call_with_captured_batches_is_the_same(case):
    scores = pyinf.attribute(
        case.model, case.train, case.queries, "ec_shampoo", modules=LAYERS, fisher="empirical", eigensolver="fp64"
    )
    wanted = attributor(case, "ec_shampoo", cache="none").fit(case.train).score(case.queries, case.train)
    assert oracle.error(scores.values, wanted.values) < TOLERANCE


def test_finished_and_loaded_factors(case, tmp_path):
    first = attributor(case, "ec_shampoo", run_dir=tmp_path / "run").fit(case.train)
    again = attributor(case, "ec_shampoo", run_dir=tmp_path / "run").fit(case.train)
    loaded = attributor(case, "ec_shampoo").load_factors(tmp_path / "run" / "fit" / "factors")
    for other in (again, loaded):
        values = other.score(case.queries, case.train).values
        assert torch.equal(values, first.score(case.queries, case.train).values)
    with pytest.raises(ArtifactError, match="ec_shampoo factors"):
        attributor(case, "ekfac").load_factors(tmp_path / "run" / "fit" / "factors")
    with pytest.raises(ConfigError, match="approximation"):
        attributor(case, "ekfac", approximation="shampoo")


@pytest.mark.parametrize("method", ["ekfac", "ec_shampoo", "kfac"])
def test_wide_factors_split_through_the_public_call(case, method):
    found = attributor(case, method, factor_block=10).fit(case.train)
    basis = found.factors.inputs[found.factors.layers[case.names[0]].group].basis
    assert basis.shape == (16, 16) and not bool(basis[:8, 8:].any()) and bool(basis[:8, :8].all())
    whole = attributor(case, method).fit(case.train).score(case.queries, case.train).values
    values = found.score(case.queries, case.train).values
    assert 1e-4 < oracle.error(values, whole) < 0.9
    with pytest.raises(ConfigError, match="factor_block"):
        attributor(case, method, factor_block=0)


def test_the_plan_counts_an_input_factor_a_layer(case):
    shared, own = (attributor(case, m).plan(case.train, case.queries) for m in ("ekfac", "ec_shampoo"))
    assert own.memory["factors"] == shared.memory["factors"] + 8 * 16 * 16  # q and v read one input of 16
    assert own.fit_passes == shared.fit_passes == 2


def test_subspace_through_the_public_call(case):
    """All training gradients: the exact damped empirical Fisher over the layers together."""
    found = attributor(case, "ekfac_subspace", subspace_gradients=9, subspace_moments=0, subspace_shrinkage=0)
    found.fit(case.train)
    lam = found.factors.dampings(0.1, "relative")
    flat = lambda rows: torch.stack([torch.cat([r[n].reshape(-1) for n in case.names]) for r in rows])  # noqa: E731
    G, V = flat(case.G), flat(case.V)
    damping = torch.cat([torch.full((case.G[0][n].numel(),), lam[n], dtype=G.dtype) for n in case.names])
    inverse = torch.linalg.inv(G.T @ G / len(G) + torch.diag(damping))
    assert oracle.error(found.score(case.queries, case.train).values, V @ inverse @ G.T) < TOLERANCE
    assert oracle.error(found.self_score(case.train), (G @ inverse * G).sum(1)) < TOLERANCE
    both = found.score(case.queries, case.train, dampings=[0.1, 1.0])
    assert oracle.error(both[0.1].values, V @ inverse @ G.T) < TOLERANCE
    assert oracle.error(both[1.0].values, both[0.1].values) > 1e-2


def test_the_subspace_is_fitted_once_for_the_same_data(case, monkeypatch):
    calls = []
    from pyinf.methods import subspace

    real = subspace.fit_subspace
    monkeypatch.setattr(subspace, "fit_subspace", lambda *a: calls.append(1) or real(*a))
    found = attributor(case, "ekfac_subspace", subspace_gradients=4, subspace_shrinkage=0).fit(case.train)
    first = found.score(case.queries, case.train).values
    again = found.score(case.queries, list(case.train)).values
    assert len(calls) == 1 and torch.equal(first, again)
    other = [*case.train[:-1], {"input_ids": [3, 1, 4]}]
    found._run.fit_data = None  # as after load_factors: the gradients are those of the data scored
    assert oracle.error(found.score(case.queries, other).values[:, :-1], first[:, :-1]) > 1e-6 and len(calls) == 2
    found.fit(case.train).score(case.queries, case.train)
    assert len(calls) == 3


def test_subspace_draws_and_sampled_labels_repeat(case):
    options = dict(modules=LAYERS, subspace_gradients=4, eigensolver="fp64", seed=3)
    first, second = (
        pyinf.Attributor(case.model, "ekfac_subspace", **options).fit(case.train).score(case.queries, case.train).values
        for _ in range(2)
    )
    plain = pyinf.Attributor(case.model, "ekfac", modules=LAYERS, eigensolver="fp64", seed=3).fit(case.train)
    assert torch.equal(first, second)
    assert oracle.error(first, plain.score(case.queries, case.train).values) > 1e-3
    exact = pyinf.Attributor(case.model, "ekfac_subspace", subspace_curvature="ggn", **options).fit(case.train)
    assert oracle.error(exact.score(case.queries, case.train).values, first) > 1e-3


def test_drawing_the_gradients():
    some = list(range(10, 20))
    span, moments = draw_sets(some, 4, None, seed=0, redraw=False)
    assert len(span) == 4 and sorted([*span, *moments]) == some
    assert len(draw_sets(some, 4, 3, seed=0, redraw=False)[1]) == 3
    assert draw_sets(some, 20, 0, seed=1, redraw=False) == (some, None)
    assert draw_sets(some, 4, None, 0, False) != draw_sets(some, 4, None, 1, False)
    assert draw_sets(some, 10, None, seed=0, redraw=True) == (some, some)
    again, others = draw_sets(some, 4, 3, seed=0, redraw=True)
    assert again == span and not set(again) & set(others)
    with pytest.raises(ConfigError, match="subspace_moments=0"):
        draw_sets(some, 10, None, seed=0, redraw=False)


def test_the_moments_are_of_another_draw_of_labels(case):
    found = pyinf.Attributor(
        case.model, "ekfac_subspace", modules=LAYERS, subspace_gradients=9, eigensolver="fp64", subspace_complement=1
    ).fit(case.train)
    same = pyinf.Attributor(
        case.model, "ekfac_subspace", modules=LAYERS, subspace_gradients=9, eigensolver="fp64", subspace_complement=1,
        subspace_moments=0,
    ).fit(case.train)  # fmt: skip
    first, second = (a.score(case.queries, case.train).values for a in (found, same))
    assert oracle.error(first, second) > 1e-3


@pytest.mark.parametrize(
    "options", [{"subspace_gradients": 0}, {"subspace_shrinkage": 2}, {"subspace_complement": -1}, {"subspace_rank": 0}]
)
def test_impossible_options_are_named(case, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        attributor(case, "ekfac_subspace", **options)
