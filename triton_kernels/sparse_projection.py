"""The sparse Johnson–Lindenstrauss transform for few buckets: one-hot tiles of S on the tensor cores.

A program owns a [BM, BN] tile of the result (BM rows of x, BN buckets) over one stretch of the D coordinates. For every
[BM, BK] of x and each of the ``nnz`` it draws the buckets and signs of the BK coordinates, builds their [BK, BN] of S
by comparison (0 and ±1, exact in any dtype), and multiplies. The accumulators are registers and the stretches are added
in a fixed order, so there is no atomic addition and two runs give the same bits.

That is ``2·B·D·k·nnz`` operations where a scatter needs ``2·B·D·nnz``: beside one read of x it costs little up to a few
hundred buckets and is hopeless for thousands. Triton cannot scatter into on-chip memory, so with more buckets than
``LARGEST_K`` the op is left to the CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import philox
from .configs import Config, Table, all_configs, lookup
from .fixed_order import is_aligned, sum_launch
from .launch import Launch
from .philox import drawn_dot, sparse_draw
from .random_projection import depth_splits, split_steps
from .tiles import dtype_name, kind_of

__all__ = ["LARGEST_K", "LARGEST_NNZ", "aot_cases", "sparse_launches"]

LARGEST_K = 1024
LARGEST_NNZ = 8


def _config(bm: int, bn: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk}, warps, stages)


# Kinds: half precision on aligned rows or not, float32 by its precision. Chosen by what compiles without spills; not
# measured yet.
_SMALL = {
    "half": _config(32, 128, 64, 4, 3),
    "half odd": _config(32, 128, 32, 4, 2),
    "ieee": _config(32, 64, 16, 4, 2),
    "tf32": _config(32, 128, 32, 4, 2),
    "tf32x3": _config(32, 64, 16, 4, 2),
}
CONFIGS: Table = {"default": _SMALL, "sm_90": {"half": _config(32, 128, 64, 8, 3)}}


@triton.jit(do_not_specialize=["seed_low", "seed_high", "buckets"])
def sparse_kernel(
    x, out, x_row, x_col, batch, d, k, column_tiles, steps, nnz, buckets, seed_low, seed_high, factor,
    STREAM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[split] = factor · x[:, stretch] @ S[stretch]``; out contiguous [splits, B, k], ``buckets`` is k again."""
    m = tl.program_id(0) // column_tiles
    n = tl.program_id(0) % column_tiles
    split = tl.program_id(1)
    row = m * BM + tl.arange(0, BM)
    column = n * BN + tl.arange(0, BN)
    first = split.to(tl.int64) * steps * BK
    left = d - first
    start = x + row.to(tl.int64)[:, None] * x_row + first * x_col
    total = tl.zeros((BM, BN), tl.float32)
    # The non-zeros of a coordinate one after the other, x from the cache: all at once they do not fit the registers.
    for step in range(0, steps * nnz):
        inner = (step // nnz) * BK + tl.arange(0, BK)
        values = tl.load(
            start + inner.to(tl.int64)[None, :] * x_col, mask=(row < batch)[:, None] & (inner < left)[None, :], other=0
        )
        bucket, negative = sparse_draw(first + inner, step % nnz, buckets, seed_low, seed_high, STREAM)
        one = tl.where(negative == 1, -1.0, 1.0)
        S = tl.where(bucket.to(tl.int32)[:, None] == column[None, :], one[:, None], 0.0)
        total = drawn_dot(values, S.to(x.dtype.element_ty), total, True, PRECISION)
    at = out + (split.to(tl.int64) * batch + row.to(tl.int64)[:, None]) * k + column[None, :]
    tl.store(at, total * factor, mask=(row < batch)[:, None] & (column < k)[None, :])


def sparse_launches(
    x: torch.Tensor,
    k: int,
    seed: int,
    nnz: int,
    out: torch.Tensor,
    workspace: Any,
    family: str,
    precision: str = "ieee",
    config: Config | None = None,
) -> list[Launch]:
    """``out = x S / √nnz``: out contiguous float32 ``[B, k]``; ``workspace(n)`` returns n uninitialised float32."""
    batch, d = x.shape
    if not out.numel():
        return []
    if config is None:
        kind = kind_of(x.dtype, precision)
        config = lookup(CONFIGS, family, "half odd" if kind == "half" and not is_aligned(x) else kind)
    constants = {**config.constants, "BN": min(config.constants["BN"], max(16, triton.next_power_of_2(k)))}
    column_tiles = triton.cdiv(k, constants["BN"])
    tiles = triton.cdiv(batch, constants["BM"]) * column_tiles
    splits = depth_splits(d, tiles)
    steps = split_steps(d, splits, constants["BK"])
    factor = nnz**-0.5
    target = out if splits == 1 else workspace(splits * batch * k).view(splits, batch, k)
    seed_low, seed_high = philox.key(seed)
    arguments = {
        "x": x, "out": target, "x_row": x.stride(0), "x_col": x.stride(1), "batch": batch, "d": d, "k": k,
        "column_tiles": column_tiles, "steps": steps, "nnz": nnz, "buckets": k,
        "seed_low": seed_low, "seed_high": seed_high,
        "factor": factor if splits == 1 else 1.0,
    }  # fmt: skip
    constants |= {"STREAM": philox.STREAM_PROJECTION, "PRECISION": precision}
    launch = Launch(sparse_kernel, (tiles, splits), arguments, constants, config.num_warps, config.num_stages)
    return [launch] if splits == 1 else [launch, sum_launch(target, out, factor)]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype for one non-zero a coordinate; several of them for bfloat16."""
    for kind, config in all_configs(CONFIGS, arch):
        half, odd = kind.startswith("half"), "odd" in kind
        precision = "ieee" if half else kind
        claims = {"tensor_cores": "none" if kind == "ieee" else "HMMA|HGMMA"}
        if not odd:
            claims["async_copies"] = "LDGSTS"
        for dtype in (torch.bfloat16, torch.float16)[: 2 - odd] if half else (torch.float32,):
            for nnz in (1, 4) if dtype == torch.bfloat16 else (1,):
                x, out = _meta(32, (1 << 20) - odd, dtype=dtype), _meta(32, 512)
                launches = sparse_launches(x, 512, 3, nnz, out, _meta, arch, precision, config)
                yield f"{dtype_name(dtype)}-{kind.replace(' ', '-')}-nnz{nnz}", launches[0], claims
