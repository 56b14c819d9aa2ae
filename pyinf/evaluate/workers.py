"""Retrainings in several processes. A worker ends by itself when its parent is gone, however that ended."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyinf.errors import PyinfError, ResourceError
from pyinf.evaluate.protocol import Protocol
from pyinf.evaluate.subsets import Retraining

if TYPE_CHECKING:
    from pyinf.evaluate.bank import Bank

__all__ = ["run_in_processes"]


def run_in_processes(bank: Bank, plan: Sequence[Retraining], workers: int, done: Callable[[], None]) -> None:
    """Train every retraining of ``plan`` in one of ``workers`` processes; ``done()`` is called after each.

    Raises:
        The first error of a training, once no worker runs any more.
        ResourceError: a worker died (killed, or out of memory).
    """
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch threads may hang
    queue = list(reversed(plan))
    pool: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, str(bank.directory), bank.protocol, bank.threads)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pool[ours] = process
        idle, running = set(pool), 0
        while queue or running:
            for connection in list(idle):
                if queue:
                    connection.send(queue.pop())
                    idle.discard(connection)
                    running += 1
            for connection in wait([c for c in pool if c not in idle]):
                assert isinstance(connection, Connection)
                try:
                    error = connection.recv()
                except (EOFError, ConnectionError):
                    process = pool[connection]
                    process.join(5)
                    raise ResourceError(
                        f"a worker process ended with code {process.exitcode} (killed, or out of memory); build again "
                        "to go on, with fewer workers if memory is short"
                    ) from None
                if error is not None:
                    raise error
                running -= 1
                idle.add(connection)
                done()
    finally:
        for connection, process in pool.items():
            process.terminate()
            connection.close()
        for process in pool.values():
            process.join(5)


def _serve(connection: Connection, directory: str, protocol: Protocol, threads: int) -> None:
    """A worker: opens the bank and trains what it is sent, until the parent closes the pipe or dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    try:
        from pyinf.evaluate.bank import Bank

        bank = Bank(Path(directory), protocol, threads)
    except BaseException as error:
        connection.recv()
        connection.send(_sendable(error))
        return
    while True:
        try:
            retraining = connection.recv()
        except (EOFError, OSError):
            return
        try:
            bank.train(retraining)
        except BaseException as error:
            connection.send(_sendable(error))
            return
        connection.send(None)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _sendable(error: BaseException) -> BaseException:
    """The error itself if it survives the way to the parent, else its text."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return PyinfError(f"{type(error).__name__}: {error}")
