"""Exact scores of a few queries and training examples, for the second stage of a store: the examples are run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyinf.errors import ConfigError, DataError

__all__ = ["ExampleSubset", "Rescoring"]


class ExampleSubset:
    """Some examples of a collection, by number."""

    def __init__(self, examples: Any, chosen: Sequence[int]) -> None:
        self.examples, self.chosen = examples, [int(i) for i in chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Any:
        return self.examples[self.chosen[index]]


class Rescoring:
    """A :class:`pyinf.store.Rescorer` made of an :class:`pyinf.Attributor`.

    Args:
        attributor: with fitted (or loaded) factors where its method has any: ``ekfac``, or a method that solves.
        queries, train: as given to ``attributor.score``; ``train`` is the whole training set.
        ids: which training example each row of the store is, ``store.ids``.
        batch_size: sequences a batch, at most.
        tol: refine the queries until their relative residual and error bound are at most this.

    A method that solves gets all its queries at once, since they share the solver's work; its curvature, and that of
    certificates, is that of the data it was fitted on, or of ``train`` where factors were loaded.

    Raises:
        ConfigError: a method without gradients, or without the factors it needs.
        DataError: an id that is not in the training set.
    """

    def __init__(
        self,
        attributor: Any,
        queries: Any,
        train: Any,
        ids: np.ndarray,
        batch_size: int | None = None,
        tol: float | None = None,
    ) -> None:
        method = attributor.method
        if method.kind != "gradient":
            raise ConfigError(f"method '{method.name}' has no gradients to compute again; rescore with ekfac")
        if method.factors is not None and attributor.factors is None:
            raise ConfigError(
                f"method '{method.name}' needs factors; call fit(train) first, or load_factors(directory)"
            )
        numbers = np.asarray(ids, dtype=np.int64)
        if numbers.ndim != 1:
            raise ConfigError("exact scores are of whole sequences and this store has a row a token")
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(train):
            odd = int(numbers.max()) if numbers.max() >= len(train) else int(numbers.min())
            raise DataError(
                f"the store has a row of training example {odd} and there are {len(train)}; give the training data "
                "that it was built from"
            )
        self.attributor, self.queries, self.train, self.ids = attributor, queries, train, numbers
        self.batch_size, self.tol = batch_size, tol
        self.certificates: dict[int, Any] = {}
        run = attributor._run
        self.together = run.solver is not None or tol is not None
        self.costs = self._costs()
        if run.fit_data is None and (self.together or attributor.options.get("certify") is not False):
            run.fit_data = attributor._prepare(train, "train")

    def _costs(self) -> tuple[float, float]:
        """Operations: forward, backward to the inputs and the contraction of a sequence; and a product with a query."""
        weights = sum(layer.d_out * layer.columns for layer in self.attributor.selection.layers)
        some = np.linspace(0, len(self.train) - 1, min(64, len(self.train))).astype(int)
        length = float(np.mean([_length(self.train[int(i)]) for i in some]))
        return 6.0 * weights * length, 2.0 * weights

    def __call__(self, queries: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Float ``[len(queries), len(rows)]``; certificates of these queries are kept."""
        if len(rows) == 0:
            return torch.zeros(len(queries), 0)
        asked = (
            self.queries if list(queries) == list(range(len(self.queries))) else ExampleSubset(self.queries, queries)
        )
        some = ExampleSubset(self.train, self.ids[np.asarray(rows, dtype=np.int64)])
        scores = self.attributor.score(asked, some, self.batch_size, tol=self.tol)
        if scores.certificate is not None:
            self.certificates.update(zip(queries, scores.certificate, strict=True))
        return scores.total()


def _length(example: Any) -> int:
    if not isinstance(example, Mapping) or "input_ids" not in example:
        raise DataError("a training example has no field 'input_ids'; tokenise the data first")
    return int(torch.as_tensor(example["input_ids"]).numel())
