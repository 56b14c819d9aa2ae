"""Several stores into one, and one with many small shards or ids that stand twice into a tidy one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyinf import artifacts, progress
from pyinf.errors import ArtifactError, ConfigError, ResourceError
from pyinf.store import format as fmt
from pyinf.store.format import JOURNAL, StoreSpec
from pyinf.store.idset import duplicates
from pyinf.store.reader import Store
from pyinf.store.tail import Rows
from pyinf.store.writer import StoreWriter, lock_directory, tensor_difference

__all__ = ["DUPLICATES", "compact", "merge"]

DUPLICATES = ("error", "drop")
_COMPACTING = "compacting"
_BLOCK_BYTES = 1 << 25


def merge(
    directories: Sequence[str | Path],
    out: str | Path,
    shard_rows: int | None = None,
    duplicates: str = "error",
    verify: bool = True,
) -> Store:
    """The rows of several stores, in the order given, as one store in ``out``; killed, the same call goes on there.

    The stores must agree in everything but their data: compressor, settings, sections, format, model, task, damping,
    and, to the bit, the compressor's tensors. An id may stand once: ``duplicates="drop"`` keeps the first of equal ids.
    Every store is read through and checked first (``verify``): damage must not get a new checksum. Memory does not grow
    with the stores. Raises ``ArtifactError`` naming what differs, is damaged, or the first id that stands twice.
    """
    if duplicates not in DUPLICATES:
        raise ConfigError(f"unknown duplicates {duplicates!r}; choose one of: {', '.join(DUPLICATES)}")
    if not directories:
        raise ConfigError("give at least one store to merge")
    if len({Path(d).resolve() for d in directories}) != len(directories):
        raise ConfigError("one store is given twice; give each once")
    if Path(out).resolve() in {Path(d).resolve() for d in directories}:
        raise ConfigError(f"{out} is one of the stores to merge; choose another directory")
    stores = [Store.open(directory) for directory in directories]
    _need_equal(stores)
    if verify:
        with progress.stage("check of the stores", len(stores), "stores") as stage:
            for store in stores:
                _check(store)
                stage.advance(1)
    dropped = _second_ids(stores)
    if len(dropped) and duplicates == "error":
        store, row = _where(stores, int(dropped[0]))
        raise ArtifactError(
            f"{len(dropped)} ids stand twice, the first ({store.ids_of(row, row + 1)[0].tolist()}) again in "
            f"{store.directory}; keep the first of each with duplicates='drop' (--drop-duplicates)"
        )
    spec = _merged_spec(stores)
    writer = StoreWriter(out, spec, shard_rows, tensors=stores[0].tensors() or None)
    if writer.spec.meta.get("merged") != spec.meta["merged"]:
        writer.close()
        raise ArtifactError(f"{out} was merged from other stores; choose another directory or delete it")
    with writer:
        _copy(stores, dropped, writer)
    return Store.open(out)


def compact(directory: str | Path, shard_rows: int | None = None, verify: bool = True) -> Store:
    """Write a store again in place: full shards, the first of equal ids only. Readers that have it open keep the old.

    Needs the disk twice while it works. Killed at any moment, the store is the old one or the new one; what is left
    over is deleted by the next call. FAISS indexes of the old rows are deleted. Raises ``ArtifactError`` where the
    store is damaged (``verify``) or being written, ``ResourceError`` where the disk is full.
    """
    directory = Path(directory)
    fmt.read(directory)  # no lock in a directory that is no store
    lock = lock_directory(directory)
    try:
        work = directory / _COMPACTING
        if work.exists():
            shutil.rmtree(work)
        store = Store.open(directory)
        if verify:
            _check(store)
        dropped = _second_ids([store])
        writer = StoreWriter(work, store.spec, shard_rows)
        writer.start_at(store.manifest.serial)
        with writer:
            _copy([store], dropped, writer)
        fresh = fmt.read(work)
        old = {name for shard in store.manifest.shards for name in fmt.shard_files(store.spec, shard.name).values()}
        for name in fresh.files:
            (work / name).rename(directory / name)
        if store.manifest.tensors is not None:
            fresh.tensors = store.manifest.tensors
            fresh.files[fresh.tensors] = store.manifest.files[fresh.tensors]
        artifacts._sync_directory(directory)
        fmt.write(directory, fresh)
        for name in [*sorted(old), JOURNAL]:
            (directory / name).unlink(missing_ok=True)
        for path in directory.glob("index-*"):
            path.unlink()
        shutil.rmtree(work)
    except ResourceError:  # give back what filled the disk
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        lock.release()
    return Store.open(directory)


def _check(store: Store) -> None:
    """``Store.verify`` but for ids that stand twice, which are dealt with here."""
    store.verify(ids=False)


def _need_equal(stores: Sequence[Store]) -> None:
    first = stores[0]
    tensors = first.tensors()
    for store in stores[1:]:
        lines = first.spec.differences(store.spec, ignore=("pyinf", "meta", "data"))
        if lines:
            raise ArtifactError(
                f"{store.directory} cannot be merged with {first.directory}: {'; '.join(lines[:6])}; build both with "
                f"the same model and options"
            )
        name = tensor_difference(tensors, store.tensors())
        if name is not None:
            raise ArtifactError(
                f"{store.directory} cannot be merged with {first.directory}: tensor {name!r} of the compressor "
                f"differs; build the parts with one prepared compressor"
            )


def _merged_spec(stores: Sequence[Store]) -> StoreSpec:
    """The common specification; ``data`` is one fingerprint of all of them, in order."""
    spec = stores[0].spec
    parts = [store.spec.data for store in stores]
    data: str | None = spec.data
    if len(set(parts)) > 1:
        data = hashlib.sha256("|".join(part or "" for part in parts).encode()).hexdigest()
    merged: list[dict[str, Any]] = [
        {"data": store.spec.data, "rows": store.count, "files": _digest(store)} for store in stores
    ]
    return replace(spec, data=data, meta={**spec.meta, "merged": merged})


def _digest(store: Store) -> str:
    """One SHA-256 of the SHA-256 of every file."""
    files = sorted((name, info["sha256"]) for name, info in store.manifest.files.items())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _second_ids(stores: Sequence[Store]) -> np.ndarray:
    def blocks() -> Iterator[np.ndarray]:
        for store in stores:
            yield from store.id_blocks()

    return duplicates(blocks, sum(store.count for store in stores))


def _where(stores: Sequence[Store], row: int) -> tuple[Store, int]:
    for store in stores:
        if row < store.count:
            return store, row
        row -= store.count
    raise ConfigError(f"row {row} is in none of the stores")


def _copy(stores: Sequence[Store], dropped: np.ndarray, writer: StoreWriter) -> None:
    """All rows but ``dropped`` (numbers over all stores, ascending); those that ``writer`` has already are skipped."""
    done = writer.count
    total = sum(store.count for store in stores)
    step = max(1, _BLOCK_BYTES // stores[0].spec.row_bytes)
    first = kept = 0
    with progress.stage("copy of the rows", total, "rows") as stage:
        for store in stores:
            for rows in store.read_blocks(step):
                count = len(rows.ids)
                keep = np.ones(count, bool)
                a, b = np.searchsorted(dropped, (first, first + count))
                keep[dropped[a:b] - first] = False
                first += count
                index = np.flatnonzero(keep)
                skip = min(len(index), max(0, done - kept))
                kept += len(index)
                index = index[skip:]
                if len(index):
                    writer.append_encoded(_pick(rows, index))
                stage.advance(count)


def _pick(rows: Rows, index: np.ndarray) -> Rows:
    if len(index) == len(rows.ids):
        return rows
    documents = None if rows.documents is None else [rows.documents[i] for i in index]
    return Rows(rows.ids[index], rows.raw[index], None if rows.norms is None else rows.norms[index], documents)
