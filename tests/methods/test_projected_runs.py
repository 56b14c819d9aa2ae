"""What holds of every projected method: batches, sums, top k, self-influence, formats, stores, errors."""

from __future__ import annotations

import core_oracle as oracle
import numpy as np
import pytest
import torch
from projected_oracle import Case

import pyinf
from pyinf.errors import ArtifactError, ConfigError
from pyinf.methods.projected import RowTable
from pyinf.store.build import build_store, open_compressor, query_rows
from pyinf.store.reader import Store
from pyinf.store.scan import all_scores, scan
from pyinf.store.sections import section_scores

METHODS = {
    "logra": dict(rank=4),
    "logra-ekfac": dict(rank=4, curvature="ekfac"),
    "logra-factors": dict(rank=4, init="factors", curvature="kfac"),
    "logra-relatif": dict(rank=4, normalise="relatif"),
    "logra-cosine": dict(rank=4, normalise="cosine"),
    "trak": dict(rank=8),
    "trak-layers": dict(rank=8, joint=False, projection="sparse"),
    "trak-margin": dict(rank=8, output="margin"),
    "trackstar": dict(rank=4, mix=0.0),
    "trackstar-full": dict(rank=4, moments="full", mix=0.5),
    "less": dict(rank=8),
    "onebit": dict(rank=5, coordinates=40),
    "onebit-hadamard": dict(rank=16, coordinates=40, rotation="hadamard"),
}
EXACT = {"onebit": {"format": "float32"}}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("gpt2")


def made(case: Case, name: str, **more) -> pyinf.Attributor:
    method = name.partition("-")[0]
    return case.attributor(method, **{**METHODS[name], **EXACT.get(method, {}), **more})


def asked(case: Case, name: str):
    return case.queries if METHODS[name].get("mix") else None


@pytest.mark.parametrize("name", METHODS)
def test_batches_do_not_matter_and_top_k_is_the_best(case: Case, name: str) -> None:
    attributor = made(case, name)
    whole = attributor.run(case.train, case.queries)
    single = made(case, name).run(case.train, case.queries, batch_size=1).values
    assert oracle.error(single, whole.values) < 1e-8
    best = attributor.score(case.queries, case.train, topk=3)
    assert torch.equal(best.topk(3)[1], whole.topk(3)[1])
    assert whole.meta["bytes_per_example"] > 0 and whole.meta["rows"] == "in memory"
    assert whole.meta["projection"]["rank"] == METHODS[name]["rank"]
    assert (whole.meta["damping"] is None) == (name == "less")


@pytest.mark.parametrize("name", METHODS)
def test_self_influence_is_the_score_on_itself(case: Case, name: str) -> None:
    attributor = made(case, name).fit(case.train)
    found = attributor.self_score(case.train)
    if name.startswith(("trackstar", "logra-cosine")):
        assert torch.equal(found, torch.ones(len(case.train)).double())
        return
    wanted = attributor.score(case.train, case.train).values.diagonal()
    if name == "trak-margin":  # queries keep their loss, while the row is a margin's gradient
        assert found.shape == wanted.shape and bool((found > 0).all())
        return
    assert oracle.error(found, wanted) < 1e-8


def test_parts_add_up(case: Case) -> None:
    for name in ("logra", "logra-relatif", "trak-layers", "onebit"):
        attributor = made(case, name)
        whole = attributor.run(case.train, case.queries).values
        parts = attributor.score(case.queries, case.train, per_module=True).values
        assert set(parts) == set(case.names)
        assert oracle.error(sum(parts.values()), whole) < 1e-9
    for name in ("logra", "trak", "onebit"):
        attributor = made(case, name)
        whole = attributor.run(case.train, case.queries).values
        tokens = attributor.score(case.queries, case.train, granularity="token").values
        assert tokens.shape == (2, len(case.train), max(len(e["input_ids"]) for e in case.train))
        assert oracle.error(tokens.sum(2), whole) < 1e-9


def test_curvature_comes_from_what_was_fitted_on(case: Case) -> None:
    """Scoring part of the fitted data is a part of the scores; without fit it has a curvature of its own."""
    attributor = made(case, "logra").fit(case.train)
    whole = attributor.score(case.queries, case.train).values
    part = attributor.score(case.queries, case.train[:3]).values
    assert oracle.error(part, whole[:, :3]) < 1e-10
    assert oracle.error(made(case, "logra").score(case.queries, case.train[:3]).values, whole[:, :3]) > 1e-3


