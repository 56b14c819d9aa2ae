"""Progress events: the library reports stages, a sink (the command line's, a notebook's) shows them. Silent by
default.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator
from typing import Protocol

__all__ = ["NullSink", "Sink", "Stage", "current", "note", "stage", "use"]


class Stage:
    """One running stage. ``advance(n)`` counts ``n`` more units done; ``seconds`` is its wall time once it ended."""

    def __init__(self, name: str, total: float | None, unit: str, sink: Sink) -> None:
        self.name, self.total, self.unit, self._sink = name, total, unit, sink
        self.done = 0.0
        self.started = time.perf_counter()
        self.seconds = 0.0

    def advance(self, amount: float) -> None:
        """A stage came further."""
        self.done += amount
        self._sink.advance(self)


class Sink(Protocol):
    """Where stages are shown."""

    def start(self, stage: Stage) -> None:
        """A stage begins."""

    def advance(self, stage: Stage) -> None:
        """A stage came further."""

    def end(self, stage: Stage) -> None:
        """A stage ended."""

    def note(self, text: str) -> None:
        """One line to whoever watches."""


class NullSink:
    """Shows nothing."""

    def start(self, stage: Stage) -> None:
        """A stage begins."""

    def advance(self, stage: Stage) -> None:
        """A stage came further."""

    def end(self, stage: Stage) -> None:
        """A stage ended."""

    def note(self, text: str) -> None:
        """One line to whoever watches."""


_sink: contextvars.ContextVar[Sink] = contextvars.ContextVar("pyinf_progress_sink", default=NullSink())  # noqa: B039


def current() -> Sink:
    """The sink in force."""
    return _sink.get()


@contextlib.contextmanager
def use(sink: Sink) -> Iterator[Sink]:
    """Send the stages of this block to ``sink``."""
    token = _sink.set(sink)
    try:
        yield sink
    finally:
        _sink.reset(token)


@contextlib.contextmanager
def stage(name: str, total: float | None = None, unit: str = "sequences") -> Iterator[Stage]:
    """Report a stage of ``total`` units; the yielded stage takes ``advance(n)``."""
    sink = current()
    running = Stage(name, total, unit, sink)
    sink.start(running)
    try:
        yield running
    finally:
        running.seconds = time.perf_counter() - running.started
        sink.end(running)


def note(text: str) -> None:
    """Say one line to whoever watches."""
    current().note(text)
