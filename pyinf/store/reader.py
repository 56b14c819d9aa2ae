"""Reading a store: memory maps, opened read-only by as many readers as there are."""

from __future__ import annotations

import contextlib
import json
import mmap
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError
from pyinf.store import format as fmt
from pyinf.store.format import Manifest, StoreSpec
from pyinf.store.idset import duplicates
from pyinf.store.quantise import decode
from pyinf.store.sections import Section, row_width
from pyinf.store.tail import Rows

__all__ = ["Store"]

_MAPS = 128  # files mapped at a time: every one holds a file descriptor
_BLOCK_BYTES = 1 << 26  # float32 values of a block of rows, where block_rows is not given
_CHUNK = 1 << 24


class Store:
    """A finished store; make one with :meth:`open`. Reading takes no lock, and threads may share one."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._firsts = [shard.first for shard in manifest.shards]
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._guard = threading.Lock()

    @classmethod
    def open(cls, directory: str | Path, unfinished: bool = False, verify: bool = False) -> Store:
        """Open a store; sizes of all files are checked, their checksums with ``verify`` (one read of everything).

        ``unfinished``: read the finished shards of a store that is still being built, or whose build was killed.
        Raises ``ArtifactError`` naming the file that is missing, damaged, of a later version or no store at all.
        """
        directory = Path(directory)
        for attempt in range(3):
            manifest = fmt.read(directory)
            try:
                fmt.check_sizes(directory, manifest)
                break
            except ArtifactError:
                # A compaction may have replaced the shards since the manifest was read: then there is another one.
                if attempt == 2 or fmt.read(directory) == manifest:
                    raise
        if not manifest.finished and not unfinished:
            raise ArtifactError(
                f"the store {directory} is not finished ({manifest.count} rows so far); run the same build again, "
                f"which goes on there"
            )
        store = cls(directory, manifest)
        if verify:
            store.verify()
        return store

    # -------------------------------------------------------------------------------------- what it is

    @property
    def spec(self) -> StoreSpec:
        """What the rows are."""
        return self.manifest.spec

    @property
    def sections(self) -> Sequence[Section]:
        """The columns of a row."""
        return self.spec.sections

    @property
    def count(self) -> int:
        """Rows."""
        return self.manifest.count

    def __len__(self) -> int:
        return self.count

    @property
    def width(self) -> int:
        """Float columns of a row."""
        return row_width(self.sections)

    @property
    def normalise(self) -> str:
        """How its scores are normalised, for :func:`pyinf.store.scan.scan`: norms are kept where they divide scores."""
        return "norm" if self.spec.norms else "none"

    @property
    def nbytes(self) -> int:
        """Bytes of all files on disk but the manifest."""
        return sum(info["bytes"] for info in self.manifest.files.values())

    def tensors(self) -> dict[str, Tensor]:
        """The compressor's tensors, checked against their checksum."""
        name = self.manifest.tensors
        if name is None:
            return {}
        return artifacts.load_tensors(self.directory / name, self.manifest.files[name])

    # -------------------------------------------------------------------------------------- files

    def _map(self, shard: int, suffix: str) -> np.ndarray:
        name = f"{self.manifest.shards[shard].name}.{suffix}"
        with self._guard:
            found = self._maps.get(name)
            if found is not None:
                self._maps.move_to_end(name)
                return found
            path = self.directory / name
            try:
                found = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
            except (OSError, ValueError) as error:
                raise ArtifactError(f"cannot map {path}: {error}; was the store changed? open it again") from error
            if found.nbytes != self.manifest.files[name]["bytes"]:
                raise ArtifactError(f"{path} has {found.nbytes} bytes, expected {self.manifest.files[name]['bytes']}")
            self._maps[name] = found
            if len(self._maps) > _MAPS:
                self._maps.popitem(last=False)
            return found

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last row in the shard) of rows ``start`` to ``stop``."""
        if not 0 <= start <= stop <= self.count:
            raise ConfigError(f"rows {start} to {stop} are not in a store of {self.count} rows")
        while start < stop:
            index = bisect_right(self._firsts, start) - 1
            shard = self.manifest.shards[index]
            end = min(stop, shard.first + shard.rows)
            yield index, start - shard.first, end - shard.first
            start = end

    def _flat(self, suffix: str, dtype: str, width: int, start: int, stop: int) -> np.ndarray:
        parts = [
            np.asarray(self._map(index, suffix)).view(dtype).reshape(-1, width)[a:b]
            for index, a, b in self._pieces(start, stop)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, width), dtype)

    # -------------------------------------------------------------------------------------- rows

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows as they are stored: uint8 ``[stop − start, row_bytes]``; a view of the map within one shard."""
        return self._flat("rows", "u1", self.spec.row_bytes, start, stop)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``: float32 ``[stop − start, width]``, in memory of their own.

        The pages that were read are given back: the memory of a walk does not grow with the store.
        """
        out = decode(self.raw(start, stop), self.sections, self.spec.format)
        for index, a, b in self._pieces(start, stop):
            self._give_back(index, a, b)
        return out

    def take(self, rows: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Rows by number, in the given order: float32 ``[n, width]``. ``ConfigError`` for one that is not there."""
        index = np.asarray(rows, np.int64).reshape(-1)
        raw = np.empty((len(index), self.spec.row_bytes), np.uint8)
        for at in np.argsort(index, kind="stable"):  # in the order of the disk
            row = int(index[at])
            raw[at] = self.raw(row, row + 1)[0]
        return decode(raw, self.sections, self.spec.format)

    def blocks(self, block_rows: int | None = None) -> Iterator[tuple[int, int, np.ndarray]]:
        """All rows in order as ``(start, stop, raw)``; a block never crosses a shard, so that ``raw`` is a view.

        Its pages are given back after each block: the memory of a whole walk does not grow with the store.
        """
        step = block_rows or default_block_rows(self.width)
        if step < 1:
            raise ConfigError(f"block_rows must be at least 1; got {block_rows}")
        for index, shard in enumerate(self.manifest.shards):
            rows = np.asarray(self._map(index, "rows")).reshape(shard.rows, self.spec.row_bytes)
            for a in range(0, shard.rows, step):
                b = min(shard.rows, a + step)
                yield shard.first + a, shard.first + b, rows[a:b]
                self._give_back(index, a, b)

    def _give_back(self, index: int, start: int, stop: int) -> None:
        """Tell the system that these rows of a shard are not needed for now; it reads them again if they are."""
        array = self._map(index, "rows")
        map_ = getattr(array, "_mmap", None)
        if map_ is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        page, size = mmap.PAGESIZE, self.spec.row_bytes
        first = start * size // page * page
        last = array.nbytes if stop * size >= array.nbytes else stop * size // page * page
        if last > first:
            with contextlib.suppress(OSError, ValueError):
                map_.madvise(mmap.MADV_DONTNEED, first, last - first)

    def read_blocks(self, block_rows: int) -> Iterator[Rows]:
        """All rows in order with everything beside them, as a merge wants them."""
        for start, stop, raw in self.blocks(block_rows):
            yield Rows(
                self.ids_of(start, stop).reshape(stop - start, -1),
                raw,
                self.norms_of(start, stop) if self.spec.norms else None,
                self._lines(start, stop) if self.spec.documents else None,
            )

    # -------------------------------------------------------------------------------------- beside the rows

    def ids_of(self, start: int, stop: int) -> np.ndarray:
        """Ids of some rows: int64 ``[n]``, or ``[n, 2]`` (sequence, position) per token."""
        width = self.spec.id_width
        found = self._flat("ids", "<i8", width, start, stop)
        return found if width == 2 else found[:, 0]

    def norms_of(self, start: int, stop: int) -> np.ndarray:
        """Norms of some rows: float32 ``[n]``. Raises ``ConfigError`` where the store keeps none."""
        if not self.spec.norms:
            raise ConfigError(f"the store {self.directory} keeps no norms; build it with norms to normalise by them")
        return self._flat("norms", "<f4", 1, start, stop)[:, 0]

    @cached_property
    def ids(self) -> np.ndarray:
        """All ids, in memory: 8 bytes a row (16 per token)."""
        return np.array(self.ids_of(0, self.count))

    @cached_property
    def norms(self) -> np.ndarray | None:
        """All norms, in memory: float32 ``[N]``, or None."""
        return np.array(self.norms_of(0, self.count)) if self.spec.norms else None

    def _line(self, row: int) -> bytes:
        ((index, at, _),) = self._pieces(row, row + 1)
        lines = np.asarray(self._map(index, "lines")).view("<u8")
        start, stop = int(lines[at]), int(lines[at + 1])
        documents = self._map(index, "documents")
        if not start <= stop <= documents.nbytes:
            raise ArtifactError(
                f"{self.directory / self.manifest.shards[index].name}.lines is damaged at row {at}; run: pyinf store "
                f"verify"
            )
        return documents[start:stop].tobytes()

    def _lines(self, start: int, stop: int) -> list[bytes]:
        """Documents of rows of one shard, as they are stored."""
        ((index, a, b),) = self._pieces(start, stop)
        marks = np.asarray(self._map(index, "lines")).view("<u8")[a : b + 1].tolist()
        if any(x > y for x, y in pairwise(marks)):
            raise ArtifactError(f"{self.directory / self.manifest.shards[index].name}.lines is damaged")
        text = self._map(index, "documents")[marks[0] : marks[-1]].tobytes()
        return [text[x - marks[0] : y - marks[0]] for x, y in pairwise(marks)]

    def document(self, row: int) -> dict[str, Any]:
        """The document beside a row, ``{}`` where there is none; per token, that of the first row of its sequence.

        Raises ``ArtifactError`` naming the file where it is damaged, ``ConfigError`` for a row that is not there.
        """
        if not 0 <= row < self.count:
            raise ConfigError(f"row {row} is not in a store of {self.count} rows")
        if not self.spec.documents:
            return {}
        line = self._line(row)
        if not line and self.spec.granularity == "token":
            sequence = int(self.ids_of(row, row + 1)[0, 0])
            while not line and row > 0 and int(self.ids_of(row - 1, row)[0, 0]) == sequence:
                row -= 1
                line = self._line(row)
        if not line:
            return {}
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("not an object")
            return found
        except (ValueError, RecursionError) as error:
            shard = self.manifest.shards[next(self._pieces(row, row + 1))[0]].name
            raise ArtifactError(f"{self.directory / shard}.documents is damaged at row {row}: {error}") from error

    # -------------------------------------------------------------------------------------- checks

    def verify(self, ids: bool = True) -> dict[str, int]:
        """Read everything once: SHA-256 of every file, where documents begin, no id twice; counts of what was read.

        Without ``ids`` the last of these is left out.

        Memory does not grow with the store. Raises ``ArtifactError`` naming the first file that is not as it was
        written.
        """
        fmt.check_sizes(self.directory, self.manifest)
        for name, info in self.manifest.files.items():
            path = artifacts.resolve_file(self.directory, name)
            found = artifacts.sha256_file(path)
            if found != info["sha256"]:
                raise ArtifactError(
                    f"{path} is damaged or was changed: expected SHA-256 {info['sha256'][:12]}…, found {found[:12]}…; "
                    f"build the store again, or bring the file back"
                )
        if self.spec.documents:
            for index, shard in enumerate(self.manifest.shards):
                lines = np.asarray(self._map(index, "lines")).view("<u8")
                if lines[0] != 0 or lines[-1] != self._map(index, "documents").nbytes or (lines[1:] < lines[:-1]).any():
                    raise ArtifactError(f"{self.directory / shard.name}.lines does not fit its documents")
        twice = duplicates(self.id_blocks, self.count) if ids else ()
        if len(twice):
            raise ArtifactError(
                f"{self.directory} holds {len(twice)} ids twice, the first at row {twice[0]}; run: pyinf store compact"
            )
        return {"rows": self.count, "shards": len(self.manifest.shards), "files": len(self.manifest.files)}

    def id_blocks(self) -> Iterator[np.ndarray]:
        """All ids ``[n, 1 or 2]`` in order, a piece at a time."""
        step = _CHUNK // 16
        for start in range(0, self.count, step):
            stop = min(self.count, start + step)
            yield self.ids_of(start, stop).reshape(stop - start, -1)


def default_block_rows(width: int) -> int:
    """Rows whose float32 values take 64 MiB, from 64 to 65,536."""
    return max(64, min(1 << 16, _BLOCK_BYTES // (4 * width)))
