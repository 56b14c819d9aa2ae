"""A real model and a real store behind the service, by the library and by the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import httpx
import pytest
import torch
from serving import TOKEN, serving

import pyinf
from pyinf.data import load_examples, load_model, load_tokenizer
from pyinf.errors import ArtifactError, ConfigError
from pyinf.methods.rescoring import Rescoring
from pyinf.serve import Query, Refused
from pyinf.serve.searcher import StoreSearcher
from pyinf.store import Store, build_store, query_rows, query_store
from tests.tiny_model import save_llama

COUNT = 40
WORDS = "heap stack tree graph queue list map set sort search".split()


def rows():
    out = []
    for i in range(COUNT):
        a, b = WORDS[i % 10], WORDS[(i * 3 + 1) % 10]
        out.append({"prompt": f"What is a {a}?", "response": f"A {a} is like a {b}, number {i}."})
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, training data, and a store of them."""
    home = tmp_path_factory.mktemp("serve")
    save_llama(home / "model", [f"{r['prompt']} {r['response']}" for r in rows()], positions=128)
    (home / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    model = load_model(home / "model", device="cpu")
    train = load_examples(home / "train.jsonl", load_tokenizer(home / "model"))
    attributor = pyinf.Attributor(model, "logra", rank=4)
    documents = [{"text": train.text(i), "source": f"row {i}"} for i in range(COUNT)]
    build_store(attributor, train, home / "store", documents=documents)
    return home


@pytest.fixture(scope="module")
def parts(home):
    """Model, tokenizer, training data, attributor of the store, store."""
    model, words = load_model(home / "model", device="cpu"), load_tokenizer(home / "model")
    train = load_examples(home / "train.jsonl", words)
    return model, words, train, pyinf.Attributor(model, "logra", rank=4), Store.open(home / "store")


ASKED = {"prompt": "What is a heap?", "completion": "A heap is like a tree."}


def wanted(parts, rescored=None, k=5, **options):
    """The answer of the library, asked directly."""
    _, words, train, attributor, store = parts
    asked = load_examples([{"prompt": ASKED["prompt"], "response": ASKED["completion"]}], words)
    rescorer = None if rescored is None else Rescoring(rescored, asked, train, store.ids)
    return query_store(store, query_rows(attributor, asked, store), k, rescorer, **options)


def test_answers_are_those_of_the_library(parts):
    _, words, train, attributor, store = parts
    found = wanted(parts)
    with serving(StoreSearcher(store, attributor, words)) as (address, _, _):
        answer = httpx.post(f"{address}/search", json={**ASKED, "k": 5}, timeout=30).json()
        info = httpx.get(f"{address}/info").json()
        bad = httpx.post(f"{address}/search", json={"input_ids": [1, len(words)]}, timeout=30)
    assert [r["id"] for r in answer["results"]] == found.ids[0].tolist()
    assert [r["score"] for r in answer["results"]] == pytest.approx(found.values[0].tolist(), rel=1e-5)
    for result in answer["results"]:
        assert result["text"] == train.text(result["id"]) and result["metadata"] == {"source": f"row {result['id']}"}
    assert answer["exact"] is False and answer["recall"] is None and "not measured" in answer["note"]
    assert answer["query"]["counted"] < answer["query"]["tokens"]
    assert bad.status_code == 422
    assert info["searcher"]["compressor"] == "logra" and info["documents"] == COUNT and info["max_tokens"] == 128


def test_exact_scores_with_recall_and_certificate(parts, home):
    model, words, train, attributor, store = parts
    exact = pyinf.Attributor(model, "ekfac", certify=True).fit(train)
    found = wanted(parts, exact, rescore=20, sample=COUNT)
    searcher = StoreSearcher(store, attributor, words, exact=exact, train=train, rescore=20, sample=COUNT)
    with serving(searcher) as (address, _, _):
        answer = httpx.post(f"{address}/search", json={**ASKED, "k": 5}, timeout=60).json()
    scores = exact.score(load_examples([{"prompt": ASKED["prompt"], "response": ASKED["completion"]}], words), train)
    assert [r["id"] for r in answer["results"]] == found.ids[0].tolist()
    for result in answer["results"]:
        assert result["score"] == pytest.approx(float(scores.values[0, result["id"]]), rel=1e-4)
    assert [r["first_stage"] for r in answer["results"]] == pytest.approx(found.stage1[0].tolist(), rel=1e-5)
    assert answer["exact"] is True
    assert answer["recall"]["cut"] == 20 and answer["recall"]["value"] == pytest.approx(found.recall.value)
    assert answer["recall"]["low"] <= answer["recall"]["value"] <= answer["recall"]["high"]
    assert answer["certificate"]["verdict"] == found.certificate[0]["verdict"]
    assert str(home) not in json.dumps(answer)


def test_a_recall_out_of_reach_is_refused(parts):
    model, words, train, attributor, store = parts
    exact = pyinf.Attributor(model, "ekfac", certify=False).fit(train)
    searcher = StoreSearcher(
        store, attributor, words, exact=exact, train=train, recall=0.9999, sample=COUNT - 1, most=5
    )
    query = searcher.encode({"prompt": ASKED["prompt"], "response": ASKED["completion"]})
    with pytest.raises(Refused, match="was not reached"):
        searcher.search([query], 5)


def test_queries_that_share_a_search_get_their_own_answers(parts):
    _, words, train, attributor, store = parts
    searcher = StoreSearcher(store, attributor, words)
    queries = [Query(tuple(train[i]["input_ids"].tolist()), tuple(train[i]["labels"].tolist())) for i in (3, 17, 31)]
    together = searcher.search(queries, 4)
    for query, answer in zip(queries, together, strict=True):
        alone = searcher.search([query], 4)[0]
        assert [h.id for h in alone.hits] == [h.id for h in answer.hits]
        assert [h.score for h in alone.hits] == pytest.approx([h.score for h in answer.hits], rel=1e-4)
    assert together[0].hits[0].id != together[1].hits[0].id


def test_what_does_not_fit_together_is_refused(parts, home):
    model, words, train, attributor, store = parts
    with pytest.raises(ConfigError, match="both, or none"):
        StoreSearcher(store, attributor, words, train=train)
    with pytest.raises(ConfigError, match="need exact scores"):
        StoreSearcher(store, attributor, words, rescore=0.5)
    with pytest.raises(ConfigError, match="call fit"):
        StoreSearcher(store, attributor, words, exact=pyinf.Attributor(model, "ekfac"), train=train, rescore=0.5)
    kept = pyinf.Attributor(model, "ekfac", run_dir=home / "kept").fit(train)
    with pytest.raises(ConfigError, match="run_dir"):
        StoreSearcher(store, attributor, words, exact=kept, train=train, rescore=0.5)
    torch.manual_seed(5)
    other = type(model)(model.config)
    with pytest.raises(ArtifactError, match="another model"):
        StoreSearcher(store, pyinf.Attributor(other, "logra", rank=4), words)


# ------------------------------------------------------------------------------------------ the command line


def run(*arguments, **options):
    command = [sys.executable, "-m", "pyinf", "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_command_serves_and_stops(parts, home, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    process = run(
        home / "store", "--model", home / "model", "--port", 0, "--token-file", token, "--device", "cpu", "--json"
    )
    killer = threading.Timer(120, process.kill)
    killer.start()
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        facts = json.loads(line)
        assert facts["documents"] == COUNT and facts["token"] is True
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=facts["address"], timeout=60) as client:
            assert client.post("search", json=ASKED).status_code == 401
            answer = client.post("search", json={**ASKED, "k": 5}, headers=headers).json()
            assert str(home) not in client.get("").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stderr.read()
    finally:
        killer.cancel()
        process.kill()
    assert [r["id"] for r in answer["results"]] == wanted(parts).ids[0].tolist()
    assert "Traceback" not in process.stderr.read()


