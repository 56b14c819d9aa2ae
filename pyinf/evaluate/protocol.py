"""How to train and what to measure: the part of a retraining bank that knows the model."""

from __future__ import annotations

import abc
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyinf.errors import ConfigError, DataError

__all__ = ["FunctionProtocol", "Protocol", "Trained"]


@dataclass
class Trained:
    """What a training gave: the model, and its training loss at the end (per token, or as the protocol defines it)."""

    model: Any
    loss: float


class Protocol(abc.ABC):
    """A training to repeat on many subsets, and a measurement of every query after it.

    Same counts and same seed must give the same model; what differs between two runs of one subset is reported as
    noise. Instances travel to worker processes, so they hold settings only, until :meth:`prepare` ran there.
    """

    name: str
    train_size: int
    query_size: int

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that the outcome depends on, as JSON: two banks with equal descriptions are the same bank."""

    def prepare(self, directory: Path) -> None:  # noqa: B027
        """Make, or read back, what all trainings share (data, a base model) in ``directory``; once in every process."""

    @abc.abstractmethod
    def train(self, counts: np.ndarray, seed: int) -> Trained:
        """Train with example i standing ``counts[i]`` times in the training set."""

    @abc.abstractmethod
    def measure(self, model: Any) -> Mapping[str, np.ndarray]:
        """``{"loss": [Q], …}`` for every query; ``loss`` is what LDS and loss differences read (lower is better).

        ``margin``, where there is one, is the log-odds of the right answer (brittleness).
        """

    def save_model(self, model: Any, directory: Path) -> None:  # noqa: B027
        """Keep the fully trained model, for the attribution; a protocol that cannot leaves it to its user."""


def checked_measurement(found: Any, protocol: Protocol) -> dict[str, np.ndarray]:
    """What ``measure`` returned, as finite float64 arrays ``[Q]``; an array alone is the loss.

    Raises:
        DataError: no loss, a wrong length, NaN; names the measurement.
    """
    values = dict(found) if isinstance(found, Mapping) else {"loss": found}
    if "loss" not in values:
        raise DataError(f"protocol '{protocol.name}' measured {', '.join(values) or 'nothing'}; it must return 'loss'")
    checked = {}
    for name, value in values.items():
        if hasattr(value, "detach"):
            value = value.detach().cpu().double().numpy()
        array = np.asarray(value, dtype=np.float64)
        if array.shape != (protocol.query_size,):
            raise DataError(
                f"measurement '{name}' of protocol '{protocol.name}' has shape {array.shape}; one value a query is "
                f"needed: {(protocol.query_size,)}"
            )
        if not np.isfinite(array).all():
            query = int(np.flatnonzero(~np.isfinite(array))[0])
            raise DataError(
                f"measurement '{name}' of query {query} is {array[query]} after training; the training diverged: lower "
                "its learning rate"
            )
        checked[name] = array
    return checked


@dataclass
class FunctionProtocol(Protocol):
    """A protocol from two functions of yours.

    Args:
        name: what the bank calls it.
        train_function: ``(counts [N], seed) -> model``, or ``-> (model, training loss)``.
        measure_function: ``model -> [Q]`` (losses) or ``{"loss": [Q], …}``.
        train_size, query_size: N and Q.
        settings: whatever the outcome depends on, as JSON: learning rate, data version, …

    For more than one worker process the functions must be importable (defined at the top level of a module).
    """

    name: str
    train_function: Callable[[np.ndarray, int], Any]
    measure_function: Callable[[Any], Any]
    train_size: int
    query_size: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Name, sizes and settings."""
        return {"name": self.name, "train": self.train_size, "queries": self.query_size, "settings": self.settings}

    def train(self, counts: np.ndarray, seed: int) -> Trained:
        """Calls the train function."""
        found = self.train_function(counts, seed)
        if isinstance(found, tuple) and len(found) == 2:
            return Trained(found[0], float(found[1]))
        return Trained(found, float("nan"))

    def measure(self, model: Any) -> Mapping[str, np.ndarray]:
        """Calls the measure function."""
        found = self.measure_function(model)
        return found if isinstance(found, Mapping) else {"loss": found}


def check_sendable(protocol: Protocol) -> None:
    """Raises ConfigError when ``protocol`` cannot be handed to another process."""
    try:
        pickle.dumps(protocol)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"protocol '{protocol.name}' cannot be sent to worker processes ({error}); define its functions at the top "
            "level of a module, or use workers=1"
        ) from None
