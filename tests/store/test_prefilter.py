from __future__ import annotations

import pytest
import torch
import transformers as tf

from pyinf.errors import ConfigError, DataError, ModelError
from pyinf.methods.bm25 import bm25_scores
from pyinf.store.prefilter import BM25Prefilter, EmbeddingPrefilter, hidden_states

TEXTS = ["the heap is a list", "nothing here", "a heap of heap pages", "calendar of the year", "list of lists"]


def test_bm25_keeps_the_best_by_bm25():
    queries = ["heap list", "calendar", "absent"]
    found = BM25Prefilter(queries, TEXTS).top(5)
    scores = bm25_scores(queries, TEXTS)
    assert torch.equal(found, scores.sort(dim=1, descending=True, stable=True).indices)
    assert found[2].tolist() == [0, 1, 2, 3, 4]  # nothing in common: the order of the rows
    assert torch.equal(BM25Prefilter(queries, TEXTS).top(2), found[:, :2])


def test_bm25_of_token_ids_and_of_texts():
    train = [{"input_ids": [3, 4]}, {"input_ids": [9, 9]}]
    assert BM25Prefilter([{"input_ids": [9]}], train).top(1).tolist() == [[1]]
    assert BM25Prefilter([{"input_ids": [9]}], train, ["a heap"], ["the heap", "no"]).top(1).tolist() == [[0]]


def test_embeddings_are_compared_by_cosine():
    generator = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(50, 8, generator=generator), torch.randn(4, 8, generator=generator)
    rows[7] *= 100  # a long one is no nearer
    found = EmbeddingPrefilter(queries, rows).top(10)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], rows[None], dim=2)
    assert torch.equal(found, cosine.topk(10, dim=1).indices)


def test_an_encoder_of_ones_own():
    def encoder(examples):
        return torch.tensor([[len(e["input_ids"]), 1.0] for e in examples])

    train = [{"input_ids": list(range(n))} for n in (1, 30, 2, 9)]
    found = EmbeddingPrefilter.of(encoder, [{"input_ids": list(range(40))}], train, batch=3).top(2)
    assert found.tolist() == [[1, 3]]
    with pytest.raises(DataError, match="the encoder gave shape"):
        EmbeddingPrefilter.of(lambda examples: torch.zeros(3), train, train)


def test_hidden_states_are_means_over_counted_positions():
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = tf.GPT2LMHeadModel(config).train()
    data = [{"input_ids": [3, 4, 5, 6]}, {"input_ids": [7, 8]}, {"input_ids": [9, 1, 2], "attention_mask": [0, 1, 1]}]
    found = hidden_states(model, data)
    assert model.training
    model.eval()
    for row, ids in zip(found, ([3, 4, 5, 6], [7, 8], [1, 2]), strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(row, states[-1][0].mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hidden_states(model, data, layer=1), found)
    with pytest.raises(ModelError, match="hidden_states"):
        hidden_states(torch.nn.Linear(4, 4), data)


def test_errors():
    with pytest.raises(ConfigError, match="cannot keep 6 of 5"):
        BM25Prefilter(["a"], TEXTS).top(6)
    with pytest.raises(DataError, match="at least one"):
        BM25Prefilter([], TEXTS)
    with pytest.raises(ConfigError, match="one side only"):
        BM25Prefilter(["a"], TEXTS, query_texts=["a"])
    with pytest.raises(DataError, match="one encoder for both"):
        EmbeddingPrefilter(torch.ones(1, 3), torch.ones(2, 4))
    with pytest.raises(DataError, match="not finite"):
        EmbeddingPrefilter(torch.full((1, 3), float("nan")), torch.ones(2, 3))
