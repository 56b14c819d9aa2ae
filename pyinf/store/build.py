"""Building a store from a model and its training set, and the query rows that meet it.

What is called attributor here is a :class:`pyinf.Attributor` of a projected method; this layer lies below it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyinf import artifacts, progress
from pyinf.capture import LayerSelection
from pyinf.data.batching import PreparedExamples
from pyinf.errors import ArtifactError, ConfigError
from pyinf.store.compress import REGISTRY, Compressor
from pyinf.store.format import StoreSpec
from pyinf.store.norms import replace_norms
from pyinf.store.passes import RowPass
from pyinf.store.quantise import row_bytes
from pyinf.store.reader import Store, default_block_rows
from pyinf.store.writer import StoreWriter

__all__ = ["build_store", "open_compressor", "query_rows"]

Documents = Sequence[Mapping[str, Any] | None] | Callable[[int], Mapping[str, Any] | None]


def build_store(
    attributor: Any,
    train: Any,
    directory: str | Path,
    format: str = "bfloat16",
    documents: Documents | None = None,
    shard_rows: int | None = None,
    granularity: str = "sequence",
    queries: Any = None,
    batch_size: int | None = None,
) -> Store:
    """Make the rows of ``train`` and write them behind the pass; the same call goes on where a killed one stopped.

    Factors (where the method needs any) and the compressor come first, unless the directory holds them already; then
    the rows; then what is learnt from the rows as they are stored (curvature), and norms. Memory does not grow with the
    number of sequences. Sequences without a label have no row.

    Args:
        attributor: a :class:`pyinf.Attributor` with ``logra``, ``trak``, ``onebit`` or another projected method.
        format: one of :data:`pyinf.store.FORMATS`.
        documents: what stands beside each training example (text, source): a sequence, or a function of its number.
        granularity: ``"token"``: one row for every counted position, its id ``(example, position)``.
        queries: for a curvature that mixes queries in (``trackstar`` with ``mix`` above 0).

    Returns:
        The finished store; ``store.ids`` are the examples' numbers, in the order of the pass.

    Raises:
        ConfigError: the method has no rows, or none per token.
        ArtifactError: the directory holds another store.
        ResourceError: the disk is too small.
    """
    run = getattr(attributor, "_run", None)
    if run is None or attributor.method.compressor is None:
        raise ConfigError(f"method '{attributor.method.name}' makes no rows; use one such as logra, trak or onebit")
    if granularity not in ("sequence", "token"):
        raise ConfigError(f"unknown granularity '{granularity}'; use 'sequence' or 'token'")
    with attributor._placed(), attributor._backend():
        data = attributor._prepare(train, "train")
        plan = attributor._make_plan(data, None, batch_size)
        fresh = run.fresh()
        if granularity == "token" and (not fresh.linear or fresh.normalise != "none"):
            raise ConfigError(f"method '{attributor.method.name}' has no rows per token with these options")
        if getattr(fresh, "mixes_queries", False) and queries is None:
            raise ConfigError(
                f"mix is {fresh.options['mix']}, so the curvature needs queries: give queries=, or make the attributor "
                "with mix=0"
            )
        identity = _identity(attributor, data, format, granularity, documents is not None)
        found = _existing(Path(directory), identity)
        if found is not None and found.manifest.finished:
            progress.note(f"the store in {directory} is finished; nothing to do")
            return found
        if found is not None:
            spec, tensors = found.spec, None
            compressor = _restored(found, run.selection, next(run.model.parameters()).device, run.options)
        else:
            if attributor.method.factors is not None and attributor.factors is None:
                attributor._fit(data, plan)
            compressor = run.prepared(data, attributor.factors, plan)
            spec, tensors = _spec(compressor, identity), compressor.tensors()
        size = row_bytes(spec.sections, format) * (sum(data.counted) if granularity == "token" else len(data))
        Path(directory).mkdir(parents=True, exist_ok=True)
        if found is None:
            artifacts.check_free_disk(directory, size, "the store")
        with StoreWriter(directory, spec, shard_rows, tensors=tensors) as writer:
            _write_rows(writer, run.rig(plan), compressor, data, documents)
            writer.seal()
            if queries is not None:
                asked = attributor._prepare(queries, "queries")
                compressor.see_queries(run.query_rows(asked, plan, compressor))
            store = Store.open(directory, unfinished=True)
            compressor.finish(_SequenceRows(store, compressor.device, compressor.dtype))
            if spec.norms:
                device, dtype = compressor.device, compressor.dtype
                replace_norms(writer, lambda rows: compressor.row_norms(rows.to(device, dtype)))
            return writer.finish(compressor.tensors(), compressor.settings())


def open_compressor(store: Store, attributor: Any) -> Compressor:
    """The compressor that a store was built with, for the attributor's model and layers.

    Raises:
        ArtifactError: the store was built with another model (its weights differ).
        ConfigError: other layers are selected, or the store's compressor is unknown.
    """
    with attributor._placed():
        mine = artifacts.fingerprint_model(attributor.model)
        if store.spec.model not in (None, mine):
            raise ArtifactError(
                f"the store {store.directory} was built with another model (its weights differ); use that one"
            )
        device = next(attributor.model.parameters()).device
        found = _restored(store, attributor.selection, device, attributor.options)
        if attributor.factors is not None:
            found.adopt(attributor.factors)
        return found


def query_rows(attributor: Any, queries: Any, compressor: Compressor | Store, damping: float | None = None) -> Tensor:
    """Query rows ``[Q, query_width]``, preconditioned, never quantised; zeros for a query that measures nothing.

    Args:
        compressor: a finished compressor, or the store whose compressor is to be used.
        damping: another damping than the store's, where it is not part of the rows.

    Raises:
        ConfigError: the damping is part of the rows.
    """
    if isinstance(compressor, Store):
        compressor = open_compressor(compressor, attributor)
    if damping is not None and compressor.early_damping and damping != compressor.damping:
        raise ConfigError(
            f"the damping of '{compressor.name}' is part of its rows ({compressor.damping}); build another store"
        )
    with attributor._placed(), attributor._backend():
        data = attributor._prepare(queries, "queries")
        plan = attributor._make_plan(data, None, None)
        return compressor.query_rows(attributor._run.query_rows(data, plan, compressor), damping)


# ------------------------------------------------------------------------------------------ identity and resuming


def _identity(
    attributor: Any, data: PreparedExamples, format: str, granularity: str, documents: bool
) -> dict[str, Any]:
    run = attributor._run
    fresh = run.fresh()
    return {
        "compressor": fresh.name,
        "options": fresh.settings()["options"],
        "format": format,
        "granularity": granularity,
        "documents": documents,
        "norms": fresh.normalise != "none",
        "model": artifacts.fingerprint_model(attributor.model),
        "data": attributor._data_fingerprint(data),
        "task": json.dumps(attributor.task.fingerprint(), sort_keys=True),
        "method": attributor.method.name,
        "damping": list(run.damping),
        "fisher": attributor.fisher,
        "seed": attributor.seed,
        "modules": list(run.selection.names),
    }


def _spec(compressor: Compressor, identity: Mapping[str, Any]) -> StoreSpec:
    plain = ("compressor", "format", "granularity", "documents", "norms", "model", "data", "task")
    return StoreSpec(
        sections=compressor.sections,
        settings=compressor.settings(),
        damping=compressor.damping if compressor.damped else None,
        meta=dict(identity),
        **{name: identity[name] for name in plain},
    )


def _existing(directory: Path, identity: Mapping[str, Any]) -> Store | None:
    """The store in the directory, if there is one; an error where it is another."""
    if not (directory / artifacts.MANIFEST_NAME).exists():
        return None
    store = Store.open(directory, unfinished=True)
    wanted = json.loads(json.dumps(identity))
    lines = artifacts.differences(dict(store.spec.meta), wanted)
    if lines:
        raise ArtifactError(
            f"{directory} holds another store ({'; '.join(lines[:6])}); choose another directory or delete it"
        )
    return store


def _restored(store: Store, selection: LayerSelection, device: torch.device, options: Mapping[str, Any]) -> Compressor:
    name = store.spec.compressor
    if name not in REGISTRY:
        raise ConfigError(f"the store was built with compressor '{name}', which is unknown here; use its pyinf version")
    settings = dict(store.spec.settings)
    # Checkpoints given as callables are in no manifest: those of the attributor stand in for what is missing.
    missing = {k: options.get(k) for k in REGISTRY[name].defaults if k not in settings["options"]}
    settings["options"] = {**settings["options"], **missing}
    return REGISTRY[name].restore(settings, store.tensors(), selection).to(device)


# ------------------------------------------------------------------------------------------ rows


def _write_rows(
    writer: StoreWriter, rig: Any, compressor: Compressor, data: PreparedExamples, documents: Documents | None
) -> None:
    per_token = writer.spec.granularity == "token"
    done = writer.done_ids()
    counted = data.counted
    if per_token:
        sequences, rows = np.unique(done[:, 0], return_counts=True) if len(done) else (np.empty(0), np.empty(0))
        finished = {int(i) for i, n in zip(sequences, rows, strict=True) if n == counted[int(i)]}
    else:
        finished = set(done.tolist())
    left = [i for i in range(len(data)) if i not in finished]
    if finished:
        progress.note(f"{len(finished)} of {len(data)} sequences are in the store already")
    partial = {(int(i), int(p)) for i, p in done if int(i) not in finished} if per_token else set()
    source = RowPass(rig, compressor, data, rig.batches(data, left), per_token=per_token, stage="rows of the store")
    for batch in source:
        beside = _documents(documents, batch.indices)
        if not per_token:
            norms = np.zeros(len(batch.indices), np.float32) if writer.spec.norms else None
            writer.append(batch.indices, batch.rows, norms, beside)
            continue
        ids, texts = _token_ids(data, batch.indices, beside)
        if partial:
            keep = [n for n, pair in enumerate(ids) if pair not in partial]
            ids, batch.rows = [ids[n] for n in keep], batch.rows[keep]
            texts = None if texts is None else [texts[n] for n in keep]
        writer.append(np.array(ids, np.int64).reshape(-1, 2), batch.rows, None, texts)


def _documents(documents: Documents | None, indices: list[int]) -> list[Mapping[str, Any] | None] | None:
    if documents is None:
        return None
    return [documents(i) if callable(documents) else documents[i] for i in indices]


def _token_ids(
    data: PreparedExamples, indices: list[int], documents: list[Mapping[str, Any] | None] | None
) -> tuple[list[tuple[int, int]], list[Mapping[str, Any] | None] | None]:
    """``(example, position as the user gave it)`` of every counted position; the document goes with the first."""
    ids: list[tuple[int, int]] = []
    beside: list[Mapping[str, Any] | None] = []
    for place, index in enumerate(indices):
        mask = data.masks[index]
        inner = range(data.lengths[index]) if mask is None else mask.nonzero().squeeze(1).tolist()
        own = [(index, p + data.shifts[index]) for p in inner]
        ids += own
        if documents is not None:
            beside += [documents[place], *[None] * (len(own) - 1)]
    return ids, None if documents is None else beside


class _SequenceRows:
    """A store's rows, one a sequence (sums of its tokens' rows where it has those), block by block."""

    def __init__(self, store: Store, device: torch.device, dtype: torch.dtype) -> None:
        self.store, self.device, self.dtype = store, device, dtype

    def __iter__(self) -> Iterator[Tensor]:
        blocks = self._blocks() if self.store.spec.granularity == "sequence" else self._summed()
        for rows in blocks:
            yield rows.to(self.device, self.dtype)

    def _blocks(self) -> Iterable[Tensor]:
        step = default_block_rows(self.store.width)
        for start in range(0, self.store.count, step):
            yield self.store.rows(start, min(start + step, self.store.count))

    def _summed(self) -> Iterator[Tensor]:
        """Tokens of a sequence stand together, but for those of one that a killed build had begun."""
        sequences = np.ascontiguousarray(self.store.ids[:, 0])
        starts = np.flatnonzero(np.r_[True, sequences[1:] != sequences[:-1]]) if len(sequences) else np.empty(0, int)
        runs, counts = np.unique(sequences[starts], return_counts=True)
        split = {int(i) for i in runs[counts > 1]}
        later: dict[int, Tensor] = {}
        step, first = default_block_rows(self.store.width), 0
        bounds = [*starts.tolist(), len(sequences)]
        while first < len(starts):
            last = first + 1
            while last < len(starts) and bounds[last + 1] - bounds[first] <= step:
                last += 1
            rows = self.store.rows(bounds[first], bounds[last])
            lengths = torch.tensor([bounds[n + 1] - bounds[n] for n in range(first, last)])
            index = torch.repeat_interleave(torch.arange(last - first), lengths)
            sums = rows.new_zeros(last - first, rows.shape[1]).index_add_(0, index, rows)
            whole = []
            for place in range(last - first):
                sequence = int(sequences[bounds[first + place]])
                if sequence in split:
                    later[sequence] = later.get(sequence, 0) + sums[place]
                else:
                    whole.append(place)
            if whole:
                yield sums[whole]
            first = last
        if later:
            yield torch.stack(list(later.values()))
