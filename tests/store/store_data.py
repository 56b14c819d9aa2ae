"""Small stores for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pyinf.store.format import StoreSpec
from pyinf.store.reader import Store
from pyinf.store.sections import layout, row_width
from pyinf.store.writer import StoreWriter

PARTS = [("a", "vector", (4, 5)), ("b", "factors", (2, 3, 4)), ("c", "vector", (9,))]
VECTORS = [("a", "vector", (4, 5)), ("b", "vector", (20,)), ("c", "vector", (9,))]


def spec(format: str = "float32", parts=PARTS, **fields) -> StoreSpec:
    fields = {"settings": {"k": 4}, "norms": True, "documents": True, "data": "d", "model": "m", **fields}
    return StoreSpec("logra", layout(parts), format, **fields)


def rows_of(what: StoreSpec, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, row_width(what.sections), generator=torch.Generator().manual_seed(seed))


def append(writer: StoreWriter, ids, rows: torch.Tensor) -> None:
    """Rows with norms and documents that follow from their ids."""
    what = writer.spec
    norms = torch.as_tensor(np.asarray(ids).reshape(len(ids), -1)[:, -1]).float() + 1 if what.norms else None
    documents = [{"id": np.asarray(i).tolist(), "text": f"dokument «{i}»"} for i in ids] if what.documents else None
    writer.append(ids, rows, norms, documents)


def build(directory: Path, what: StoreSpec, count: int, batch: int = 7, first: int = 0, **options) -> Store:
    rows = rows_of(what, count, seed=first)
    with StoreWriter(directory, what, **options) as writer:
        for start in range(0, count, batch):
            stop = min(count, start + batch)
            append(writer, list(range(first + start, first + stop)), rows[start:stop])
    return Store.open(directory)
