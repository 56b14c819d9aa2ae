"""BM25: the lexical baseline. It knows no model and no gradient, only which words a query and an example share.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), in the Lucene variant
(Kamphuis et al., 2020); index and sums by the ``bm25s`` library (Lù, 2024, arXiv 2407.03618).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pyinf.errors import ConfigError, DataError
from pyinf.progress import stage

__all__ = ["bm25_scores", "bm25_terms"]

_WORD = re.compile(r"[^\W_]+", re.UNICODE)


def bm25_terms(text: str) -> list[str]:
    """The words of ``text`` in order, case-folded: runs of letters and digits (``heap_push`` is two words)."""
    return [word.casefold() for word in _WORD.findall(text)]


def _documents(
    examples: Sequence[Any], name: str, texts: Sequence[str] | None, split: Callable[[str], list[str]]
) -> list[list[Hashable]]:
    """One list of terms an example: words where there is text, token ids otherwise."""
    if texts is not None:
        if len(texts) != len(examples):
            raise DataError(f"{name}: {len(texts)} texts for {len(examples)} examples; give one text an example.")
        return [list(split(text)) for text in texts]
    documents: list[list[Hashable]] = []
    for i in range(len(examples)):
        example = examples[i]
        if isinstance(example, str):
            documents.append(list(split(example)))
        elif isinstance(example, Mapping) and "input_ids" in example:
            ids = torch.as_tensor(example["input_ids"]).reshape(-1)
            mask = example.get("attention_mask")
            if mask is not None:
                ids = ids[torch.as_tensor(mask).reshape(-1).bool()]
            documents.append(list(ids.tolist()))
        else:
            raise DataError(f"{name}[{i}] is neither a text nor a mapping with 'input_ids'; BM25 needs one of them.")
    return documents


def _numbered(documents: Iterable[list[Hashable]], vocabulary: dict[Hashable, int], grow: bool) -> list[list[int]]:
    """Terms as consecutive numbers; a term the training set has never seen is dropped when ``grow`` is false."""
    numbered = []
    for document in documents:
        if grow:
            numbered.append([vocabulary.setdefault(term, len(vocabulary)) for term in document])
        else:
            numbered.append([vocabulary[term] for term in document if term in vocabulary])
    return numbered


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
    try:
        import bm25s
    except ImportError as error:  # it is a declared dependency, so this is a broken installation
        raise ConfigError("Method 'bm25' needs the package bm25s: pip install bm25s") from error

    vocabulary: dict[Hashable, int] = {}
    with stage("BM25 index", total=len(train)) as running:
        documents = _numbered(_documents(train, "train", train_texts, split), vocabulary, grow=True)
        asked = _numbered(_documents(queries, "queries", query_texts, split), vocabulary, grow=False)
        scores = np.zeros((len(queries), len(train)), dtype=np.float32)
        if vocabulary:
            index = bm25s.BM25(k1=k1, b=b, method="lucene")
            numbers = {number: number for number in range(len(vocabulary))}
            index.index((documents, numbers), create_empty_token=False, show_progress=False)
            for q, terms in enumerate(asked):
                if terms:
                    scores[q] = index.get_scores_from_ids(terms)
        running.advance(len(train))
    return torch.from_numpy(scores)
