"""Every query against every row, a block of rows at a time, the best kept as they stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pyinf import ops
from pyinf.errors import ConfigError, NonFiniteError
from pyinf.ops import cpu_backend
from pyinf.store.quantise import as_tensor, decode, encode, scales, value_bytes, viewed
from pyinf.store.reader import Store, default_block_rows
from pyinf.store.sections import query_width, section_scores
from pyinf.store.topk import TopK

__all__ = ["NORMALISE", "all_scores", "row_scores", "scan"]

NORMALISE = ("none", "norm")
COARSE = ("sign",)
_SCORES = 1 << 24  # scores held at a time
_OP_TYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
# The best of a block (numbered in it) from its bytes and the inverse norms of its rows, if asked for.
BlockHits = Callable[[np.ndarray, "Tensor | None"], "tuple[Tensor, Tensor]"]


def scan(
    store: Store,
    queries: Tensor,
    k: int,
    block_rows: int | None = None,
    normalise: str = "none",
    coarse: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows of every query: values float32 ``[Q, k]`` and row numbers int64 ``[Q, k]``, best first.

    queries: float ``[Q, query_width]``. The score is that of :func:`~pyinf.store.sections.section_scores` with the rows
    as the format holds them: for 1bit ``Σ_sections scale · ⟨q, sign⟩``, the query as it is; for int8
    ``Σ scale · ⟨q, int8⟩``. Products are summed in float32. ``normalise="norm"`` divides by the stored norm of the row
    (a row of norm 0 scores 0). Equal scores: the lower row first. k is cut to the number of rows.

    ``coarse="sign"`` (1bit rows of vectors only) takes the query's signs as well, and one scale a section:
    ``Σ_sections mean|q| · scale · (agreeing − differing signs)``, by population counts. It is a first stage: its
    values approximate the scores.

    Memory: a block of rows and its scores, and ``Q·k`` hits, however large the store. Cost: ``2·Q·N·width``
    operations, one read of the store. Raises ``ConfigError`` for a width or option that does not fit the store,
    ``NonFiniteError`` where a query is not finite.
    """
    queries = _checked(store, queries, normalise)
    if k < 0:
        raise ConfigError(f"k must not be negative; got {k}")
    best = TopK(queries.shape[0], min(k, store.count), queries.device)
    hits: BlockHits | None = None
    if coarse is not None:
        _need_signs(store, coarse)
        hits = _sign_hits(store, queries, best.k)
        if hits is None:
            queries = _rounded(store, queries)
    elif len(store.sections) == 1 and store.sections[0].kind == "vector" and store.spec.format in _OP_TYPES:
        hits = _op_hits(store, queries, best.k)
    if best.k == 0 or queries.shape[0] == 0:
        return best.values, best.rows
    if hits is None:
        for start, _, scores in _score_blocks(store, queries, block_rows, normalise):
            best.add(scores, start)
        return best.values, best.rows
    for start, stop, raw in store.blocks(block_rows or _hit_rows(store)):
        inverse = _inverse_norms(store, start, stop) if normalise == "norm" else None
        values, index = hits(raw, inverse)
        best.add_hits(values, index + start)
    return best.values, best.rows


def all_scores(store: Store, queries: Tensor, block_rows: int | None = None, normalise: str = "none") -> Tensor:
    """Scores of every query against every row, as in :func:`scan`: float32 ``[Q, N]``, all of them in memory."""
    queries = _checked(store, queries, normalise)
    out = torch.empty(queries.shape[0], store.count, device=queries.device)
    for start, stop, scores in _score_blocks(store, queries, block_rows, normalise):
        out[:, start:stop] = scores
    return out


def row_scores(store: Store, queries: Tensor, start: int, stop: int, normalise: str = "none") -> Tensor:
    """Scores of every query against rows ``start`` to ``stop``, as in :func:`scan`: float32 ``[Q, stop − start]``."""
    queries = _checked(store, queries, normalise)
    return _scores(store, queries, start, stop, store.raw(start, stop), normalise)


