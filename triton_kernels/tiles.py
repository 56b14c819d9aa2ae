"""Device functions that the matrix kernels share: the order of tiles, one tile of a product, sums over sequences.

Addresses: a kernel adds the 64-bit offset of its tile to a pointer once, and 32-bit offsets inside the tile; so tensors
may have more than 2³¹ elements, and a tile's own rows must be less than 2³¹ elements apart (``fits_tile`` says so).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import Config
from .launch import Launch

__all__ = [
    "MULTIPROCESSORS",
    "dtype_name",
    "kind_of",
    "largest_stride",
    "segment_sums",
    "split_sums",
    "tile_of",
    "tile_product",
    "token_tile_sequences",
]

largest_stride = (1 << 31) // 512
"""The largest stride, in elements, of a tensor that is read in tiles: no tile is more than 512 wide."""

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "default": 108}
"""Of the largest card of each family (vendors' data sheets): how many programs it takes to fill it."""


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The kind of configuration for a dtype: "half", or for float32 the name of its precision."""
    return precision if dtype == torch.float32 else "half"


@triton.jit
def tile_of(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of the pid-th tile: GROUP rows of tiles at a time, so that neighbours in time share operands."""
    per_group = GROUP * column_tiles
    group = pid // per_group
    first = group * GROUP
    height = min(row_tiles - first, GROUP)
    inside = pid % per_group
    return first + inside % height, inside // height


@triton.jit
def tile_product(
    total, x, y, x_rows, y_columns, row_mask, column_mask, depth, x_depth, y_depth,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``total += x[rows, :depth] @ y[:depth, columns]``, BK of the depth at a time.

    ``x`` and ``y`` point at the tile's first row and column; ``x_rows`` and ``y_columns`` are the offsets of its rows
    and columns from there, and masked ones count as zero.
    """
    inner = tl.arange(0, BK)
    x_offsets = x_rows[:, None] + inner[None, :] * x_depth
    y_offsets = inner[:, None] * y_depth + y_columns[None, :]
    for start in range(0, depth, BK):
        left = tl.load(x + x_offsets, mask=row_mask[:, None] & (inner < depth - start)[None, :], other=0.0)
        right = tl.load(y + y_offsets, mask=column_mask[None, :] & (inner < depth - start)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x += BK * x_depth
        y += BK * y_depth
    return total


@triton.jit
def sequence_of(offsets, sequences, steps, row):
    """The last sequence that starts at or before ``row``: by bisection of ``offsets [sequences + 1]`` in ``steps``."""
    low = row * 0
    high = low + sequences
    for _ in range(0, steps):
        middle = (low + high) // 2
        before = tl.load(offsets + middle) <= row
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def token_tile_sequences(
    partial, values, offsets, tile, tokens, sequences, steps, columns, column_limit, width, BM: tl.constexpr
):
    """Sums ``values [BM, C]``, one row a token of the tile, over each sequence that the tile touches.

    The sum over (tile, sequence b) goes to row ``tile + b`` of ``partial [tiles + sequences, width]``: along the tokens
    each step raises one of the two, so no row is written twice.
    """
    first_row = tile.to(tl.int64) * BM
    last_row = min(first_row + BM, tokens) - 1
    first = sequence_of(offsets, sequences, steps, first_row)
    last = sequence_of(offsets, sequences, steps, last_row)
    rows = tl.arange(0, BM)
    for b in range(first, last + 1):
        start = tl.load(offsets + b) - first_row
        stop = tl.load(offsets + b + 1) - first_row
        inside = (rows >= start) & (rows < stop)
        total = tl.sum(tl.where(inside[:, None], values, 0.0), axis=0)
        row = (tile + b).to(tl.int64)
        tl.store(partial + row * width + columns, total, mask=columns < column_limit)


@triton.jit
def segment_kernel(
    scores, partial, offsets, sequences, queries, splits, split_stride, scores_query, scores_sequence,
    TILE: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``scores[q, b] += Σ_split Σ_tile partial[split, tile + b, q]`` over the token tiles of sequence b, in order."""
    b = tl.program_id(0)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    start = tl.load(offsets + b)
    stop = tl.load(offsets + b + 1)
    if stop > start:
        first = (start // TILE).to(tl.int32)
        last = ((stop - 1) // TILE).to(tl.int32)
        total = tl.zeros((BT, BQ), tl.float32)
        for _ in range(0, splits):
            for tile in range(first, last + 1, BT):
                t = tile + tl.arange(0, BT)
                at = (t + b).to(tl.int64) * queries
                mask = (t <= last)[:, None] & (q < queries)[None, :]
                total += tl.load(partial + at[:, None] + q[None, :], mask=mask, other=0.0)
            partial += split_stride
        where = scores + q.to(tl.int64) * scores_query + b.to(tl.int64) * scores_sequence
        held = tl.load(where, mask=q < queries, other=0.0)
        tl.store(where, held + tl.sum(total, axis=0), mask=q < queries)


@triton.jit
def split_kernel(
    scores,
    partial,
    queries,
    tokens,
    splits,
    split_stride,
    scores_query,
    scores_token,
    BQ: tl.constexpr,
    BT: tl.constexpr,
):
    """``scores[q, t] += Σ_split partial[split, q, t]``, in order."""
    q = (tl.program_id(0) * BQ + tl.arange(0, BQ)).to(tl.int64)[:, None]
    t = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)[None, :]
    mask = (q < queries) & (t < tokens)
    total = tl.zeros((BQ, BT), tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial + q * tokens + t, mask=mask, other=0.0)
        partial += split_stride
    where = scores + q * scores_query + t * scores_token
    tl.store(where, tl.load(where, mask=mask, other=0.0) + total, mask=mask)


SEGMENTS = Config({"BQ": 16, "BT": 32}, num_warps=4, num_stages=2)


def segment_sums(scores: torch.Tensor, partial: torch.Tensor, offsets: torch.Tensor, tile: int) -> Launch:
    """The second half of a score kernel: ``partial [splits, tiles + sequences, Q]`` added up into ``scores [Q, B]``."""
    queries, sequences = scores.shape
    return Launch(
        segment_kernel,
        (sequences, triton.cdiv(queries, SEGMENTS.constants["BQ"])),
        {
            "scores": scores,
            "partial": partial,
            "offsets": offsets,
            "sequences": sequences,
            "queries": queries,
            "splits": partial.shape[0],
            "split_stride": partial.stride(0),
            "scores_query": scores.stride(0),
            "scores_sequence": scores.stride(1),
        },
        {"TILE": tile, **SEGMENTS.constants},
        SEGMENTS.num_warps,
        SEGMENTS.num_stages,
    )


def split_sums(scores: torch.Tensor, partial: torch.Tensor) -> Launch:
    """The second half of a per-token score kernel: ``partial [splits, Q, N]`` added up into ``scores [Q, N]``."""
    splits, queries, tokens = partial.shape
    return Launch(
        split_kernel,
        (triton.cdiv(queries, 4), triton.cdiv(tokens, 256)),
        {
            "scores": scores,
            "partial": partial,
            "queries": queries,
            "tokens": tokens,
            "splits": splits,
            "split_stride": partial.stride(0),
            "scores_query": scores.stride(0),
            "scores_token": scores.stride(1),
        },
        {"BQ": 4, "BT": 256},
        4,
        2,
    )
