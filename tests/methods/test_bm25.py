from __future__ import annotations

import math

import pytest
import torch

from pyinf.errors import ConfigError, DataError
from pyinf.methods.bm25 import bm25_scores, bm25_terms


def by_hand(query, documents, k1=1.5, b=0.75):
    """The formula of the docstring, word by word."""
    mean = sum(map(len, documents)) / len(documents)
    out = []
    for document in documents:
        score = 0.0
        for word in query:
            holders = sum(word in d for d in documents)
            idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            f = document.count(word)
            score += idf * f / (f + k1 * (1 - b + b * len(document) / mean))
        out.append(score)
    return out


TEXTS = ["The heap is a list.", "the calendar", "", "Heap, heap and heap_queue; calendar of 2024"]


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (2.0, 0.9)])
def test_equals_the_formula(k1, b):
    queries = ["which heap heap calendar", "nothing shared", ""]
    found = bm25_scores(queries, TEXTS, k1=k1, b=b)
    expected = [by_hand(bm25_terms(q), [bm25_terms(t) for t in TEXTS], k1, b) for q in queries]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_token_ids_and_texts():
    masked = {"input_ids": torch.tensor([9, 3]), "attention_mask": [1, 0]}
    train = [{"input_ids": [3, 4, 4]}, masked, {"input_ids": [7]}]
    queries = [{"input_ids": torch.tensor([3, 4])}]
    ids = [[3, 4, 4], [9], [7]]
    torch.testing.assert_close(
        bm25_scores(queries, train), torch.tensor([by_hand([3, 4], ids)], dtype=torch.float32), rtol=1e-5, atol=1e-6
    )
    texts = bm25_scores(queries, train, query_texts=["heap"], train_texts=["a heap", "b", "c"])
    assert texts.argmax().item() == 0


def test_words():
    assert bm25_terms("heap_push(x2), Straße!") == ["heap", "push", "x2", "strasse"]


def test_errors():
    with pytest.raises(DataError, match="train is empty"):
        bm25_scores(["a"], [])
    with pytest.raises(DataError, match="queries is empty"):
        bm25_scores([], ["a"])
    with pytest.raises(ConfigError, match="k1"):
        bm25_scores(["a"], ["a"], k1=0)
    with pytest.raises(ConfigError, match="one side"):
        bm25_scores(["a"], ["a"], query_texts=["a"])
    with pytest.raises(DataError, match="1 texts for 2"):
        bm25_scores(["a"], ["a", "b"], query_texts=["a"], train_texts=["a"])
    with pytest.raises(DataError, match=r"train\[0\]"):
        bm25_scores(["a"], [3])
