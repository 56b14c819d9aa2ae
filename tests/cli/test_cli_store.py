"""pyinf store: built, looked at, checked, asked, merged and tidied on the command line."""

from __future__ import annotations

import json

import pytest
from cli_data import rows, run, write

from pyinf.store import Store


def build(model_dir, train, out, *more):
    return run("store", "build", "--model", model_dir, "--train", train, "--out", out, "--json", *more)


@pytest.fixture(scope="module")
def built(model_dir, tmp_path_factory):
    home = tmp_path_factory.mktemp("store")
    train = write(home / "train.jsonl", rows(24))
    options = ("--method", "logra", "--method-option", "rank=4", "--format", "int8", "--shard-rows", "7")
    result = build(model_dir, train, home / "s", *options)
    assert result.exit_code == 0, result.stderr
    return home, train, options, json.loads(result.stdout)


def test_build_info_verify(built, model_dir):
    home, train, options, answer = built
    assert answer["rows"] == 24 and answer["finished"] and answer["format"] == "int8" and answer["shards"] >= 4
    again = build(model_dir, train, home / "s", *options)  # nothing left to do
    assert again.exit_code == 0 and json.loads(again.stdout)["rows"] == 24
    info = json.loads(run("store", "info", home / "s", "--json").stdout)
    assert info["rows"] == 24 and info["method"] == "logra" and info["row_bytes"] == answer["row_bytes"]
    assert "bytes" in run("store", "info", home / "s").stdout
    result = run("store", "verify", home / "s", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["rows"] == 24
    store = Store.open(home / "s")
    place = store.ids.tolist().index(5)
    assert store.document(place)["label"] == "sad" and "feel sad 5" in store.document(place)["text"]


def test_another_build_in_the_same_folder_is_refused(built, model_dir):
    home, train, options, _ = built
    result = build(model_dir, train, home / "s", *options, "--format", "1bit")
    assert result.exit_code == 6 and "format" in result.stderr and "another store" in result.stderr


def test_query_by_the_store_and_again_with_exact_scores(built, model_dir):
    home, train, _, _ = built
    queries = write(home / "queries.jsonl", rows(3, 100))
    common = ("store", "query", home / "s", "--model", model_dir, "--queries", queries, "-k", "4")
    result = run(*common, "--out", home / "answer.json", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads((home / "answer.json").read_text())
    assert json.loads(result.stdout) == answer
    assert [len(line) for line in answer["ids"]] == [4, 4, 4] and answer["recall"] is None
    assert all(line == sorted(line, reverse=True) for line in answer["values"])
    assert "query 0" in run(*common).stdout
    exact = run(*common, "--train", train, "--rescore", "12", "--sample", "8", "--json")
    assert exact.exit_code == 0, exact.stderr
    found = json.loads(exact.stdout)
    assert found["cost"]["candidates"] == 12 and found["recall"]["cut"] == 12
    assert found["values"] != answer["values"]
    for more, match in ((("--rescore", "12"), "--train"), (("--train", train, "--prefilter", "bm25"), "--rescore")):
        refused = run(*common, *more)
        assert refused.exit_code == 2 and match in refused.stderr


def test_merge_compact_and_damage(built, model_dir, tmp_path):
    home = built[0]
    refused = run("store", "merge", home / "s", home / "s", "--out", tmp_path / "m")
    assert refused.exit_code == 2 and "twice" in refused.stderr
    merged = run("store", "merge", home / "s", "--out", tmp_path / "m", "--json")
    assert merged.exit_code == 0 and json.loads(merged.stdout)["rows"] == 24
    compacted = run("store", "compact", tmp_path / "m", "--shard-rows", "20", "--json")
    assert compacted.exit_code == 0 and json.loads(compacted.stdout)["shards"] == 2
    path = next((tmp_path / "m").glob("shard-*.rows"))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    result = run("store", "verify", tmp_path / "m")
    assert result.exit_code == 6 and path.name in result.stderr
    assert run("store", "info", tmp_path / "nowhere").exit_code == 6