def test_rows_that_do_not_fit_are_made_again(case: Case) -> None:
    held = made(case, "trak").fit(case.train)
    wanted = held.score(case.queries, case.train).values
    run = held._run
    run.table = RowTable(run.table.source, "float32", budget=0)
    run.compressor.finish(run.table.rows)
    scores = held.score(case.queries, case.train)
    assert run.table.held is None and scores.meta["rows"] == "made anew at each walk"
    assert torch.equal(scores.values, wanted)


def test_examples_without_labels_score_zero(case: Case) -> None:
    silent = {"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}
    scores = made(case, "logra").run([*case.train, silent], [*case.queries, silent])
    assert not scores.values[:, -1].any() and not scores.values[-1].any()
    assert scores.meta["train_without_labels"] == 1 and scores.meta["queries_without_labels"] == 1


@pytest.mark.parametrize("format", ["bfloat16", "int8", "1bit"])
def test_formats_round_the_training_rows_only(case: Case, format: str) -> None:
    """In memory and in a store a format means the same."""
    from pyinf.store.quantise import decode, encode

    attributor = made(case, "onebit", format=format).fit(case.train)
    found = attributor.score(case.queries, case.train)
    exact = made(case, "onebit").fit(case.train)
    compressor = exact._run.compressor
    rows = torch.cat([batch.rows for batch in exact._run.table])
    order = [i for batch in exact._run.table for i in batch.indices]
    rounded = decode(encode(rows, compressor.sections, format), compressor.sections, format)
    queries = query_rows(exact, case.queries, compressor)
    wanted = torch.empty_like(found.values)
    wanted[:, order] = section_scores(queries, rounded, compressor.sections)
    assert oracle.error(found.values, wanted) < 1e-6
    assert oracle.error(found.values, exact.score(case.queries, case.train).values) > 1e-4


# -- stores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_store_scores_as_memory_does(case: Case, name: str, tmp_path) -> None:
    wanted = made(case, name).run(case.train, case.queries).values
    attributor = made(case, name)
    texts = [{"text": str(i)} for i in range(len(case.train))]
    store = build_store(attributor, case.train, tmp_path / "s", "float32", texts, 3, queries=asked(case, name))
    assert sorted(store.ids.tolist()) == list(range(len(case.train)))
    assert all(store.document(row) == {"text": str(i)} for row, i in enumerate(store.ids.tolist()))
    store.verify()
    fresh = made(case, name)  # nothing fitted: everything comes from the store
    queries = query_rows(fresh, case.queries, Store.open(tmp_path / "s"))
    normalise = store.normalise
    found = torch.empty(wanted.shape)
    found[:, torch.tensor(store.ids)] = all_scores(store, queries.float(), normalise=normalise)
    assert oracle.error(found, wanted) < 1e-4  # the store and its scan are float32
    rows = scan(store, queries.float(), 2, normalise=normalise)[1]
    assert np.array_equal(store.ids[rows.numpy()], wanted.topk(2).indices.numpy())


def test_a_store_of_tokens(case: Case, tmp_path) -> None:
    padded = [oracle.padded(e, 2, 1) for e in case.train[:2]] + case.train[2:]
    wanted = made(case, "logra").score(case.queries, padded, granularity="token").values
    store = build_store(made(case, "logra"), padded, tmp_path / "s", "float32", granularity="token")
    queries = query_rows(made(case, "logra"), case.queries, store)
    scores = all_scores(store, queries.float())
    found = torch.zeros(wanted.shape)
    found[:, torch.tensor(store.ids[:, 0]), torch.tensor(store.ids[:, 1])] = scores
    assert store.count == sum(len(e["input_ids"]) for e in case.train)
    assert oracle.error(found, wanted) < 1e-4


@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("name", ["logra", "less", "onebit", "trak-margin"])
def test_a_killed_build_goes_on(case: Case, name: str, granularity: str, tmp_path, monkeypatch) -> None:
    if granularity == "token" and name in ("less", "trak-margin"):
        with pytest.raises(ConfigError, match="no rows per token"):
            build_store(made(case, name), case.train, tmp_path / "x", granularity="token")
        return
    whole = build_store(made(case, name), case.train, tmp_path / "whole", granularity=granularity, batch_size=2)

    class Stop(Exception):
        pass

    def documents(index: int) -> None:
        documents.left -= 1
        if documents.left < 0:
            raise Stop
        return None

    documents.left = 3
    with pytest.raises(Stop):
        build_store(
            made(case, name), case.train, tmp_path / "s", documents=documents, granularity=granularity, batch_size=2
        )
    assert len(Store.open(tmp_path / "s", unfinished=True).ids) < whole.count
    documents.left = 100
    attributor = made(case, name)
    monkeypatch.setattr(attributor, "_fit", None)  # the factors are not fitted again
    store = build_store(
        attributor, case.train, tmp_path / "s", documents=documents, granularity=granularity, batch_size=2
    )
    assert documents.left < 100
    order, wanted = (np.lexsort(np.atleast_2d(s.ids.T)[::-1]) for s in (store, whole))
    assert np.array_equal(store.ids[order], whole.ids[wanted])
    assert np.array_equal(store.raw(0, store.count)[order], whole.raw(0, whole.count)[wanted])
    for key, tensor in whole.tensors().items():
        assert torch.allclose(store.tensors()[key], tensor, rtol=1e-9), key
    again = build_store(made(case, name), case.train, tmp_path / "s", documents=documents, granularity=granularity)
    assert again.count == store.count


def test_tokens_of_a_sequence_that_a_kill_cut_in_two_are_one_row(tmp_path) -> None:
    from pyinf.store.build import _SequenceRows
    from pyinf.store.format import StoreSpec
    from pyinf.store.sections import layout
    from pyinf.store.writer import StoreWriter

    ids = [(3, 0), (3, 1), (5, 0), (1, 0), (1, 1), (5, 1), (5, 2), (2, 4)]
    rows = torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(0))
    spec = StoreSpec("logra", layout([("a", "vector", (4,))]), "float32", "token")
    with StoreWriter(tmp_path / "s", spec) as writer:
        writer.append(np.array(ids), rows)
        store = writer.finish()
    found = torch.cat(list(_SequenceRows(store, torch.device("cpu"), torch.float32)))
    wanted = torch.stack([rows[[n for n, (i, _) in enumerate(ids) if i == s]].sum(0) for s in (3, 1, 2, 5)])
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_store_of_something_else_is_refused(case: Case, tmp_path) -> None:
    build_store(made(case, "logra"), case.train, tmp_path / "s")
    with pytest.raises(ArtifactError, match="another store"):
        build_store(made(case, "logra", rank=3), case.train, tmp_path / "s")
    with pytest.raises(ArtifactError, match="another store"):
        build_store(made(case, "logra"), case.train[:4], tmp_path / "s")
    other = Case("gpt2")
    with torch.no_grad():
        next(iter(other.model.parameters())).mul_(1.5)
    with pytest.raises(ArtifactError, match="another model"):
        open_compressor(Store.open(tmp_path / "s"), made(other, "logra"))


