"""One writer at a time: a lock that the operating system gives back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from pyinf.errors import ArtifactError, ResourceError
from pyinf.store.format import LOCK

__all__ = ["DirectoryLock"]


class DirectoryLock:
    """Holds ``directory/lock`` (flock) until :meth:`release`, or until the process is gone.

    Raises ``ArtifactError`` naming the holder where another writer has it.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import fcntl
        except ImportError as error:  # Windows
            raise ResourceError("stores are written on systems with flock only (Linux, macOS)") from error
        path = Path(directory) / LOCK
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._handle, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(self._handle)
            raise ArtifactError(
                f"{directory} is being written by {holder}; wait for it to end, or write to another directory"
            ) from error
        # Only a note for the message above: on a full disk the lock holds without it.
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back; the file stays, empty."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = -1
