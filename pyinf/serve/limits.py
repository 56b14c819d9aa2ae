"""What one request may cost, and how many there may be at a time."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pyinf.errors import ConfigError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; whatever exceeds one is refused with a code of its own.

    Attributes:
        body_bytes: of a request's body, whether it says its length beforehand or comes in chunks (413).
        tokens: of a query (422); the model's number of positions bounds it as well.
        k: documents in an answer (422).
        document_characters: of a document's text in an answer; the rest is cut off, and the answer says so.
        concurrency: requests at a time, from their first byte on (503).
        queue: searches that wait (503).
        batch: queries that one search takes at most; queries that wait at the same time share it.
        seconds: for an answer, waiting included (504).
        body_seconds: for the body to arrive (408).
        head_seconds: for a request's first line and headers to arrive; then the connection is closed.
        grace_seconds: for running requests to finish when the service is told to stop.
        connections: open connections (503).

    Raises:
        ConfigError: one of them is not positive.
    """

    body_bytes: int = 1 << 18
    tokens: int = 2048
    k: int = 100
    document_characters: int = 20_000
    concurrency: int = 128
    queue: int = 64
    batch: int = 16
    seconds: float = 60.0
    body_seconds: float = 10.0
    head_seconds: float = 10.0
    grace_seconds: float = 20.0
    connections: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 or value == float("inf"):
                raise ConfigError(f"limit {field.name} is {value}; it must be positive")
