"""Optional indexes of a store's rows, through FAISS (``pip install pyinf[store]``).

An index is a file beside the store, ``index-NAME.faiss``, and ``index-NAME.json``: its checksum, its options, and the
digest of the rows that it was made from. An index of other rows, or a damaged one, is an error. Rows of factors cannot
be indexed: they are not vectors that a query meets by an inner product.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyinf import artifacts, progress
from pyinf.errors import ArtifactError, ConfigError, ResourceError
from pyinf.store.quantise import decode, encode, value_bytes
from pyinf.store.reader import Store
from pyinf.store.scan import NORMALISE
from pyinf.store.sections import query_width, row_width

__all__ = ["KINDS", "FaissIndex", "build_index", "open_index"]

KINDS = ("flat", "ivf", "pq", "ivfpq", "binary")
_FORMAT = "pyinf.store.index"
_VERSION = 1
_TRAIN_ROWS = 100_000


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ResourceError("an index needs FAISS, which is not installed; run: pip install 'pyinf[store]'") from error
    return faiss


def rows_digest(store: Store) -> str:
    """One SHA-256 of the checksums of all files of rows and norms, in the order of the rows."""
    digest = hashlib.sha256()
    for shard in store.manifest.shards:
        for suffix in ("rows", "norms"):
            info = store.manifest.files.get(f"{shard.name}.{suffix}")
            digest.update(f"{suffix}:{info['sha256'] if info else ''}|".encode())
    return digest.hexdigest()


@dataclass
class FaissIndex:
    """An index in memory, of ``kind`` (:func:`build_index`), for rows as they are or divided by their norms."""

    store: Store
    kind: str
    normalise: str
    options: dict[str, Any]
    index: Any

    def search(self, queries: Tensor, k: int, nprobe: int | None = None) -> tuple[Tensor, Tensor]:
        """Values float32 and row numbers int64 ``[Q, k]``, best first; −1 and −∞ where the index found fewer.

        flat: the scores of a scan; ivf: the same, among the ``nprobe`` nearest lists of the query (default: a tenth of
        them); pq, ivfpq: scores of the compressed rows; binary: agreeing minus differing signs. Approximate kinds miss
        rows: measure their recall (:mod:`pyinf.store.recall`). Raises ``ConfigError`` for a width that does not fit.
        """
        width = query_width(self.store.sections)
        if queries.dim() != 2 or queries.shape[1] != width or not queries.is_floating_point():
            raise ConfigError(f"queries must be float [Q, {width}]; got {queries.dtype} {tuple(queries.shape)}")
        if k < 0:
            raise ConfigError(f"k must not be negative; got {k}")
        k = min(k, self.store.count)
        queries = queries.detach().float().cpu().contiguous()
        if k == 0 or queries.shape[0] == 0:
            return queries.new_empty(queries.shape[0], k), torch.empty(queries.shape[0], k, dtype=torch.int64)
        if self.kind in ("ivf", "ivfpq"):
            lists = self.index.nlist
            self.index.nprobe = max(1, min(lists, nprobe or -(-lists // 10)))
        elif nprobe is not None:
            raise ConfigError(f"nprobe is for ivf and ivfpq indexes; this one is {self.kind}")
        if self.kind == "binary":
            size = value_bytes(self.store.sections, "1bit")
            packed = encode(queries, self.store.sections, "1bit")[:, :size]
            distances, rows = self.index.search(np.ascontiguousarray(packed), k)
            values = torch.from_numpy(row_width(self.store.sections) - 2.0 * distances).float()
            values[torch.from_numpy(rows) < 0] = -torch.inf
        else:
            found, rows = self.index.search(queries.numpy(), k)
            values = torch.from_numpy(found)
        return _in_order(values, torch.from_numpy(rows).long())


def _in_order(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Best first, equal values by row (those that are −1 last)."""
    order = torch.where(rows < 0, torch.iinfo(torch.int64).max, rows).argsort(dim=1, stable=True)
    values, rows = values.gather(1, order), rows.gather(1, order)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), rows.gather(1, order)


