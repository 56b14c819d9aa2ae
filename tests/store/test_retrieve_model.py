"""The two stages with a real model: exact scores are the attributor's own, and the command line says what it found."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import pyinf
from pyinf.errors import ConfigError, DataError
from pyinf.methods.rescoring import Rescoring
from pyinf.store.build import build_store, query_rows
from pyinf.store.retrieve import query_store

N, Q, K = 120, 4, 5


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny GPT-2 with large weights on disk, data, fitted factors, a one-bit store, and all exact scores."""
    folder = tmp_path_factory.mktemp("two-stages")
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = tf.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    model.eval().save_pretrained(folder / "model")
    rng = random.Random(0)

    def sequences(count):
        return [{"input_ids": [rng.randrange(3, 30) for _ in range(rng.randrange(5, 12))]} for _ in range(count)]

    train, queries = sequences(N), sequences(Q)
    for name, rows in (("train", train), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exact = pyinf.Attributor(model, "ekfac", run_dir=folder / "fit", certify=False).fit(train)
    exact.run_dir = None
    scores = exact.score(queries, train).total()
    projected = pyinf.Attributor(model, "onebit", coordinates=256, rotation="none")
    projected.load_factors(folder / "fit" / "fit" / "factors")
    documents = [{"text": f"row {i}"} for i in range(N)]
    store = build_store(projected, train, folder / "store", "1bit", documents=documents)
    return folder, model, train, queries, exact, scores, store, query_rows(projected, queries, store)


def test_exact_scores_are_those_of_the_attributor(parts):
    _, _, train, queries, exact, scores, store, _ = parts
    rescorer = Rescoring(exact, queries, train, store.ids)
    rows = [3, 77, 0, 41]
    found = rescorer([2, 0], rows)
    torch.testing.assert_close(
        found, scores[[2, 0]][:, store.ids[rows]], rtol=1e-4, atol=1e-5 * float(scores.abs().max())
    )
    assert rescorer([1], []).shape == (1, 0)
    weights = sum(layer.d_out * layer.columns for layer in exact.selection.layers)
    assert rescorer.costs[1] == 2 * weights and 5 < rescorer.costs[0] / (6 * weights) < 12


def test_two_stages_find_the_exact_best(parts):
    _, _, train, queries, exact, scores, store, rows = parts
    rescorer = Rescoring(exact, queries, train, store.ids)
    found = query_store(store, rows, K, rescorer, rescore=0.5, sample=N)
    best = scores.topk(K, dim=1)
    true = np.mean([np.isin(best.indices[q], found.ids[q]).mean() for q in range(Q)])
    assert true >= 0.9 and found.recall.value == pytest.approx(true)
    own = scores.gather(1, found.ids)
    torch.testing.assert_close(found.values, own, rtol=1e-4, atol=1e-5 * float(scores.abs().max()))
    assert found.documents[1][2] == {"text": f"row {int(found.ids[1, 2])}"}
    alone = query_store(store, rows, K)
    correlation = torch.corrcoef(torch.stack([alone.values.flatten(), scores.gather(1, alone.ids).flatten()]))[0, 1]
    assert correlation > 0.7  # the store's own scores are on the scale of the exact ones


def test_refined_scores_and_their_certificates(parts):
    folder, model, train, queries, _, scores, store, rows = parts
    refined = pyinf.Attributor(model, "ekfac").load_factors(folder / "fit" / "fit" / "factors")
    rescorer = Rescoring(refined, queries, train, store.ids, tol=0.05)
    assert rescorer.together
    found = query_store(store, rows, K, rescorer, rescore=20, sample=0)
    assert [entry["verdict"] for entry in found.certificate] == ["solved"] * Q
    whole = refined.score(queries, train, tol=0.05).total().gather(1, found.ids)
    torch.testing.assert_close(found.values, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert not torch.allclose(whole, scores.gather(1, found.ids), rtol=1e-2)


def test_rescoring_needs_the_right_things(parts):
    _, model, train, queries, exact, _, store, _ = parts
    with pytest.raises(ConfigError, match="needs factors"):
        Rescoring(pyinf.Attributor(model, "ekfac"), queries, train, store.ids)
    with pytest.raises(ConfigError, match="has no gradients"):
        Rescoring(pyinf.Attributor(model, "bm25"), queries, train, store.ids)
    with pytest.raises(DataError, match="training example 119 and there are 50"):
        Rescoring(exact, queries, train[:50], store.ids)
    with pytest.raises(ConfigError, match="a row a token"):
        Rescoring(exact, queries, train, np.zeros((3, 2)))


def command(parts, *extra):
    from pyinf.cli import app

    folder = parts[0]
    first = ["store", "query", folder / "store", "--model", folder / "model", "--queries", folder / "queries.jsonl"]
    result = CliRunner().invoke(app, [str(a) for a in [*first, *extra]], prog_name="pyinf")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command(parts, tmp_path):
    folder, scores, rows = parts[0], parts[5], parts[7]
    plain = json.loads(command(parts, "-k", K, "--json").stdout)
    assert plain["ids"] == query_store(parts[6], rows, K).ids.tolist() and plain["recall"] is None
    second = ["--train", folder / "train.jsonl", "--fit", folder / "fit", "-k", K]
    result = command(parts, *second, "--rescore", "0.5", "--sample", N, "--out", tmp_path / "found.json")
    assert result.exit_code == 0, result.stderr
    assert "recall@5 " in result.stdout and "60 candidates a query (50 %)" in result.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    best = scores.topk(K, dim=1).indices
    assert found["recall"]["value"] == pytest.approx(np.mean([np.isin(best[q], found["ids"][q]) for q in range(Q)]))
    grown = json.loads(command(parts, *second, "--recall", 0.8, "--sample", N, "--most", 100, "--json").stdout)
    assert grown["recall"]["low"] >= 0.8
    for prefilter in ("bm25", "embedding"):
        filtered = command(parts, *second, "--rescore", 30, "--sample", 60, "--prefilter", prefilter, "--keep", 60)
        assert filtered.exit_code == 0 and "prefilter: recall@5 " in filtered.stdout


def test_errors_of_the_command(parts):
    folder = parts[0]
    result = command(parts, "--rescore", "0.1")
    assert result.exit_code == 2 and "--train" in result.stderr
    result = command(parts, "--prefilter", "bm26", "--rescore", 5, "--train", folder / "train.jsonl")
    assert result.exit_code == 2 and "bm25 or embedding" in result.stderr
    (folder / "other.jsonl").write_text((folder / "train.jsonl").read_text() + '{"input_ids": [5, 6]}\n')
    result = command(parts, "--rescore", "0.1", "--train", folder / "other.jsonl", "--fit", folder / "fit")
    assert result.exit_code == 6 and "other training data" in result.stderr