def command(capsys, *arguments):
    """The command in this process: exit code and what it says on standard error."""
    from pyinf.cli import main

    with pytest.raises(SystemExit) as end:
        main(["serve", *map(str, arguments)])
    return end.value.code, capsys.readouterr().err


def test_the_command_refuses_what_is_unsafe(home, capsys, monkeypatch):
    monkeypatch.delenv("PYINF_SERVE_TOKEN", raising=False)
    usual = (home / "store", "--model", home / "model")
    code, said = command(capsys, *usual, "--host", "0.0.0.0")
    assert code == 2 and "a token is needed" in said and "--token-file" in said
    monkeypatch.setenv("PYINF_SERVE_TOKEN", "short")
    code, said = command(capsys, *usual)
    assert code == 2 and "at least 16" in said
    monkeypatch.delenv("PYINF_SERVE_TOKEN")
    code, said = command(capsys, *usual, "--rescore", "0.5")
    assert code == 2 and "give --train" in said
    code, said = command(capsys, *usual, "--queue", "0")
    assert code == 2 and "queue is 0" in said
    code, said = command(capsys, home / "model", "--model", home / "model")
    assert code == 6 and "manifest.json" in said


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_the_missing_extra_is_named(home, capsys, monkeypatch, missing):
    for name in ("app", "server", "schemas"):
        monkeypatch.delitem(sys.modules, f"pyinf.serve.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    code, said = command(capsys, home / "store", "--model", home / "model")
    assert code == 2 and "pip install 'pyinf[serve]'" in said


def test_help_needs_no_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _ = command(capsys, "--help")
    assert code == 0