def test_damping_of_a_store(case: Case, tmp_path) -> None:
    store = build_store(made(case, "logra"), case.train, tmp_path / "s", "float32")
    wanted = made(case, "logra", damping=2.0).run(case.train, case.queries).values
    queries = query_rows(made(case, "logra"), case.queries, store, damping=2.0)
    found = torch.empty(wanted.shape)
    found[:, torch.tensor(store.ids)] = all_scores(store, queries.float())
    assert oracle.error(found, wanted) < 1e-4
    early = build_store(made(case, "onebit"), case.train, tmp_path / "b", "1bit")
    with pytest.raises(ConfigError, match="part of its rows"):
        query_rows(made(case, "onebit"), case.queries, early, damping=2.0)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors(case: Case, tmp_path) -> None:
    with pytest.raises(ConfigError, match="unknown option 'ranks' for method 'logra'"):
        case.attributor("logra", ranks=4)
    with pytest.raises(ConfigError, match="curvature is 'ggn'"):
        case.attributor("logra", curvature="ggn")
    with pytest.raises(ConfigError, match="leave query_rank out"):
        case.attributor("logra", rank=4, query_rank=2).score(case.queries, case.train)
    with pytest.raises(ConfigError, match="joint=False has them"):
        made(case, "trak").score(case.queries, case.train, per_module=True)
    with pytest.raises(ConfigError, match="no scores by module"):
        made(case, "less").score(case.queries, case.train, per_module=True)
    with pytest.raises(ConfigError, match="no scores by module"):
        case.attributor("grass", factorised=False, k=8, mask_size=16).score(case.queries, case.train, per_module=True)
    with pytest.raises(ConfigError, match="no scores per token"):
        made(case, "logra-relatif").score(case.queries, case.train, granularity="token")
    with pytest.raises(ConfigError, match="give queries="):
        build_store(made(case, "trackstar", mix=0.5), case.train, tmp_path / "s")
    with pytest.raises(ConfigError, match="makes no rows"):
        build_store(case.attributor("ekfac"), case.train, tmp_path / "s")
    with pytest.raises(ConfigError, match="solves no system to a tolerance"):
        made(case, "logra").score(case.queries, case.train, tol=1e-3)
    assert not (tmp_path / "s").exists()
