"""One model, one store, one worker: searches wait in a bounded queue and are answered in batches.

The model runs in one thread, so that memory is that of one batch however many clients there are. What waits at the same
time and wants the same number of documents shares a pass.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyinf.errors import NonFiniteError

__all__ = ["Answer", "Busy", "Engine", "Finished", "Hit", "Query", "Refused", "Searcher", "Stopped"]

log = logging.getLogger("pyinf.serve")


@dataclass(frozen=True)
class Query:
    """Token ids; ``labels`` −100 where a position does not count, None: every one counts."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | None = None

    @property
    def counted(self) -> int:
        """Labels that the loss counts: nothing predicts the first position."""
        if self.labels is None:
            return len(self.input_ids) - 1
        return sum(label != -100 for label in self.labels[1:])


@dataclass(frozen=True)
class Hit:
    """One document: the example's number in the training set (with ``position`` where rows are tokens), its score, the
    score of the first stage, and what the store keeps beside it.
    """

    id: int
    score: float
    first_stage: float
    document: Mapping[str, Any] = field(default_factory=dict)
    position: int | None = None


@dataclass(frozen=True)
class Answer:
    """The best documents of one query, best first.

    Attributes:
        exact: whether scores were computed again from the gradients, or are those of the store's compressed rows.
        recall: the share of the exact top k that the first stage finds, with its interval, as
            :class:`pyinf.store.recall.RecallEstimate` has it, and ``queries``, over how many it is the mean; None: not
            measured.
        prefilter: the same of a prefilter, None without one.
        certificate: as in :class:`pyinf.Scores`, or None.
        cost: what the search did.
    """

    hits: Sequence[Hit]
    exact: bool = False
    recall: Mapping[str, Any] | None = None
    prefilter: Mapping[str, Any] | None = None
    certificate: Any = None
    cost: Mapping[str, Any] = field(default_factory=dict)


class Searcher(Protocol):
    """What answers queries.

    Attributes:
        count: documents that can be found.
        vocabulary, positions: limits of a query's ids and length, None where there are none.
        reads_text: whether :meth:`encode` can turn text into tokens.
    """

    count: int
    vocabulary: int | None
    positions: int | None
    reads_text: bool

    def encode(self, record: Mapping[str, str]) -> Query:
        """Tokens of ``{"text"}`` or ``{"prompt", "response"}``, as the training data were tokenised.

        Called from another thread than :meth:`search`, but never twice at a time. Raises ``DataError``.
        """

    def search(self, queries: Sequence[Query], k: int) -> list[Answer]:
        """One answer a query. Called from one thread only. Raises :class:`Refused` for what cannot be answered."""

    def describe(self) -> dict[str, Any]:
        """What a client may know, in JSON: no path of this machine."""


