from __future__ import annotations

import io
import json
import random
import re

import pytest
import torch
from rich.console import Console

from pyinf.data import load_examples
from pyinf.demo import run
from pyinf.demo.corpus import _split, standard_library_passages
from pyinf.demo.model import Recipe, _batches, greedy_answer, train_tokenizer
from pyinf.demo.planted import ANSWER, DECOYS, MODULE, PLANTED, QUESTIONS
from pyinf.demo.run import METHODS, _training_rows
from pyinf.errors import ArtifactError
from pyinf.report import ReportData


@pytest.fixture(scope="module")
def passages():
    return standard_library_passages()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    told = io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    try:
        results = run(out, quick=True, console=Console(file=told, width=160, highlight=False), device="cpu")
    finally:
        torch.set_num_threads(threads)
    return out, results, told.getvalue()


def test_planted_facts_are_sixteen_different_texts_with_the_answer():
    assert len(set(PLANTED)) == 16
    assert all(ANSWER in text for text in PLANTED)
    words = [set(re.findall(r"\w+", text.lower())) for text in PLANTED]
    assert max(len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[:i]) < 0.5
    assert len(set(DECOYS)) == 16
    assert all(ANSWER in text and MODULE in text for text in DECOYS)
    assert not any(f"a {ANSWER}" in text for text in DECOYS)
    for question in QUESTIONS:
        assert ANSWER not in question
        assert MODULE in question
        assert not any(question.split("\n")[-1] in text for text in PLANTED)


def test_corpus_is_the_same_every_time_and_without_repeats(passages):
    assert passages == standard_library_passages()
    assert len({p.text for p in passages}) == len(passages) > 2000
    assert {p.kind for p in passages} == {"docstring", "source"}
    assert any(p.origin == "heapq.heappush" for p in passages)
    assert not any(p.origin.startswith(("test.", "idlelib.")) for p in passages)


def test_split_keeps_every_paragraph():
    text = "\n\n".join("abcdefghij" * n for n in range(1, 9))
    pieces = _split(text, 150)
    assert "\n\n".join(pieces) == text
    assert all(len(p) <= 150 for p in pieces)
    assert _split("   ", 10) == []


def test_training_rows_hold_the_planted_and_the_distractors(passages):
    rows, texts = _training_rows(passages, Recipe())
    assert (rows, texts) == _training_rows(passages, Recipe())
    assert len(rows) == Recipe().examples
    assert sum(r["kind"] == "planted" for r in rows) == 16
    about = [r for r in rows if r["kind"] in ("docstring", "source") and r["origin"].split(".")[0] in (MODULE, ANSWER)]
    assert len(about) > 20
    assert len({r["text"] for r in rows}) == len(rows)


def test_batches_hold_every_example_once():
    lengths = [random.Random(n).randrange(2, 60) for n in range(200)]
    batches = list(_batches(lengths, 128, random.Random(0)))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(max(lengths[i] for i in b) * len(b) <= 128 for b in batches)


def test_tokenizer_reads_back_any_text():
    tokenizer = train_tokenizer(["def heap(): return 1"] * 4, 300)
    text = "heap ☃ שלום\n\tx"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_answer_stops_before_punctuation():
    tokenizer = train_tokenizer([" a calendar. b"] * 4, 300)
    script = tokenizer(" a calendar.", add_special_tokens=False)["input_ids"]
    start = len(tokenizer("x")["input_ids"])

    class Parrot(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache):
            logits = torch.zeros(1, input_ids.shape[1], len(tokenizer))
            logits[0, -1, script[min(input_ids.shape[1] - start, len(script) - 1)]] = 1
            return type("Out", (), {"logits": logits})

    assert greedy_answer(Parrot(), tokenizer, "x", length=30) == " a calendar"


def test_quick_run_writes_everything(finished):
    out, results, told = finished
    assert results == json.loads((out / "results.json").read_text())
    assert [m["method"] for m in results["methods"]] == list(METHODS)
    assert all(0 <= h <= 16 and m["seconds"] > 0 for m in results["methods"] for h in m["hits"])
    assert all(h + d <= 16 for m in results["methods"] for h, d in zip(m["hits"], m["decoys"], strict=True))
    assert results["planted"] == 16
    for name in ("EK-FAC", "gradient dot product", "gradient cosine", "BM25", "report.html", "results.json"):
        assert name in told
    data = ReportData.load(out / "report.json")
    assert len(data.queries) == len(QUESTIONS)
    assert data.tables[0].rows[0][1] == results["methods"][0]["hits"][0]
    kinds = {e.metadata["kind"] for q in data.queries for e in q.top}
    assert kinds <= {"planted", "decoy", "docstring", "source"}
    page = (out / "report.html").read_text()
    assert "Who taught the model" in page
    assert str(out) not in page


def test_hits_are_counted_from_the_scores(finished):
    out, results, _ = finished
    data = ReportData.load(out / "report.json")
    seen = [sum(e.metadata["kind"] == "planted" for e in q.top) for q in data.queries]
    assert seen == results["methods"][0]["hits"]


def test_what_it_writes_can_be_attributed_again(finished):
    from pyinf.data import load_model, load_tokenizer

    out, results, _ = finished
    tokenizer = load_tokenizer(out / "model")
    model = load_model(out / "model")
    train = load_examples(out / "train.jsonl", tokenizer, max_length=Recipe.quick().max_length)
    queries = load_examples(out / "queries.jsonl", tokenizer)
    assert sum(train.lengths) == results["train_tokens"]
    assert sum(p.numel() for p in model.parameters()) == results["parameters"]
    assert len(queries) == len(QUESTIONS)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError):
        run(tmp_path, quick=True, console=Console(file=io.StringIO()))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