def build_index(
    store: Store,
    kind: str = "flat",
    name: str | None = None,
    normalise: str = "none",
    lists: int | None = None,
    code_bytes: int | None = None,
    seed: int = 0,
) -> FaissIndex:
    """Make an index of all rows, write it beside the store and return it.

    kind: flat (float32 rows in memory), ivf (the same in ``lists`` cells, default ``4√N``), pq (product codes of
    ``code_bytes`` bytes, default 64 or fewer), ivfpq (both), binary (sign bits; rows of format 1bit).
    ``normalise="norm"`` indexes rows divided by their norms. Cells and codes are learned on at most 100,000 rows drawn
    with ``seed``. The index is built, and later held, in memory. Raises ``ConfigError`` for a kind that does not fit
    the store, ``ResourceError`` where FAISS is missing or the disk is full.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown kind of index {kind!r}; choose one of: {', '.join(KINDS)}")
    if normalise not in NORMALISE:
        raise ConfigError(f"unknown normalise {normalise!r}; choose one of: {', '.join(NORMALISE)}")
    if any(section.kind != "vector" for section in store.sections):
        raise ConfigError("rows of factors cannot be indexed; scan the store, or build it with vectors")
    if kind == "binary" and store.spec.format != "1bit":
        raise ConfigError(f"a binary index needs 1bit rows; this store has {store.spec.format}")
    if kind == "binary" and normalise != "none":
        raise ConfigError("a binary index counts signs, which have no norm; use normalise='none'")
    if normalise == "norm":
        store.norms_of(0, 0)
    if store.count == 0:
        raise ConfigError(f"{store.directory} has no rows to index")
    name = _need_name(name or kind)
    faiss = _faiss()
    options: dict[str, Any] = {"seed": seed}
    with progress.stage(f"index {name}", store.count, "rows") as stage:
        index = _empty_index(faiss, store, kind, normalise, lists, code_bytes, seed, options)
        size = value_bytes(store.sections, "1bit") if kind == "binary" else 0
        for start, stop, raw in store.blocks():
            if kind == "binary":
                index.add(np.ascontiguousarray(raw[:, :size]))
            else:
                index.add(_floats(store, raw, start, stop, normalise))
            stage.advance(stop - start)
    _write_index(faiss, index, store, kind, name, normalise, options)
    return FaissIndex(store, kind, normalise, options, index)


def _floats(store: Store, raw: np.ndarray, start: int, stop: int, normalise: str) -> np.ndarray:
    rows = decode(raw, store.sections, store.spec.format)
    if normalise == "norm":
        norms = torch.from_numpy(np.array(store.norms_of(start, stop)))[:, None]
        rows = torch.where(norms > 0, rows / norms, torch.zeros_like(rows))
    return rows.contiguous().numpy()


def _empty_index(
    faiss: Any,
    store: Store,
    kind: str,
    normalise: str,
    lists: int | None,
    code_bytes: int | None,
    seed: int,
    options: dict[str, Any],
) -> Any:
    width = row_width(store.sections)
    if kind == "binary":
        return faiss.IndexBinaryFlat(8 * value_bytes(store.sections, "1bit"))
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    draw = np.random.default_rng(seed)
    count = min(store.count, _TRAIN_ROWS)
    chosen = np.sort(draw.choice(store.count, count, replace=False)) if count < store.count else np.arange(count)
    sample = store.take(chosen)
    if normalise == "norm":
        norms = torch.from_numpy(np.array(store.norms_of(0, store.count))[chosen])[:, None]
        sample = torch.where(norms > 0, sample / norms, torch.zeros_like(sample))
    if kind in ("ivf", "ivfpq"):
        lists = lists or max(1, min(int(4 * store.count**0.5), count // 39 or 1))
        if not 1 <= lists <= count:
            raise ConfigError(f"lists must be 1 to {count}, the rows to learn from; got {lists}")
        options["lists"] = lists
    if kind in ("pq", "ivfpq"):
        code_bytes = code_bytes or max(c for c in range(1, min(64, width) + 1) if width % c == 0)
        if code_bytes < 1 or width % code_bytes:
            raise ConfigError(f"code_bytes must divide the width {width}; got {code_bytes}")
        if count < 256:
            raise ConfigError(f"product codes are learned on at least 256 rows; {store.directory} has {count}")
        options["code_bytes"] = code_bytes
    inner = faiss.METRIC_INNER_PRODUCT
    if kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, inner)
    elif kind == "pq":
        index = faiss.IndexPQ(width, code_bytes, 8, inner)
    else:
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, code_bytes, 8, inner)
    for learner in (getattr(index, "cp", None), getattr(getattr(index, "pq", None), "cp", None)):
        if learner is not None:
            learner.seed, learner.min_points_per_centroid = seed + 1, 1
    index.train(sample.contiguous().numpy())
    return index


def _write_index(
    faiss: Any, index: Any, store: Store, kind: str, name: str, normalise: str, options: dict[str, Any]
) -> None:
    path = store.directory / f"index-{name}.faiss"
    write = faiss.write_index_binary if kind == "binary" else faiss.write_index
    digest, size = hashlib.sha256(), 0
    with artifacts.atomic_writer(path) as handle:

        def put(data: bytes) -> None:
            nonlocal size
            handle.write(data)
            digest.update(data)
            size += len(data)

        write(index, faiss.PyCallbackIOWriter(put))
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kind,
        "normalise": normalise,
        "options": options,
        "faiss": faiss.__version__,
        "rows": rows_digest(store),
        "file": {"sha256": digest.hexdigest(), "bytes": size},
    }
    artifacts.atomic_write_json(store.directory / f"index-{name}.json", description)


def _need_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"index name {name!r} must be letters, digits, - and _")
    return name


def open_index(store: Store, name: str = "flat") -> FaissIndex:
    """Read ``index-NAME`` of a store, after its checksum was compared.

    Raises ``ArtifactError`` naming the file that is missing, damaged, of another version, or made from other rows, and
    ``ResourceError`` where FAISS is missing.
    """
    description_path = store.directory / f"index-{_need_name(name)}.json"
    path = description_path.with_suffix(".faiss")
    if not description_path.exists():
        raise ArtifactError(f"{store.directory} has no index {name!r}; make one with pyinf.store.build_index")
    found = artifacts.read_json(description_path, "index description")
    try:
        if found["format"] != _FORMAT or found["version"] != _VERSION:
            raise ArtifactError(
                f"{description_path} is {found['format']} version {found['version']!r}, this pyinf reads {_FORMAT} "
                f"version {_VERSION}; build the index again"
            )
        kind, normalise, options, wanted = found["kind"], found["normalise"], found["options"], found["file"]
        if kind not in KINDS or normalise not in NORMALISE:
            raise ValueError(f"kind {kind!r}, normalise {normalise!r}")
        same_rows = found["rows"] == rows_digest(store)
        size, sha256 = wanted["bytes"], wanted["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{description_path} is damaged: {error}; build the index again") from error
    if not same_rows:
        raise ArtifactError(f"{path} was made from other rows than {store.directory} has now; build the index again")
    if not path.exists() or path.stat().st_size != size or artifacts.sha256_file(path) != sha256:
        raise ArtifactError(f"{path} is missing, damaged or was changed; build the index again")
    faiss = _faiss()
    try:
        index = (faiss.read_index_binary if kind == "binary" else faiss.read_index)(str(path))
    except RuntimeError as error:
        raise ArtifactError(f"FAISS cannot read {path}: {error}; build the index again") from error
    if index.ntotal != store.count:
        raise ArtifactError(f"{path} has {index.ntotal} rows, the store {store.count}; build the index again")
    return FaissIndex(store, kind, normalise, options, index)


def indexes(directory: str | Path) -> list[dict[str, Any]]:
    """Descriptions of the indexes beside a store; one that cannot be read has an ``error``."""
    found = []
    for path in sorted(Path(directory).glob("index-*.json")):
        name = path.stem.removeprefix("index-")
        try:
            found.append({"name": name, **json.loads(path.read_text())})
        except (OSError, ValueError) as error:
            found.append({"name": name, "error": str(error)})
    return found
