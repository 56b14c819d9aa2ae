"""The shard that a writer is filling: files that only grow, and a journal of how far they are safe."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pyinf import artifacts
from pyinf.errors import ArtifactError, ResourceError
from pyinf.store import format as fmt
from pyinf.store.format import JOURNAL, StoreSpec

__all__ = ["Rows", "Tail", "full_disk", "read_journal"]

_JOURNAL_FORMAT = "pyinf.store.journal"
_BUFFER = 1 << 20


class Rows(NamedTuple):
    """Rows as bytes with what stands beside them; ``documents`` are encoded JSON lines (b"" for none)."""

    ids: np.ndarray  # int64 [B, 1 or 2]
    raw: np.ndarray  # uint8 [B, row_bytes]
    norms: np.ndarray | None  # float32 [B]
    documents: list[bytes] | None

    def cut(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``."""
        return Rows(
            self.ids[start:stop],
            self.raw[start:stop],
            None if self.norms is None else self.norms[start:stop],
            None if self.documents is None else self.documents[start:stop],
        )


def full_disk(error: OSError, path: Path, safe: int) -> Exception:
    """What an ``OSError`` while writing ``path`` becomes; ``safe`` rows are on disk."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
        reason = "the file would be too large" if error.errno == errno.EFBIG else "no space left on the disk"
        return ResourceError(
            f"{reason} while writing {path}; {safe} rows are safe: free some space and run the same again"
        )
    return ArtifactError(f"cannot write {path}: {error.strerror or error}; {safe} rows are safe")


def read_journal(directory: Path) -> dict[str, Any] | None:
    """``journal.json``: name, rows and files of the unfinished shard; None where there is none.

    Raises ``ArtifactError`` when it is damaged.
    """
    path = directory / JOURNAL
    if not path.exists():
        return None
    journal = artifacts.read_json(path, "journal")
    good = (
        isinstance(journal, dict)
        and journal.get("format") == _JOURNAL_FORMAT
        and journal.get("version") == fmt.VERSION
        and isinstance(journal.get("shard"), str)
        and type(journal.get("rows")) is int
        and isinstance(journal.get("files"), dict)
    )
    if not good:
        raise ArtifactError(f"journal {path} is damaged, or of another version of pyinf; delete the store")
    return journal


class Tail:
    """The files of one shard, open for appending; what :meth:`commit` has returned from survives a kill."""

    def __init__(self, directory: Path, spec: StoreSpec, name: str, journal: dict[str, Any] | None = None) -> None:
        """Start shard ``name``, or go on with the one that the journal describes: longer files are cut to it.

        Raises ``ArtifactError`` naming the file where one is shorter than the journal says, or differs.
        """
        self.directory, self.spec, self.name = directory, spec, name
        self.rows = self.committed = 0
        self.bytes = self._committed_bytes = 0
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        for suffix, file in fmt.shard_files(spec, name).items():
            path = directory / file
            digest, size = hashlib.sha256(), 0
            if journal is None:
                self._files[suffix] = open(path, "wb", buffering=_BUFFER)
            else:
                digest, size = _cut(path, journal["files"].get(file))
                self._files[suffix] = open(path, "ab", buffering=_BUFFER)
            self._digests[suffix], self._sizes[suffix] = digest, size
        if journal is not None:
            self.rows = self.committed = journal["rows"]
            self.bytes = self._committed_bytes = sum(self._sizes.values())
            for suffix, size in self._sizes.items():
                wanted = fmt.expected_bytes(spec, suffix, self.rows)
                if wanted is not None and size != wanted:
                    raise ArtifactError(f"journal of {directory} does not fit {name}.{suffix}; delete the store")
        elif spec.documents:
            self._write("lines", np.zeros(1, "<u8").tobytes())

    @property
    def uncommitted(self) -> int:
        """Bytes that a kill would lose."""
        return self.bytes - self._committed_bytes

    def _write(self, suffix: str, data: bytes | memoryview) -> None:
        self._files[suffix].write(data)
        self._digests[suffix].update(data)
        self._sizes[suffix] += len(data)
        self.bytes += len(data)

    def append(self, rows: Rows) -> None:
        """Append; not safe before :meth:`commit`."""
        self._write("rows", np.ascontiguousarray(rows.raw).tobytes())
        self._write("ids", np.ascontiguousarray(rows.ids, "<i8").tobytes())
        if self.spec.norms:
            self._write("norms", np.ascontiguousarray(rows.norms, "<f4").tobytes())
        if self.spec.documents:
            documents = rows.documents or [b""] * len(rows.ids)
            ends = self._sizes["documents"] + np.cumsum([len(d) for d in documents], dtype=np.uint64)
            self._write("documents", b"".join(documents))
            self._write("lines", ends.astype("<u8").tobytes())
        self.rows += len(rows.ids)

    def _sync(self) -> dict[str, dict[str, Any]]:
        infos = {}
        for suffix, handle in self._files.items():
            handle.flush()
            os.fsync(handle.fileno())
            infos[f"{self.name}.{suffix}"] = {
                "sha256": self._digests[suffix].hexdigest(),
                "bytes": self._sizes[suffix],
            }
        return infos

    def commit(self) -> None:
        """Sync the files, then say so in the journal."""
        if self.rows == self.committed:
            return
        journal = {
            "format": _JOURNAL_FORMAT,
            "version": fmt.VERSION,
            "shard": self.name,
            "rows": self.rows,
            "files": self._sync(),
        }
        artifacts.atomic_write_json(self.directory / JOURNAL, journal)
        self.committed, self._committed_bytes = self.rows, self.bytes

    def seal(self) -> dict[str, dict[str, Any]]:
        """Sync and close the files; size and SHA-256 of each, for the manifest."""
        infos = self._sync()
        self.close()
        return infos

    def close(self) -> None:
        """Close the files; what is not committed is cut when the store is opened again."""
        for handle in self._files.values():
            try:
                handle.close()
            except OSError:  # the buffer does not fit on the disk: it was not committed
                pass
        self._files = {}


def _cut(path: Path, info: Any) -> tuple[Any, int]:
    """Cut the torn end of a file off; the state of its hash, and its size."""
    if not isinstance(info, dict):
        raise ArtifactError(f"the journal in {path.parent} does not list {path.name}; delete the store")
    wanted = info["bytes"]
    digest = hashlib.sha256()
    try:
        with open(path, "r+b") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < wanted:
                raise ArtifactError(f"{path} is damaged: the journal says {wanted} bytes, found {size}")
            left = wanted
            while left:
                chunk = handle.read(min(left, 1 << 24))
                if not chunk:
                    raise ArtifactError(f"{path} is damaged: it ends {left} bytes early")
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest() != info["sha256"]:
                raise ArtifactError(f"{path} is damaged or was changed: its SHA-256 is not that of the journal")
            if size > wanted:
                handle.truncate(wanted)
                os.fsync(handle.fileno())
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    return digest, wanted