def _checked(store: Store, queries: Tensor, normalise: str) -> Tensor:
    if normalise not in NORMALISE:
        raise ConfigError(f"unknown normalise {normalise!r}; choose one of: {', '.join(NORMALISE)}")
    if normalise == "norm":
        store.norms_of(0, 0)  # says so where the store keeps none
    width = query_width(store.sections)
    if queries.dim() != 2 or queries.shape[1] != width or not queries.is_floating_point():
        raise ConfigError(f"queries must be float [Q, {width}]; got {queries.dtype} {tuple(queries.shape)}")
    queries = queries.detach().float()
    bad = ~torch.isfinite(queries).all(1)
    if bool(bad.any()):
        raise NonFiniteError(f"query {int(bad.nonzero()[0])} holds NaN or infinity")
    return queries.contiguous()


def _score_blocks(
    store: Store, queries: Tensor, block_rows: int | None, normalise: str
) -> Iterator[tuple[int, int, Tensor]]:
    step = block_rows or max(64, min(default_block_rows(store.width), _SCORES // max(1, queries.shape[0])))
    for start, stop, raw in store.blocks(step):
        yield start, stop, _scores(store, queries, start, stop, raw, normalise)


def _scores(store: Store, queries: Tensor, start: int, stop: int, raw: np.ndarray, normalise: str) -> Tensor:
    rows = decode(raw, store.sections, store.spec.format).to(queries.device)
    scores = section_scores(queries, rows, store.sections)
    if normalise == "norm":
        scores *= _inverse_norms(store, start, stop).to(scores.device)
    return scores


def _inverse_norms(store: Store, start: int, stop: int) -> Tensor:
    norms = as_tensor(store.norms_of(start, stop))
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


def _hit_rows(store: Store) -> int:
    return max(1024, (1 << 26) // store.spec.row_bytes)


def _op_hits(store: Store, queries: Tensor, k: int) -> BlockHits:
    """bfloat16 and int8 rows of one section, as they are stored, through ``ops.scan_topk``."""
    format = store.spec.format
    size = value_bytes(store.sections, format)

    def hits(raw: np.ndarray, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = viewed(as_tensor(raw)[:, :size], _OP_TYPES[format]).to(queries.device)
        scale = scales(raw, store.sections, format)
        factor = inverse if scale is None else scale[:, 0] if inverse is None else scale[:, 0] * inverse
        return ops.scan_topk(queries, rows, k, format, None if factor is None else factor.to(queries.device))

    return hits


def _need_signs(store: Store, coarse: str) -> None:
    if coarse not in COARSE:
        raise ConfigError(f"unknown coarse {coarse!r}; choose one of: {', '.join(COARSE)}")
    if store.spec.format != "1bit" or any(section.kind != "vector" for section in store.sections):
        raise ConfigError(f"coarse='sign' scans 1bit rows of vectors; this store has {store.spec.format} rows")


def _rounded(store: Store, queries: Tensor) -> Tensor:
    """Queries as a 1bit store would hold them."""
    return decode(encode(queries, store.sections, "1bit"), store.sections, "1bit").to(queries.device)


def _sign_hits(store: Store, queries: Tensor, k: int) -> BlockHits | None:
    """Population counts of packed signs; None where rows have several sections and no kernel weighs them."""
    sections = store.sections
    one = len(sections) == 1
    if not one and (queries.device.type != "cpu" or cpu_backend._unavailable() is not None):
        return None
    packed = encode(queries, sections, "1bit")
    weights = scales(packed, sections, "1bit")
    size = value_bytes(sections, "1bit")
    signs = as_tensor(packed[:, :size].copy()).to(queries.device)
    widths = [section.width for section in sections]
    starts = list(accumulate(((width + 7) // 8 for width in widths), initial=0))

    def hits(raw: np.ndarray, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, scale = as_tensor(raw)[:, :size], scales(raw, sections, "1bit")
        if inverse is not None:
            scale = scale * inverse[:, None]
        if not one:
            return cpu_backend.scan_sections(signs, rows, k, starts, widths, weights, scale)
        device = queries.device
        values, index = ops.scan_topk(queries, rows.to(device), k, "1bit", scale[:, 0].to(device))
        return values * weights.to(device), index

    return hits
