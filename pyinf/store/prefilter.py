"""Rows worth looking at, found without gradients: words in common (BM25), or neighbours of embeddings.

FastIF's idea (Guo et al. 2021, arXiv 2012.15781, EMNLP): nearest neighbours first, influence only among them. What a
prefilter loses no later stage can bring back, so :func:`pyinf.store.query_store` measures its recall with every use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pyinf import progress
from pyinf.data.batching import make_batches, prepare
from pyinf.data.lexical import BM25Index, documents_of
from pyinf.errors import ConfigError, DataError, ModelError

__all__ = ["BM25Prefilter", "EmbeddingPrefilter", "Prefilter", "hidden_states"]


class Prefilter(Protocol):
    """What ranks the rows of a store without their gradients. ``count`` rows, in the store's order."""

    name: str
    count: int

    def top(self, keep: int) -> Tensor:
        """The best rows of every query: int64 ``[Q, keep]``, best first."""


def _checked(keep: int, count: int) -> None:
    if not 1 <= keep <= count:
        raise ConfigError(f"a prefilter cannot keep {keep} of {count} rows; give 1 to {count}")


class BM25Prefilter:
    """The rows that share the most telling words with a query.

    Args:
        queries, documents: texts, or mappings with ``input_ids`` (then token ids are the words). ``documents`` stand in
            the order of the store's rows: ``[train[i] for i in store.ids]``.
        query_texts, texts: readable texts of both, to compare words instead.
        k1, b: of BM25.

    Raises:
        DataError, ConfigError: as :func:`pyinf.methods.bm25.bm25_scores`.
    """

    name = "bm25"

    def __init__(
        self,
        queries: Sequence[Any],
        documents: Sequence[Any],
        query_texts: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        k1: float = 1.5,
        b: float = 0.75,
    ) -> None:
        if len(queries) == 0 or len(documents) == 0:
            raise DataError("BM25 needs at least one query and one document")
        if (query_texts is None) != (texts is None):
            raise ConfigError("BM25 got texts for one side only; give query_texts and texts, or neither.")
        self.count = len(documents)
        with progress.stage("BM25 index", self.count) as running:
            self._index = BM25Index(documents_of(documents, "train", texts), k1, b)
            self._asked = documents_of(queries, "queries", query_texts)
            running.advance(self.count)

    def top(self, keep: int) -> Tensor:
        """The best rows of every query; documents without a word in common come last, in their order."""
        _checked(keep, self.count)
        out = torch.empty(len(self._asked), keep, dtype=torch.int64)
        for q, terms in enumerate(self._asked):
            scores = torch.from_numpy(self._index.scores(terms))
            out[q] = scores.sort(descending=True, stable=True).indices[:keep]
        return out


class EmbeddingPrefilter:
    """The rows whose embeddings have the largest cosine with a query's; a flat FAISS index, so nothing is approximate.

    Args:
        queries: embeddings ``[Q, d]``. rows: ``[N, d]``, in the order of the store's rows. Any sentence encoder's, or
            the model's own (:func:`hidden_states`).

    Raises:
        ConfigError: FAISS is not installed.
        DataError: shapes that do not fit, or an embedding that is not finite.
    """

    name = "embedding"

    def __init__(self, queries: Tensor | np.ndarray, rows: Tensor | np.ndarray) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ConfigError("embedding neighbours need FAISS: pip install 'pyinf[store]'") from error
        self._queries, self._rows = _unit(queries, "queries"), _unit(rows, "rows")
        if self._queries.shape[1] != self._rows.shape[1]:
            raise DataError(
                f"query embeddings have {self._queries.shape[1]} values, those of the rows {self._rows.shape[1]}; use "
                "one encoder for both"
            )
        self.count = len(self._rows)
        self._index = faiss.IndexFlatIP(self._rows.shape[1])
        self._index.add(self._rows)

    @classmethod
    def of(
        cls, encoder: Callable[[Sequence[Any]], Any], queries: Sequence[Any], documents: Sequence[Any], batch: int = 64
    ) -> EmbeddingPrefilter:
        """With an encoder that takes a list of examples (or texts) and returns their embeddings ``[n, d]``."""

        def encode(examples: Sequence[Any], what: str) -> Tensor:
            found = []
            with progress.stage(f"embeddings of {what}", len(examples)) as running:
                for start in range(0, len(examples), batch):
                    part = [examples[i] for i in range(start, min(start + batch, len(examples)))]
                    rows = torch.as_tensor(encoder(part)).detach().float().cpu()
                    if rows.dim() != 2 or len(rows) != len(part):
                        raise DataError(f"the encoder gave shape {tuple(rows.shape)} for {len(part)} examples")
                    found.append(rows)
                    running.advance(len(part))
            return torch.cat(found)

        return cls(encode(queries, "the queries"), encode(documents, "the training set"))

    def top(self, keep: int) -> Tensor:
        """The best rows of every query."""
        _checked(keep, self.count)
        return torch.from_numpy(self._index.search(self._queries, keep)[1]).to(torch.int64)


def _unit(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    rows = np.array(values.detach().cpu().float().numpy() if isinstance(values, Tensor) else values, dtype=np.float32)
    if rows.ndim != 2 or 0 in rows.shape:
        raise DataError(f"embeddings of {name} have shape {rows.shape}; they must be examples × dimensions")
    if not np.isfinite(rows).all():
        raise DataError(f"an embedding of {name} is not finite")
    return np.ascontiguousarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


@torch.no_grad()
def hidden_states(
    model: nn.Module, examples: Sequence[Any], layer: int = -1, token_budget: int = 4096, name: str = "train"
) -> Tensor:
    """The model's own hidden states, averaged over the counted positions of every example: float32 ``[N, d]``.

    Args:
        model: one that gives ``hidden_states`` (as transformers' models do); in evaluation mode meanwhile.
        layer: which of them; −1 is the last.

    Raises:
        ModelError: the model gives none.
        DataError: as every pass over data.
    """
    data = prepare(examples, name, model)
    device = next(model.parameters()).device
    out: Tensor | None = None
    training = model.training
    model.eval()
    try:
        with progress.stage(f"embeddings of {name}", len(data)) as running:
            for batch in make_batches(data.lengths, range(len(data)), None, token_budget):
                inputs = data.batch(batch, device).inputs
                given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
                try:
                    found = getattr(model(**given, output_hidden_states=True), "hidden_states", None)
                except TypeError as error:
                    raise ModelError(f"{type(model).__name__} takes no output_hidden_states: {error}") from error
                if found is None:
                    raise ModelError(f"{type(model).__name__} gives no hidden_states; use an encoder of your own")
                states = found[layer].float()
                mask = given["attention_mask"]
                weight = torch.ones(states.shape[:2], device=device) if mask is None else mask.float()
                pooled = (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
                if out is None:
                    out = torch.zeros(len(data), pooled.shape[1])
                out[batch] = pooled.cpu()
                running.advance(len(batch))
    finally:
        model.train(training)
    assert out is not None
    return out
