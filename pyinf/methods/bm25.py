"""BM25: the lexical baseline. It knows no model and no gradient, only which words a query and an example share.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), in the Lucene variant
(Kamphuis et al., 2020); index and sums by the ``bm25s`` library (Lù, 2024, arXiv 2407.03618).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyinf.data.lexical import BM25Index, bm25_terms, documents_of
from pyinf.errors import ConfigError, DataError
from pyinf.progress import stage

__all__ = ["bm25_scores", "bm25_terms"]


def bm25_scores(
    queries: Sequence[Any],
    train: Sequence[Any],
    *,
    query_texts: Sequence[str] | None = None,
    train_texts: Sequence[str] | None = None,
    k1: float = 1.5,
    b: float = 0.75,
    split: Callable[[str], list[str]] = bm25_terms,
) -> torch.Tensor:
    """BM25 of every query with every training example.

    ``τ(q, i) = Σ_{w in q} idf(w) · f(w, i) / (f(w, i) + k1 · (1 − b + b · |i| / mean|i|))`` with
    ``idf(w) = ln(1 + (N − n_w + 0.5) / (n_w + 0.5))``; a word that stands twice in the query counts twice.

    Args:
        queries: Q texts or mappings with ``input_ids``.
        train: N texts or mappings with ``input_ids``.
        query_texts: the Q readable texts, given together with ``train_texts``; then words are compared. Without them,
            mappings are compared by token id.
        train_texts: the N readable texts.
        k1: how fast a repeated word saturates, > 0.
        b: how much length is normalised, 0 to 1.
        split: cuts a text into terms.

    Returns:
        float32 ``[Q, N]`` on the CPU, ≥ 0, without unit; 0 where no word is shared. Higher = more similar.

    Raises:
        DataError: an empty side, or examples that are neither texts nor token ids.
        ConfigError: ``k1`` or ``b`` out of range, or texts given for one side only.
    """
    if not k1 > 0 or not 0 <= b <= 1:
        raise ConfigError(f"BM25 needs k1 > 0 and 0 ≤ b ≤ 1, not k1={k1!r}, b={b!r}.")
    if (query_texts is None) != (train_texts is None):
        raise ConfigError("BM25 got texts for one side only; give query_texts and train_texts, or neither.")
    for name, side in (("queries", queries), ("train", train)):
        if len(side) == 0:
            raise DataError(f"BM25: {name} is empty; give at least one example.")
    with stage("BM25 index", total=len(train)) as running:
        index = BM25Index(documents_of(train, "train", train_texts, split), k1, b)
        asked = documents_of(queries, "queries", query_texts, split)
        scores = np.zeros((len(queries), len(train)), dtype=np.float32)
        for q, terms in enumerate(asked):
            scores[q] = index.scores(terms)
        running.advance(len(train))
    return torch.from_numpy(scores)
