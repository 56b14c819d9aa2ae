"""``x P / √k`` for flat gradients, ``P [D, k]`` of signs or Gaussians that is never stored: drawn tile by tile.

A program owns a [BM, BN] tile of the result over one stretch of the D coordinates: it loads [BM, BK] of x, draws [BK,
BN] of P from the counters (one Philox call gives the 128 signs of a row of the tile) and multiplies on the tensor
cores. The stretches' partial results are added by a second kernel in a fixed order.
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
from .philox import draw_tile, drawn_dot
from .tiles import dtype_name, kind_of

__all__ = ["aot_cases", "depth_splits", "random_launches", "split_steps"]

_BLOCKS = 264  # programs that fill a large card twice
_LONGEST = 1 << 30  # coordinates of one stretch: offsets inside it are 32 bits


def _config(bm: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BM": bm, "BK": bk}, warps, stages)


# Kinds: up to 32 rows of x or more, half precision on aligned rows or not, float32 by its precision. Chosen by what
# compiles without spills; not measured yet.
_SMALL = {
    "half few": _config(32, 64, 8, 3),
    "half many": _config(128, 32, 8, 3),
    "half odd few": _config(32, 32, 4, 2),
    "half odd many": _config(64, 32, 8, 2),
    "ieee few": _config(32, 16, 4, 2),
    "ieee many": _config(64, 16, 8, 2),
    "tf32 few": _config(32, 32, 4, 2),
    "tf32 many": _config(64, 32, 8, 2),
    "tf32x3 few": _config(32, 16, 4, 2),
    "tf32x3 many": _config(64, 16, 8, 2),
}
CONFIGS: Table = {
    "default": _SMALL,
    "sm_90": {"half few": _config(32, 64, 8, 4), "half many": _config(128, 64, 8, 4)},
}


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def random_kernel(
    x, out, x_row, x_col, batch, d, k, column_tiles, steps, seed_low, seed_high, factor,
    STREAM: tl.constexpr, NORMAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[split] = factor · x[:, stretch] @ P[stretch]``; out is contiguous [splits, B, k]."""
    m = tl.program_id(0) // column_tiles
    n = tl.program_id(0) % column_tiles  # neighbours read the same x
    split = tl.program_id(1)
    row = m * BM + tl.arange(0, BM)
    column = n * BN + tl.arange(0, BN)
    first = split.to(tl.int64) * steps * BK
    left = d - first
    start = x + row.to(tl.int64)[:, None] * x_row + first * x_col
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, steps):
        inner = step * BK + tl.arange(0, BK)
        values = tl.load(
            start + inner.to(tl.int64)[None, :] * x_col, mask=(row < batch)[:, None] & (inner < left)[None, :], other=0
        )
        P = draw_tile(first + inner, n * BN, seed_low, seed_high, STREAM, BN, NORMAL, x.dtype.element_ty)
        total = drawn_dot(values, P, total, not NORMAL, PRECISION)
    at = out + (split.to(tl.int64) * batch + row.to(tl.int64)[:, None]) * k + column[None, :]
    tl.store(at, total * factor, mask=(row < batch)[:, None] & (column < k)[None, :])


def depth_splits(d: int, tiles: int, least: int = 4096) -> int:
    """Stretches of the D coordinates: enough programs to fill a card, none shorter than ``least`` coordinates."""
    return max(1, min(-(-_BLOCKS // max(tiles, 1)), d // least), -(-d // _LONGEST))


def split_steps(d: int, splits: int, block: int) -> int:
    """Steps of ``block`` coordinates in a stretch."""
    return max(1, -(-d // (splits * block)))


def choose(x: torch.Tensor, family: str, precision: str) -> Config:
    """The configuration for an input."""
    kind = kind_of(x.dtype, precision)
    if kind == "half" and not is_aligned(x):
        kind = "half odd"
    return lookup(CONFIGS, family, f"{kind} {'few' if x.shape[0] <= 32 else 'many'}")


def random_launches(
    x: torch.Tensor,
    k: int,
    seed: int,
    distribution: str,
    out: torch.Tensor,
    workspace: Any,
    family: str,
    precision: str = "ieee",
    config: Config | None = None,
) -> list[Launch]:
    """``out = x P / √k``: out contiguous float32 ``[B, k]``; ``workspace(n)`` returns n uninitialised float32."""
    batch, d = x.shape
    if not out.numel():
        return []
    config = config or choose(x, family, precision)
    width = 128 if k > 64 else max(16, triton.next_power_of_2(k))
    column_tiles = triton.cdiv(k, width)
    tiles = triton.cdiv(batch, config.constants["BM"]) * column_tiles
    splits = depth_splits(d, tiles)
    steps = split_steps(d, splits, config.constants["BK"])
    factor = k**-0.5
    target = out if splits == 1 else workspace(splits * batch * k).view(splits, batch, k)
    seed_low, seed_high = philox.key(seed)
    arguments = {
        "x": x, "out": target, "x_row": x.stride(0), "x_col": x.stride(1), "batch": batch, "d": d, "k": k,
        "column_tiles": column_tiles, "steps": steps, "seed_low": seed_low, "seed_high": seed_high,
        "factor": factor if splits == 1 else 1.0,
    }  # fmt: skip
    constants = {
        "STREAM": philox.STREAM_PROJECTION, "NORMAL": distribution == "normal", "BN": width, **config.constants,
        "PRECISION": precision,
    }  # fmt: skip
    launch = Launch(random_kernel, (tiles, splits), arguments, constants, config.num_warps, config.num_stages)
    return [launch] if splits == 1 else [launch, sum_launch(target, out, factor)]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype with signs; Gaussians and few columns for bfloat16."""
    for kind, config in all_configs(CONFIGS, arch):
        half, odd = kind.startswith("half"), "odd" in kind
        precision = "ieee" if half else kind.split()[0]
        claims = {"tensor_cores": "none" if precision == "ieee" and not half else "HMMA|HGMMA"}
        if not odd:
            claims["async_copies"] = "LDGSTS"
        batch, d = (8 if "few" in kind else 256), (1 << 20) - odd
        for dtype in (torch.bfloat16, torch.float16)[: 2 - odd] if half else (torch.float32,):
            name = f"{dtype_name(dtype)}-{kind.replace(' ', '-')}"
            for columns, distribution in ((4096, "rademacher"), (4096, "normal"), (48, "rademacher")):
                if (dtype != torch.bfloat16 or odd) and (columns, distribution) != (4096, "rademacher"):
                    continue
                x, out = _meta(batch, d, dtype=dtype), _meta(batch, columns)
                launches = random_launches(x, columns, 3, distribution, out, _meta, arch, precision, config)
                yield f"{name}-{distribution}-{columns}", launches[0], claims