class Busy(Exception):
    """The queue is full; ``retry_after`` seconds from now it will probably not be."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Refused(Exception):
    """A query without an answer; ``code`` and message are for the client and hold nothing of this machine."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """The service is stopping, or its worker has died."""


@dataclass(frozen=True)
class Finished:
    """An answer, the seconds it waited and took, and the queries that shared its search."""

    answer: Answer
    waited: float
    seconds: float
    batch: int


@dataclass
class _Job:
    query: Query
    k: int
    future: Future[Finished]
    since: float


class Engine:
    """Runs a searcher in a thread of its own. Use as a context manager, or call :meth:`start` and :meth:`close`."""

    def __init__(self, searcher: Searcher, queue: int = 64, batch: int = 16) -> None:
        self.searcher, self.queue, self.batch = searcher, queue, batch
        self._waiting: deque[_Job] = deque()
        self._change = threading.Condition()
        self._stopping = False
        self._running = 0
        self._recent: deque[float] = deque(maxlen=32)  # seconds of the last searches
        self._thread = threading.Thread(target=self._work, name="pyinf-serve", daemon=True)
        self.served = self.failed = self.searches = 0

    def start(self) -> Engine:
        """Start the worker."""
        self._thread.start()
        return self

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def healthy(self) -> bool:
        """Whether it takes queries."""
        return self._thread.is_alive() and not self._stopping

    def state(self) -> dict[str, int]:
        """Counts of now and so far."""
        with self._change:
            return {
                "waiting": len(self._waiting),
                "running": self._running,
                "served": self.served,
                "failed": self.failed,
                "searches": self.searches,
            }

    def submit(self, query: Query, k: int) -> Future[Finished]:
        """Put a query into the queue; cancelling its future takes it out again, unless it runs already.

        Raises:
            Busy: the queue is full.
            Stopped: nothing is taken any more.
        """
        with self._change:
            if not self.healthy:
                raise Stopped("the service is stopping")
            if len(self._waiting) >= self.queue:
                # Those who gave up make room; a queue is short, and this happens only where it is full.
                self._waiting = deque(job for job in self._waiting if not job.future.cancelled())
            if len(self._waiting) >= self.queue:
                raise Busy(self._retry_after())
            job = _Job(query, k, Future(), time.monotonic())
            self._waiting.append(job)
            self._change.notify()
            return job.future

    def _retry_after(self) -> int:
        """Seconds until what waits is done, from the last searches; 1 to 60."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 1.0
        return min(60, max(1, math.ceil(mean * (1 + len(self._waiting) / self.batch))))

    def close(self, grace: float = 20.0) -> bool:
        """Take nothing more, finish what waits, and stop; after ``grace`` seconds what still waits fails.

        Returns whether everything was finished.
        """
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join(grace)
        with self._change:
            left = list(self._waiting)
            self._waiting.clear()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Stopped("the service has stopped"))
        return not left and not self._thread.is_alive()

    # -- the worker's own ----------------------------------------------------------------------------------------------

    def _take(self) -> list[_Job]:
        """The next queries that fit together; empty: stop."""
        with self._change:
            while True:
                while not self._waiting and not self._stopping:
                    self._change.wait()
                taken: list[_Job] = []
                rest: deque[_Job] = deque()
                while self._waiting:
                    job = self._waiting.popleft()
                    if taken and (len(taken) >= self.batch or job.k != taken[0].k):
                        rest.append(job)
                    elif job.future.set_running_or_notify_cancel():
                        taken.append(job)
                self._waiting = rest
                self._running = len(taken)
                if taken or self._stopping:
                    return taken

    def _work(self) -> None:
        jobs: list[_Job] = []
        try:
            while jobs := self._take():
                self._answer(jobs)
                with self._change:
                    self._running = 0
        finally:
            with self._change:
                self._stopping = True
                left = [job for job in jobs if not job.future.done()]  # the worker is dying: leave nobody waiting
                left += [job for job in self._waiting if job.future.set_running_or_notify_cancel()]
                self._waiting.clear()
            for job in left:
                job.future.set_exception(Stopped("the service has stopped"))

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer together; where that fails, each alone, so that one bad query spoils no other."""
        started = time.monotonic()
        try:
            answers = self._search(jobs)
        except Exception as error:
            if len(jobs) > 1:
                log.warning("a search of %d queries failed (%s); each is tried alone", len(jobs), type(error).__name__)
                for job in jobs:
                    self._answer([job])
                return
            self.failed += 1
            jobs[0].future.set_exception(error)
            return
        seconds = time.monotonic() - started
        self._recent.append(seconds)
        self.searches += 1
        self.served += len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.future.set_result(Finished(answer, started - job.since, seconds, len(jobs)))

    def _search(self, jobs: list[_Job]) -> list[Answer]:
        answers = self.searcher.search([job.query for job in jobs], jobs[0].k)
        if len(answers) != len(jobs):
            raise RuntimeError(f"{len(answers)} answers to {len(jobs)} queries")
        for answer in answers:
            if not all(math.isfinite(hit.score) and math.isfinite(hit.first_stage) for hit in answer.hits):
                raise NonFiniteError("a score is not finite")
        return answers
