"""Writing a store behind the pass: a bounded queue, one thread, and nothing lost or doubled by a kill."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError, NonFiniteError, PyinfError
from pyinf.store import format as fmt
from pyinf.store.format import JOURNAL, LOCK, Manifest, StoreSpec
from pyinf.store.idset import IdSet
from pyinf.store.locking import DirectoryLock
from pyinf.store.quantise import encode
from pyinf.store.sections import row_width
from pyinf.store.tail import Rows, Tail, full_disk, read_journal

if TYPE_CHECKING:
    from pyinf.store.reader import Store

__all__ = ["StoreWriter"]

SHARD_BYTES = 1 << 28  # rows of a shard, where shard_rows is not given
_COMMIT_BYTES = 1 << 26
_COMMIT_SECONDS = 5.0
_QUEUE_BYTES = 1 << 28


class _Batch:
    """What :meth:`StoreWriter.append` was given, checked; ``rows`` is float32, or uint8 where encoded already."""

    def __init__(self, ids: np.ndarray, rows: Tensor, norms: np.ndarray | None, documents: list[bytes] | None) -> None:
        self.ids, self.rows, self.norms, self.documents = ids, rows, norms, documents
        self.bytes = rows.numel() * rows.element_size() + sum(map(len, documents or ()))


class StoreWriter:
    """Appends rows to a store in a thread of its own; a context manager.

    directory: made where missing. With ``resume`` a store of the same ``spec`` is gone on with: :meth:`done_ids` says
    what is safe, what a kill left beyond that is cut off. ``tensors`` are the compressor's; on resume they must be
    equal to those on disk. ``shard_rows``: rows of a shard (default: 256 MiB of rows).
    Leaving the ``with`` block without an exception calls :meth:`finish`, with one :meth:`close`: what was appended
    until then is committed.

    Raises ``ArtifactError`` where another writer is at work, the directory holds another store or something else, or a
    file is damaged; ``ResourceError`` where the disk is full. Errors of the thread are raised by the next call.
    """

    def __init__(
        self,
        directory: str | Path,
        spec: StoreSpec,
        shard_rows: int | None = None,
        resume: bool = True,
        tensors: Mapping[str, Tensor] | None = None,
        commit_seconds: float = _COMMIT_SECONDS,
    ) -> None:
        if shard_rows is not None and shard_rows < 1:
            raise ConfigError(f"shard_rows must be at least 1; got {shard_rows}")
        self.directory, self.spec = Path(directory), spec
        self.shard_rows = shard_rows or max(1, SHARD_BYTES // spec.row_bytes)
        self.commit_seconds = commit_seconds
        self._width = row_width(spec.sections)
        self._lock: DirectoryLock | None = lock_directory(self.directory)
        self._tail: Tail | None = None
        try:
            self._manifest = self._open(resume, tensors)
        except BaseException:
            if self._tail is not None:
                self._tail.close()
            self._lock.release()
            raise
        self._queue: deque[_Batch] = deque()
        self._queued = 0  # bytes
        self._busy = self._stop = self._want_commit = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._last_commit = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="pyinf-store-writer", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------------------------- opening

    def _open(self, resume: bool, tensors: Mapping[str, Tensor] | None) -> Manifest:
        self._ids = IdSet()
        artifacts.remove_stale_temporaries(self.directory)
        if not (self.directory / artifacts.MANIFEST_NAME).exists():
            names = sorted(path.name for path in self.directory.iterdir() if not path.name.startswith("."))
            strange = [name for name in names if name != LOCK and not _own(name)]
            if strange:
                raise ArtifactError(f"{self.directory} holds no store, but {strange[0]!r}; choose another directory")
            for name in names:  # killed before the first manifest: nothing here counts
                if name != LOCK:
                    (self.directory / name).unlink()
            manifest = Manifest(self.spec)
            self._save_tensors(manifest, tensors)
            fmt.write(self.directory, manifest)
            return manifest
        manifest = fmt.read(self.directory)
        if not resume:
            raise ArtifactError(f"{self.directory} already holds a store; choose another directory, or resume it")
        lines = manifest.spec.differences(self.spec)
        if lines:
            raise ArtifactError(
                f"{self.directory} holds another store ({'; '.join(lines[:6])}); choose another directory or delete it"
            )
        fmt.check_sizes(self.directory, manifest)
        if tensors is not None:
            self._compare_tensors(manifest, tensors)
        self.spec = manifest.spec
        journal = read_journal(self.directory)
        if journal is not None and journal["shard"] in {shard.name for shard in manifest.shards}:
            journal = None  # killed between the manifest and the end of the journal
        self._remove_orphans(manifest, journal)
        for shard in manifest.shards:
            self._note(shard.name, f"{self.directory} holds an id twice; run: pyinf store compact")
        if journal is not None:
            self._tail = Tail(self.directory, self.spec, journal["shard"], journal)
            self._note(journal["shard"], f"{self.directory} holds an id twice; delete it")
            manifest.serial = max(manifest.serial, int(journal["shard"].rpartition("-")[2]) + 1)
        return manifest

    def _note(self, name: str, message: str) -> None:
        for ids in _id_blocks(self.directory / f"{name}.ids", self.spec.id_width):
            if self._ids.add(ids) is not None:
                raise ArtifactError(message)

    def _remove_orphans(self, manifest: Manifest, journal: dict[str, Any] | None) -> None:
        kept = {*manifest.files, artifacts.MANIFEST_NAME, LOCK}
        if journal is not None:
            kept |= {JOURNAL, *journal["files"]}
        for path in self.directory.iterdir():
            if path.name not in kept and _own(path.name) and path.is_file():
                path.unlink()

    def _save_tensors(self, manifest: Manifest, tensors: Mapping[str, Tensor] | None) -> str | None:
        """Write the compressor's tensors under a fresh name; the name of the file that they replace."""
        old = manifest.tensors
        if tensors is None:
            return None
        name = f"compressor-{manifest.serial:06d}.safetensors"
        manifest.serial += 1
        info = artifacts.save_tensors(self.directory / name, tensors)
        manifest.files.pop(old, None)
        manifest.files[name], manifest.tensors = info, name
        return old

    def _compare_tensors(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        found: dict[str, Tensor] = {}
        if manifest.tensors is not None:
            found = artifacts.load_tensors(self.directory / manifest.tensors, manifest.files[manifest.tensors])
        name = tensor_difference(found, tensors)
        if name is not None:
            raise ArtifactError(
                f"tensor {name!r} of the compressor is not the one that {self.directory} was built with; "
                f"restore the compressor from the store, or choose another directory"
            )

    # -------------------------------------------------------------------------------------- the caller's side

    def append(
        self,
        ids: Sequence[Any] | np.ndarray | Tensor,
        rows: Tensor,
        norms: Tensor | None = None,
        documents: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> None:
        """Give the thread ``rows [B, width]`` with their ids; waits while more than 256 MiB are queued.

        ids: B integers, or per token B pairs (sequence, position). norms: float ``[B]`` where the store keeps norms.
        documents: a JSON object a row, or None; where rows are tokens, it belongs to the first row of a sequence.
        The rows are copied: the caller may reuse its memory. Safe on disk after :meth:`flush` or a few seconds.
        Raises ``ConfigError`` for shapes that do not fit, or an id that the store has already (nothing is added then).
        """
        self._check()
        if rows.dim() != 2 or rows.shape[1] != self._width:
            raise ConfigError(f"rows must be [B, {self._width}]; got {tuple(rows.shape)}")
        keep = torch.empty(rows.shape, dtype=torch.float32).copy_(rows.detach())
        self._enqueue(self._batch(ids, keep, norms, self._encode_documents(documents, rows.shape[0])))

    def append_encoded(self, rows: Rows) -> None:
        """:meth:`append` for rows that are encoded already (a merge)."""
        self._check()
        if rows.raw.dtype != np.uint8 or rows.raw.ndim != 2 or rows.raw.shape[1] != self.spec.row_bytes:
            raise ConfigError(f"encoded rows must be uint8 [B, {self.spec.row_bytes}]; got {rows.raw.shape}")
        self._enqueue(self._batch(rows.ids, torch.from_numpy(np.array(rows.raw)), rows.norms, rows.documents))

    def _batch(self, ids: Any, rows: Tensor, norms: Any, documents: list[bytes] | None) -> _Batch:
        count, width = rows.shape[0], self.spec.id_width
        found = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.array(ids)
        if found.size == 0 and count == 0:
            found = np.empty((0, width), np.int64)
        if found.dtype.kind not in "iu" or found.size != count * width or found.shape[:1] != (count,):
            wanted = f"{count} integers" if width == 1 else f"{count} pairs (sequence, position)"
            raise ConfigError(f"ids must be {wanted}; got {found.dtype} {found.shape}")
        found = found.astype(np.int64).reshape(count, width)
        if self.spec.norms != (norms is not None):
            raise ConfigError(
                "give the norms of the rows: this store keeps them" if self.spec.norms else "this store keeps no norms"
            )
        if norms is not None:
            norms = np.array(norms.detach().cpu().float().numpy() if isinstance(norms, Tensor) else norms, np.float32)
            if norms.shape != (count,):
                raise ConfigError(f"norms must be [{count}]; got {norms.shape}")
            if not np.isfinite(norms).all():
                bad = int(np.flatnonzero(~np.isfinite(norms))[0])
                raise NonFiniteError(f"the norm of row {found[bad].tolist()} is NaN or infinite")
        if documents is not None and not self.spec.documents:
            raise ConfigError("this store keeps no documents")
        at = self._ids.add(found)
        if at is not None:
            raise ConfigError(f"row {found[at].tolist()} is in the store already, or stands twice in one batch")
        return _Batch(found, rows, norms, documents)

    def _encode_documents(self, documents: Sequence[Mapping[str, Any] | None] | None, count: int) -> list[bytes] | None:
        if documents is None:
            return None
        if len(documents) != count:
            raise ConfigError(f"{len(documents)} documents for {count} rows; give one a row, or None")
        return [b"" if d is None else _json_line(d) for d in documents]

    def _enqueue(self, batch: _Batch) -> None:
        if len(batch.ids) == 0:
            return
        with self._change:
            while self._error is None and self._queue and self._queued + batch.bytes > _QUEUE_BYTES:
                self._change.wait()
            self._raise()
            self._queue.append(batch)
            self._queued += batch.bytes
            self._change.notify_all()

    def _check(self) -> None:
        if self._lock is None:
            raise ConfigError("this writer is closed")
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Wait until everything appended is safe on disk."""
        self._check()
        with self._change:
            self._want_commit = True
            self._change.notify_all()
            while self._error is None and (self._queue or self._busy or self._want_commit):
                self._change.wait()
            self._raise()

    def seal(self) -> None:
        """:meth:`flush`, and close the shard, so that ``Store.open(directory, unfinished=True)`` reads every row."""
        self.flush()
        with self._change, self._broken_by_errors(), self._mapped():
            self._seal()

    def done_ids(self) -> np.ndarray:
        """Ids of the rows that are safe on disk: int64 ``[n]``, or ``[n, 2]`` per token."""
        self._check()
        width = self.spec.id_width
        with self._change:
            while self._busy:
                self._change.wait()
            blocks = [np.fromfile(self.directory / f"{shard.name}.ids", "<i8") for shard in self._manifest.shards]
            if self._tail is not None and self._tail.committed:
                blocks.append(
                    np.fromfile(self.directory / f"{self._tail.name}.ids", "<i8", self._tail.committed * width)
                )
        found = np.concatenate(blocks) if blocks else np.empty(0, np.int64)
        return found.reshape(-1, 2) if width == 2 else found

    @property
    def count(self) -> int:
        """Rows that are safe on disk."""
        with self._change:
            while self._busy:
                self._change.wait()
            return self._manifest.count + (self._tail.committed if self._tail is not None else 0)

    def start_at(self, serial: int) -> None:
        """Number the next shard ``serial`` or more, so that its name is new elsewhere as well (a compaction)."""
        with self._change:
            self._manifest.serial = max(self._manifest.serial, serial)

    @property
    def finished(self) -> bool:
        """Whether the store was finished when it was opened, and nothing was appended since."""
        return self._manifest.finished

    def finish(self, tensors: Mapping[str, Tensor] | None = None, settings: Mapping[str, Any] | None = None) -> Store:
        """Write what is left and the manifest, and open the store for reading.

        ``tensors`` and ``settings`` replace the compressor's (what it learned from the rows).
        """
        from pyinf.store.reader import Store

        self.flush()
        with self._change, self._broken_by_errors(), self._mapped():
            self._seal()
            if settings is not None:
                self.spec = self._manifest.spec = self.spec.with_settings(settings)
            old = self._save_tensors(self._manifest, tensors)
            self._manifest.finished = True
            fmt.write(self.directory, self._manifest)
            if old is not None:
                (self.directory / old).unlink(missing_ok=True)
        self.close()
        return Store.open(self.directory)

    def close(self) -> None:
        """Commit what was appended, end the thread and give the lock back; the store stays unfinished."""
        if self._lock is None:
            return
        try:
            if self._error is None:
                self.flush()
        finally:
            with self._change:
                self._stop = True
                self._change.notify_all()
            self._thread.join()
            if self._tail is not None:
                self._tail.close()
            self._lock.release()
            self._lock = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._lock is None:
            return
        if kind is None:
            try:
                self.finish()
            finally:
                self.close()
            return
        with contextlib.suppress(PyinfError):  # the exception of the block is the one to be seen
            self.close()

    # -------------------------------------------------------------------------------------- the thread's side

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._queue or self._stop or self._want_commit):
                    left = None
                    if self._tail is not None and self._tail.uncommitted:
                        left = max(0.0, self._last_commit + self.commit_seconds - time.monotonic())
                        if left == 0.0:
                            break
                    self._change.wait(left)
                if self._stop and not self._queue:
                    return
                batch = self._queue.popleft() if self._queue else None
                if batch is not None:
                    self._queued -= batch.bytes
                commit = self._want_commit and not self._queue
                self._busy = True
                self._change.notify_all()
            error: BaseException | None = None
            try:
                with self._mapped():
                    if batch is not None:
                        self._write(batch)
                    if commit or self._due():
                        self._commit()
            except BaseException as caught:
                error = caught
            with self._change:
                self._busy = False
                if commit:
                    self._want_commit = False
                self._error = error
                self._change.notify_all()
            if error is not None:
                return

    def _due(self) -> bool:
        tail = self._tail
        if tail is None or not tail.uncommitted:
            return False
        return tail.uncommitted >= _COMMIT_BYTES or time.monotonic() - self._last_commit >= self.commit_seconds

    def _commit(self) -> None:
        if self._tail is not None:
            self._tail.commit()
        self._last_commit = time.monotonic()

    def _write(self, batch: _Batch) -> None:
        if batch.rows.dtype == torch.uint8:
            raw = batch.rows.numpy()
        else:
            try:
                raw = encode(batch.rows, self.spec.sections, self.spec.format)
            except NonFiniteError as error:
                bad = batch.ids[(~torch.isfinite(batch.rows)).any(1).numpy()][:1].tolist()
                raise NonFiniteError(f"row of example {bad[0] if bad else batch.ids[0].tolist()}: {error}") from error
        rows = Rows(batch.ids, raw, batch.norms, batch.documents)
        at = 0
        while at < len(rows.ids):
            if self._manifest.finished:  # a finished store grows: it is unfinished until finish() is called again
                self._manifest.finished = False
                fmt.write(self.directory, self._manifest)
            if self._tail is None:
                self._tail = Tail(self.directory, self.spec, fmt.shard_name(self._manifest.serial))
                self._manifest.serial += 1
            stop = min(len(rows.ids), at + max(0, self.shard_rows - self._tail.rows))
            self._tail.append(rows.cut(at, stop))
            at = stop
            if self._tail.rows >= self.shard_rows:
                self._seal()

    def _seal(self) -> None:
        tail = self._tail
        if tail is None or tail.rows == 0:
            return
        shards, files = list(self._manifest.shards), dict(self._manifest.files)
        self._manifest.add(tail.name, tail.rows, tail.seal())
        try:
            fmt.write(self.directory, self._manifest)
        except BaseException:
            self._manifest.shards, self._manifest.files = shards, files
            raise
        self._tail = None
        (self.directory / JOURNAL).unlink(missing_ok=True)
        self._last_commit = time.monotonic()

    @contextlib.contextmanager
    def _broken_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._error = error
            raise

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        """Errors of the operating system as errors of pyinf, with the number of rows that are safe."""
        try:
            yield
        except PyinfError:
            raise
        except OSError as error:
            tail = self._tail
            safe = self._manifest.count + (tail.committed if tail is not None else 0)
            raise full_disk(error, self.directory / (tail.name if tail is not None else ""), safe) from error


def lock_directory(directory: Path) -> DirectoryLock:
    """Make the directory where it is missing, and take its lock."""
    if directory.exists() and not directory.is_dir():
        raise ArtifactError(f"{directory} is a file, expected a directory; choose another one")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return DirectoryLock(directory)
    except PyinfError:
        raise
    except OSError as error:
        raise full_disk(error, directory, 0) from error


def _own(name: str) -> bool:
    """Whether a file is one that a writer makes, so that one which no manifest lists may be deleted."""
    return name == JOURNAL or name.startswith(("shard-", "compressor-"))


def _id_blocks(path: Path, width: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as handle:
        while chunk := handle.read(8 * width << 18):
            yield np.frombuffer(chunk, "<i8").reshape(-1, width)


def _json_line(document: Mapping[str, Any]) -> bytes:
    options: dict[str, Any] = {"separators": (",", ":"), "allow_nan": False}
    try:
        try:
            return json.dumps(dict(document), ensure_ascii=False, **options).encode() + b"\n"
        except UnicodeEncodeError:  # a lone surrogate: the escaped form carries it
            return json.dumps(dict(document), **options).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"a document must be a JSON object: {error}") from error


def tensor_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that the two do not have alike, to the bit; None where they are equal."""
    for name in sorted({*found, *wanted}):
        a, b = found.get(name), wanted.get(name)
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            return name
        b = b.detach().cpu()
        if not torch.equal(a, b) and not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            return name
    return None
