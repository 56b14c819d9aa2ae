"""Words that texts share: terms of a text, and an index that gives the BM25 of a query with every document.

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

__all__ = ["BM25Index", "bm25_terms", "documents_of"]

_WORD = re.compile(r"[^\W_]+", re.UNICODE)


def bm25_terms(text: str) -> list[str]:
    """The words of ``text`` in order, case-folded: runs of letters and digits (``heap_push`` is two words)."""
    return [word.casefold() for word in _WORD.findall(text)]


def documents_of(
    examples: Sequence[Any],
    name: str,
    texts: Sequence[str] | None = None,
    split: Callable[[str], list[str]] = bm25_terms,
) -> list[list[Hashable]]:
    """One list of terms an example: words where there is text, token ids otherwise.

    Raises:
        DataError: another number of texts, or an example that is neither a text nor a mapping with ``input_ids``.
    """
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


class BM25Index:
    """``τ(q, i) = Σ_{w in q} idf(w) · f(w, i) / (f(w, i) + k1 · (1 − b + b · |i| / mean|i|))`` over N documents.

    ``idf(w) = ln(1 + (N − n_w + 0.5) / (n_w + 0.5))``; a word that stands twice in the query counts twice; words that
    no document has are dropped.

    Raises:
        ConfigError: ``k1`` or ``b`` out of range, or ``bm25s`` is not installed.
    """

    def __init__(self, documents: Sequence[Sequence[Hashable]], k1: float = 1.5, b: float = 0.75) -> None:
        if not k1 > 0 or not 0 <= b <= 1:
            raise ConfigError(f"BM25 needs k1 > 0 and 0 ≤ b ≤ 1, not k1={k1!r}, b={b!r}.")
        try:
            import bm25s
        except ImportError as error:  # it is a declared dependency, so this is a broken installation
            raise ConfigError("Method 'bm25' needs the package bm25s: pip install bm25s") from error
        self.count = len(documents)
        self._vocabulary: dict[Hashable, int] = {}
        numbered = [[self._number(term) for term in document] for document in documents]
        self._index = None
        if self._vocabulary:
            self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
            names = {number: number for number in range(len(self._vocabulary))}
            self._index.index((numbered, names), create_empty_token=False, show_progress=False)

    def _number(self, term: Hashable) -> int:
        return self._vocabulary.setdefault(term, len(self._vocabulary))

    def scores(self, terms: Iterable[Hashable]) -> np.ndarray:
        """Of one query with every document: float32 ``[N]``, ≥ 0; 0 where no word is shared."""
        known = [self._vocabulary[term] for term in terms if term in self._vocabulary]
        if self._index is None or not known:
            return np.zeros(self.count, dtype=np.float32)
        return np.asarray(self._index.get_scores_from_ids(known), dtype=np.float32)
