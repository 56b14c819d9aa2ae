"""Queries to a store of compressed gradients, with exact scores of the best where a training set is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyinf.data import load_examples, model_limits
from pyinf.errors import ConfigError
from pyinf.methods.rescoring import Rescoring
from pyinf.serve.engine import Answer, Hit, Query, Refused
from pyinf.store.build import open_compressor, query_rows
from pyinf.store.reader import Store
from pyinf.store.retrieve import Retrieved, query_store

__all__ = ["StoreSearcher"]


class StoreSearcher:
    """A :class:`pyinf.serve.Searcher` over a store.

    Args:
        store: an open store.
        attributor: a :class:`pyinf.Attributor` of the method, the model and the layers that the store was built with.
        tokenizer: for text; None: token ids only.
        encoding: how text becomes tokens, as :func:`pyinf.data.load_examples` takes it: ``separator``, ``add_eos``,
            ``prompt_loss``; as it was for the training data.
        exact: an attributor with fitted or loaded factors; with ``train`` it gives the best rows exact scores.
        train: the training set that the store was built from.
        rescore, recall, sample, recall_by, most: as in :func:`pyinf.store.query_store`; with ``exact``, one of the
            first two.
        coarse: as in :func:`pyinf.store.query_store`.
        batch_size, tol: of the exact scores.

    Raises:
        ConfigError: options that do not fit together.
        ArtifactError: the store was built with another model.
    """

    def __init__(
        self,
        store: Store,
        attributor: Any,
        tokenizer: Any = None,
        encoding: Mapping[str, Any] | None = None,
        exact: Any = None,
        train: Any = None,
        rescore: float | int | None = None,
        recall: float | None = None,
        sample: int | None = None,
        recall_by: str = "low",
        most: float | int = 0.1,
        coarse: str | None = None,
        batch_size: int | None = None,
        tol: float | None = None,
    ) -> None:
        if (exact is None) != (train is None):
            raise ConfigError("exact scores need an attributor with factors and the training data: give both, or none")
        if exact is None and (rescore is not None or recall is not None):
            raise ConfigError("rescore and recall need exact scores: give the factors of a fit and the training data")
        if exact is not None and (rescore is None) == (recall is None):
            raise ConfigError("give rescore (how many candidates) or recall (how much of the top k), one of them")
        if exact is not None and exact.run_dir is not None:
            raise ConfigError("the attributor of exact scores has a run_dir, which would keep every query; unset it")
        self.store, self.attributor, self.tokenizer = store, attributor, tokenizer
        self.encoding = dict(encoding or {})
        self.exact, self.train = exact, train
        self.options = {"rescore": rescore, "recall": recall, "sample": sample, "recall_by": recall_by, "most": most}
        self.coarse, self.batch_size, self.tol = coarse, batch_size, tol
        self.count = int(store.count)
        self.vocabulary, self.positions = model_limits(attributor.model)
        self.reads_text = tokenizer is not None
        self.compressor = open_compressor(store, attributor)
        if exact is not None:
            self._rescoring([{"input_ids": torch.zeros(2, dtype=torch.int64)}])  # what does not fit is an error now

    def _rescoring(self, examples: list[dict[str, Any]]) -> Rescoring | None:
        if self.exact is None:
            return None
        return Rescoring(self.exact, examples, self.train, self.store.ids, self.batch_size, self.tol)

    def encode(self, record: Mapping[str, str]) -> Query:
        """Tokens of a text, or of prompt and response. Raises ``DataError``."""
        example = load_examples([dict(record)], self.tokenizer, name="query", **self.encoding)[0]
        return Query(tuple(example["input_ids"].tolist()), tuple(example["labels"].tolist()))

    def search(self, queries: Sequence[Query], k: int) -> list[Answer]:
        """One scan of the store for all of them, then exact scores of their best.

        Raises:
            Refused: the recall that the service is to keep was not reached.
        """
        examples = [_example(query) for query in queries]
        rows = query_rows(self.attributor, examples, self.compressor)
        rescorer = self._rescoring(examples)
        options = {} if rescorer is None else self.options
        try:
            found = query_store(
                self.store, rows, k, rescorer, normalise=self.store.normalise, coarse=self.coarse, **options
            )
        except ConfigError as error:
            if self.options["recall"] is None:
                raise
            raise Refused(
                "recall_not_reached",
                f"a recall of {self.options['recall']:g} at {k} was not reached for this query with the candidates "
                f"that this service takes at most",
            ) from error
        return [self._answer(found, q) for q in range(len(queries))]

    def _answer(self, found: Retrieved, q: int) -> Answer:
        hits = []
        for j, document in enumerate(found.documents[q]):
            ids = found.ids[q, j].reshape(-1).tolist()
            position = ids[1] if len(ids) > 1 else None
            hits.append(Hit(ids[0], float(found.values[q, j]), float(found.stage1[q, j]), document or {}, position))
        recall = None if found.recall is None else {**found.recall.to_dict(), "queries": len(found.values)}
        certificate = None if found.certificate is None else found.certificate[q]
        return Answer(hits, self.exact is not None, recall, None, certificate, found.cost)

    def describe(self) -> dict[str, Any]:
        """What the store holds and how it is searched."""
        spec = self.store.spec
        facts: dict[str, Any] = {
            "compressor": spec.compressor,
            "format": spec.format,
            "granularity": spec.granularity,
            "bytes_per_row": spec.row_bytes,
            "rows": self.count,
            "damping": spec.damping,
            "model": (spec.model or "")[:16] or None,
            "data": (spec.data or "")[:16] or None,
            "exact_scores": None if self.exact is None else self.exact.method.name,
        }
        return facts | (
            {} if self.exact is None else {k: self.options[k] for k in ("rescore", "recall") if self.options[k]}
        )


def _example(query: Query) -> dict[str, torch.Tensor]:
    labels = query.input_ids if query.labels is None else query.labels
    return {"input_ids": torch.tensor(query.input_ids), "labels": torch.tensor(labels)}
