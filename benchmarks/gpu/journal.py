"""Work that may crash or hang: one process a shard, a journal line before and after every item, a supervisor.

An item that ends its process (a lost CUDA context, a signal) or that takes too long is noted as such and left out, and
the process is started again for the items after it. Finished items are in the journal, so a later run goes on there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Journal", "supervise", "work"]

LOST = 75  # exit status of a worker whose CUDA context is gone
LATE = 76  # of one that had items left when its time was over
RESTARTS = 12
UNFINISHED = ("started", "cut")  # ended from outside: run again next time
Item = tuple[str, Callable[[], Any]]


class Journal:
    """Lines of JSON: ``{"id", "state": started | done | failed | crashed | hung | cut, ...}``, appended and flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **line: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed process may be cut
                found.append(json.loads(text))
        return found

    def states(self) -> dict[str, dict[str, Any]]:
        """The last line of every item."""
        return {line["id"]: line for line in self.lines()}

    def open_item(self) -> dict[str, Any] | None:
        """The item that was started and has not ended."""
        lines = self.lines()
        return lines[-1] if lines and lines[-1]["state"] == "started" else None


def work(items: Iterable[Item], journal: Journal, deadline: float, healthy: Callable[[], None]) -> int:
    """Run the items that the journal does not know, until ``deadline`` (``time.time``); the exit status."""
    known = {name for name, line in journal.states().items() if line["state"] not in UNFINISHED}
    for name, run in items:
        if name in known:
            continue
        if time.time() > deadline:
            return LATE
        journal.add(id=name, state="started", time=time.time())
        begun = time.perf_counter()
        try:
            row = run()
        except Exception as error:
            text = " ".join(str(error).split())[:600]
            journal.add(
                id=name,
                state="failed",
                reason=f"{type(error).__name__}: {text}",
                seconds=time.perf_counter() - begun,
            )
            print(f"{name}: {type(error).__name__}: {text}", flush=True)
            try:
                healthy()
            except Exception:
                return LOST
        else:
            journal.add(id=name, state="done", row=row, seconds=time.perf_counter() - begun)
    return 0


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def supervise(
    command: Sequence[str],
    journal: Journal,
    log: Path,
    deadline: float,
    limit: float,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a worker to its end, again where an item ended it; "" when it finished, else why not.

    ``limit``: seconds for one item (the start of the process included in the first).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(RESTARTS):
        if time.time() >= deadline:
            return "no time left"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable if part == "{python}" else part for part in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        seen, since = -1, time.time()
        while process.poll() is None:
            time.sleep(0.1)
            size = journal.path.stat().st_size if journal.path.is_file() else 0
            if size != seen:
                seen, since = size, time.time()
            if time.time() >= deadline:
                _kill(process)
                item = journal.open_item()
                if item is not None:
                    journal.add(id=item["id"], state="cut", reason="the time of this part ended while it ran")
                return "its time ended"
            if time.time() - since > limit:
                _kill(process)
                break
        item = journal.open_item()
        if item is None:
            if process.returncode == 0:
                return ""
            if process.returncode == LOST:
                continue
            if process.returncode == LATE:
                return "its time ended before its items did"
            return f"the process ended with status {process.returncode} outside of any item; see {log.name}"
        late = time.time() - since > limit
        reason = f"no answer in {limit:.0f} s" if late else f"the process ended with status {process.returncode}"
        journal.add(id=item["id"], state="hung" if late else "crashed", reason=reason)
    return f"given up after {RESTARTS} restarts"
