"""The second step of every split kernel: partial sums added in one fixed order, so that two runs give the same bits.

And whether the rows of a matrix are aligned, on which the tile sizes depend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launch

__all__ = ["is_aligned", "sum_launch"]


@triton.jit
def sum_kernel(partial, out, splits, count, factor, SQRT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """``out[p] = factor · Σ_s partial[s, p]`` for contiguous ``partial [splits, count]``; its root with SQRT."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < count
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, DEPTH):
        row = first + tl.arange(0, DEPTH)
        where = row.to(tl.int64)[:, None] * count + column[None, :]
        values = tl.load(partial + where, mask=(row < splits)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(values, axis=0)
    if SQRT:
        total = tl.sqrt(tl.maximum(total, 0.0))
    tl.store(out + column, total * factor, mask=inside)


def sum_launch(partial: torch.Tensor, out: torch.Tensor, factor: float = 1.0, root: bool = False) -> Launch:
    """One launch that sums ``partial [S, ...]`` over S into ``out``: both float32 and contiguous."""
    splits, count = partial.shape[0], out.numel()
    block, depth = (128, 16) if count >= 4096 else (16, 128)
    return Launch(
        sum_kernel,
        (triton.cdiv(count, block),),
        {"partial": partial, "out": out, "splits": splits, "count": count, "factor": float(factor)},
        {"SQRT": root, "BLOCK": block, "DEPTH": depth},
        num_warps=4,
    )


def is_aligned(x: torch.Tensor) -> bool:
    """Whether rows of ``x [N, d]`` can be copied 16 bytes at a time: what Triton finds out from sizes and addresses."""
    offset = x.storage_offset() * x.element_size()
    start = offset if x.is_meta else x.data_ptr()
    return x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 and start % 16 == 0
