"""Norms that are known only when all rows are: written over the zeros that were appended with the rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyinf import artifacts
from pyinf.errors import NonFiniteError
from pyinf.store import format as fmt
from pyinf.store.reader import Store, default_block_rows
from pyinf.store.writer import StoreWriter

__all__ = ["replace_norms"]


def replace_norms(writer: StoreWriter, norms_of: Callable[[Tensor], Tensor]) -> None:
    """Set the norm of every row of a sealed store to ``norms_of(rows)``, a block of decoded rows at a time.

    Each shard's file is written anew and the manifest after it. Killed in between, the store is still unfinished and
    the next start of its build does it again.

    Raises:
        NonFiniteError: a norm is not finite; names the row.
    """
    store = Store.open(writer.directory, unfinished=True)
    step = default_block_rows(store.width)
    with writer._change:
        manifest = writer._manifest
        for shard in manifest.shards:
            parts = []
            for start in range(shard.first, shard.first + shard.rows, step):
                rows = store.rows(start, min(start + step, shard.first + shard.rows))
                found = norms_of(rows).detach().to("cpu", torch.float32)
                if not bool(torch.isfinite(found).all()):
                    bad = start + int((~torch.isfinite(found)).nonzero()[0])
                    raise NonFiniteError(f"the norm of row {bad} is not finite; raise the damping")
                parts.append(found.numpy())
            name = f"{shard.name}.norms"
            data = np.ascontiguousarray(np.concatenate(parts), "<f4").tobytes()
            manifest.files[name] = artifacts.atomic_write_bytes(writer.directory / name, data)
        fmt.write(writer.directory, manifest)
