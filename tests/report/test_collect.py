from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pyinf
from pyinf.errors import ConfigError, DataError
from pyinf.report import ReportData, collect, render_html


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    train = [{"input_ids": torch.randint(1, 40, (4 + i % 5,), generator=generator)} for i in range(12)]
    queries = [
        {"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([-100, -100, 7, 8])},
        {"input_ids": torch.tensor([9, 3, 2])},
    ]
    return model, train, queries


def test_parts_add_up_to_the_score(run, tmp_path):
    model, train, queries = run
    attributor = pyinf.Attributor(model, method="ekfac", fisher="empirical").fit(train)
    scores = attributor.score(queries, train)
    data = collect(attributor, scores, queries, train, k=4, bottom=2)
    assert [len(q.top) for q in data.queries] == [4, 4]
    assert [len(q.bottom) for q in data.queries] == [2, 2]
    assert data.queries[0].counted == [False, False, True, True]
    assert data.queries[1].counted == [False, True, True]
    for q, query in enumerate(data.queries):
        order = scores.values[q].argsort(descending=True).tolist()
        assert [e.index for e in query.top] == order[:4]
        assert [e.index for e in query.bottom] == order[:-3:-1]
        assert [e.rank for e in query.bottom] == [12, 11]
        assert sum(query.histogram.counts) == 12
        assert sum(query.module_shares.values()) == pytest.approx(1)
        assert set(query.module_shares) == set(scores.meta["modules"])
        for example in (*query.top, *query.bottom):
            assert sum(example.token_scores) == pytest.approx(example.score, rel=1e-3, abs=1e-4)
            assert len(example.tokens) == len(train[example.index]["input_ids"])
    assert data.options["damping"] == 0.1
    assert data.plan
    data.save(tmp_path / "r.json")
    assert ReportData.load(tmp_path / "r.json") == data
    assert "Where in the model" in render_html(data)


def test_methods_without_parts_say_so(run):
    model, train, queries = run
    for method in ("grad_cos", "bm25"):
        attributor = pyinf.Attributor(model, method=method)
        data = collect(attributor, attributor.score(queries, train), queries, train, k=2)
        assert data.queries[0].top[0].token_scores is None
        assert data.queries[0].module_shares == {}
        assert any("unshaded" in value for _, value in data.facts)
        render_html(data)


def test_only_the_top_kept(run):
    model, train, queries = run
    attributor = pyinf.Attributor(model, method="grad_dot")
    scores = attributor.score(queries, train, topk=3)
    data = collect(attributor, scores, queries, train, k=8, max_queries=1, max_tokens=2)
    assert len(data.queries) == 1
    assert len(data.queries[0].top) == 3
    assert data.queries[0].histogram is None
    assert data.queries[0].bottom == []
    assert data.queries[0].top[0].omitted_tokens > 0
    names = [name for name, _ in data.facts]
    assert "opponents" in names
    assert "queries" in names
    assert "more tokens are not shown" in render_html(data)


def test_examples_bring_their_text_and_columns(run):
    from pyinf.data import load_examples

    model, train, queries = run
    ids = [t["input_ids"].tolist() for t in train]
    rows = [{"input_ids": row, "label": f"class {i}", "essay": "x" * 100} for i, row in enumerate(ids)]
    train = load_examples(rows)
    attributor = pyinf.Attributor(model, method="grad_dot")
    data = collect(attributor, attributor.score(queries, train), queries, train, k=1)
    shown = data.queries[0].top[0]
    assert shown.metadata == {"label": f"class {shown.index}"}


def test_tokens_of_a_plain_list_are_read_with_the_tokenizer(run):
    from pyinf.report.collect import _tokens

    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    ids = list("aé👍 b".encode())
    pieces = _tokens([{"input_ids": ids}], 0, Bytes())
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "aé👍 b"


def test_errors(run):
    model, train, queries = run
    attributor = pyinf.Attributor(model, method="grad_dot")
    scores = attributor.score(queries, train)
    with pytest.raises(ConfigError, match="k=0"):
        collect(attributor, scores, queries, train, k=0)
    with pytest.raises(DataError, match="score them again"):
        collect(attributor, scores, queries, train[:5])
