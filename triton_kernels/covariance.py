"""``C += Xᵀ diag(mask) X``: exactly the n(n+1)/2 tiles of the lower triangle; bias column and mask in the loader.

The triangle is walked in bands of a few rows of tiles, so that programs that run together share operands. Where its
tiles alone would leave most of the card idle the tokens are cut into runs; each run writes its tiles to a workspace,
and a second launch adds them to C in a fixed order. No atomics: the same bits twice. The column of ones of a bias is
never read: programs on the diagonal also sum the tokens that pass through them.

Rows of x start at multiples of 16 elements and are read up to one (``read``), so that they come in 16-byte pieces: what
lies beyond the last column only reaches results that are never stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, Table, all_configs, family_of, lookup
from .launch import Launch
from .tiles import MULTIPROCESSORS, dtype_name

__all__ = ["CONFIGS", "aot_cases", "candidates", "choose", "launches", "splits_of", "tiles_of", "triangle_tile"]


@triton.jit
def _row_of(index):
    """The row of the index-th cell of a lower triangle, row by row: a root, put right by one where it rounded."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def triangle_tile(index, n, BAND: tl.constexpr):
    """Row and column (column ≤ row) of the index-th of n(n+1)/2 tiles, BAND rows at a time, down each column first."""
    first = _row_of(index) // BAND * BAND
    height = min(n - first, BAND)
    inside = index - first * (first + 1) // 2
    square = height * first  # a band is a rectangle of tiles, and then a small triangle
    corner = tl.maximum(inside - square, 0)
    low = _row_of(corner)
    row = tl.where(inside < square, inside % height, low)
    column = tl.where(inside < square, inside // height, first + corner - low * (low + 1) // 2)
    return first + row, column


@triton.jit
def _gram(
    x, keep, row_offsets, column_offsets, read_rows, read_columns, length, x_row, MASKED: tl.constexpr,
    SUM: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ_t x_t[rows] x_t[columns]ᵀ``; with SUM also ``Σ_t x_t[columns]`` and the number of tokens counted."""
    token = tl.arange(0, BK)
    total = tl.zeros((BM, BM), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    count = tl.zeros((BK,), tl.int32)
    for t in range(0, length, BK):
        inside = token < length - t
        if MASKED:
            inside = inside & (tl.load(keep + t + token, mask=inside, other=0) != 0)
        left = tl.load(x + row_offsets, mask=read_rows[:, None] & inside[None, :], other=0.0)
        right = tl.load(x + column_offsets, mask=inside[:, None] & read_columns[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        if SUM:
            sums += tl.sum(right.to(tl.float32), axis=0)
            count += inside.to(tl.int32)
        x += BK * x_row
    return total, sums, tl.sum(count, axis=0)


@triton.jit
def covariance_kernel(
    C, partial, sums, x, mask, d, read, tokens, per_split, c_row, x_row, partial_split,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the triangle over one run of ``per_split`` tokens."""
    n = tl.cdiv(d, BM)
    i, j = triangle_tile(tl.program_id(0), n, BAND)
    split = tl.program_id(1)
    start = split.to(tl.int64) * per_split
    length = min(tokens - start, per_split).to(tl.int32)
    token = tl.arange(0, BK)
    rows = i * BM + tl.arange(0, BM)
    columns = j * BM + tl.arange(0, BM)
    at = x + start * x_row
    keep = mask + start if MASKED else mask
    row_offsets = rows[:, None] + token[None, :] * x_row
    column_offsets = token[:, None] * x_row + columns[None, :]
    if BIAS:
        # A loop of its own for the diagonal: the others need not hold their operands in registers.
        if i == j:
            total, ones, count = _gram(
                at, keep, row_offsets, column_offsets, rows < read, columns < read, length, x_row, MASKED, True, BM, BK,
                PRECISION,
            )  # fmt: skip
            into = sums + split.to(tl.int64) * (d + 1)
            tl.store(into + columns, ones, mask=columns < d)
            if i == 0:
                tl.store(into + d, count.to(tl.float32))
        else:
            total, ones, count = _gram(
                at, keep, row_offsets, column_offsets, rows < read, columns < read, length, x_row, MASKED, False, BM,
                BK, PRECISION,
            )  # fmt: skip
    else:
        total, ones, count = _gram(
            at, keep, row_offsets, column_offsets, rows < read, columns < read, length, x_row, MASKED, False, BM, BK,
            PRECISION,
        )  # fmt: skip
    if SPLIT:
        within = tl.arange(0, BM)
        into = partial + split.to(tl.int64) * partial_split + tl.program_id(0).to(tl.int64) * (BM * BM)
        tl.store(into + within[:, None] * BM + within[None, :], total)
    else:
        into = C + rows.to(tl.int64)[:, None] * c_row + columns[None, :]
        inside = (rows < d)[:, None] & (columns[None, :] <= rows[:, None])
        tl.store(into, tl.load(into, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def add_tiles_kernel(
    C, partial, d, splits, c_row, partial_split, BM: tl.constexpr, ROWS: tl.constexpr, BAND: tl.constexpr
):
    """``C += Σ_split partial[split]``, in the order of the splits; ROWS rows of one tile a program."""
    i, j = triangle_tile(tl.program_id(0), tl.cdiv(d, BM), BAND)
    within = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BM)
    part = partial + tl.program_id(0).to(tl.int64) * (BM * BM)
    total = tl.zeros((ROWS, BM), tl.float32)
    for _ in range(0, splits):
        total += tl.load(part + within[:, None] * BM + column[None, :])
        part += partial_split
    rows = i * BM + within
    columns = j * BM + column
    into = C + rows.to(tl.int64)[:, None] * c_row + columns[None, :]
    inside = (rows < d)[:, None] & (columns[None, :] <= rows[:, None])
    tl.store(into, tl.load(into, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def add_sums_kernel(row, sums, d, splits, BN: tl.constexpr):
    """The bias row: ``row [d+1] += Σ_split sums[split]``, in the order of the splits."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = columns <= d
    total = tl.zeros((BN,), tl.float32)
    part = sums
    for _ in range(0, splits):
        total += tl.load(part + columns, mask=inside, other=0.0)
        part += d + 1
    into = row + columns
    tl.store(into, tl.load(into, mask=inside, other=0.0) + total, mask=inside)


def _tile(bm: int, bk: int, warps: int, stages: int, band: int = 8) -> Config:
    return Config({"BM": bm, "BK": bk, "BAND": band}, warps, stages)


_SMALL_SHARED = {
    "half": _tile(128, 32, 8, 4),
    "half_small": _tile(64, 32, 4, 4),
    "ieee": _tile(64, 16, 8, 2),
    "tf32": _tile(64, 32, 4, 3),
    "tf32x3": _tile(64, 16, 8, 2),
}
CONFIGS: Table = {
    "default": _SMALL_SHARED,
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "sm_80": {**_SMALL_SHARED, "half": _tile(128, 64, 8, 3), "half_small": _tile(64, 64, 4, 3)},
    "sm_90": {**_SMALL_SHARED, "half": _tile(128, 64, 8, 4), "half_small": _tile(64, 64, 4, 4)},
}
"""Kinds: half precision; the same for at most 256 columns, where tiles of 128 would be half empty; float32 by its
precision. Chosen by what compiles without spills; not measured yet."""

_ADD_ROWS = 8
_SUMS = 512
_SMALL = 256
_FEWEST_TOKENS = 512  # of a run: a workspace tile is written and read once for them


def choose(d: int, dtype: torch.dtype, precision: str, family: str) -> Config:
    """The configuration for these sizes."""
    if dtype == torch.float32:
        return lookup(CONFIGS, family, precision)
    return lookup(CONFIGS, family, "half_small" if d <= _SMALL else "half")


def candidates(dtype: torch.dtype, precision: str, family: str) -> list[Config]:
    """What autotuning measures: the table's configurations for this dtype and precision."""
    wanted = precision if dtype == torch.float32 else "half"
    return [config for kind, config in all_configs(CONFIGS, family) if kind.split("_")[0] == wanted]


def tiles_of(d: int, config: Config) -> int:
    """How many tiles the triangle has."""
    n = triton.cdiv(d, config.constants["BM"])
    return n * (n + 1) // 2


def splits_of(d: int, tokens: int, config: Config, family: str) -> int:
    """Into how many runs the tokens are cut: enough to fill the card about twice, each of 512 tokens or more."""
    enough = 2 * MULTIPROCESSORS.get(family, MULTIPROCESSORS["default"])
    wanted = min(enough // max(tiles_of(d, config), 1), tokens // _FEWEST_TOKENS)
    return triton.cdiv(tokens, _per_split(tokens, max(wanted, 1), config)) if tokens else 1  # none of them empty


def _per_split(tokens: int, splits: int, config: Config) -> int:
    bk = config.constants["BK"]
    return triton.cdiv(triton.cdiv(tokens, splits), bk) * bk


def launches(
    C: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    sums: Tensor | None = None,
    partial: Tensor | None = None,
    precision: str = "ieee",
    config: Config | None = None,
    family: str | None = None,
    read: int | None = None,
    columns: int | None = None,
) -> list[Launch]:
    """The lower triangle of ``C += Σ_t mask_t x_t x_tᵀ`` for ``x [N, d]``; C is float32, ``[d, d]`` without a bias.

    With a bias C is ``[d+1, d+1]`` and ``sums`` is float32 ``[splits, d+1]``, otherwise None. ``partial`` is float32
    ``[splits, tiles, BM, BM]``, or None for one run. ``mask`` is uint8 ``[N]``. ``read`` (default: d) says up to which
    column the rows of x may be read; the gate compiles multiples of 16, for it and for the row stride. ``columns`` is d
    where x has more. The columns of C and x are next to each other in memory.
    """
    tokens, d = x.shape[0], columns or x.shape[1]
    family = family or family_of(C.device)
    config = config or choose(d, x.dtype, precision, family)
    splits = 1 if partial is None else partial.shape[0]
    shared = {"BM": config.constants["BM"], "BAND": config.constants["BAND"]}
    c_row, tiles = C.stride(0), tiles_of(d, config)
    partial_split = 0 if partial is None else partial.stride(0)
    arguments = {
        "C": C, "partial": partial, "sums": sums, "x": x, "mask": mask, "d": d, "read": read or d, "tokens": tokens,
        "per_split": _per_split(tokens, splits, config), "c_row": c_row, "x_row": x.stride(0),
        "partial_split": partial_split,
    }  # fmt: skip
    constants = {
        "SPLIT": partial is not None, "BIAS": sums is not None, "MASKED": mask is not None, **config.constants,
        "PRECISION": precision,
    }  # fmt: skip
    made = [Launch(covariance_kernel, (tiles, splits), arguments, constants, config.num_warps, config.num_stages)]
    if partial is not None:
        arguments = {
            "C": C,
            "partial": partial,
            "d": d,
            "splits": splits,
            "c_row": c_row,
            "partial_split": partial_split,
        }
        made.append(
            Launch(add_tiles_kernel, (tiles, shared["BM"] // _ADD_ROWS), arguments, {**shared, "ROWS": _ADD_ROWS}, 4, 2)
        )
    if sums is not None:
        arguments = {"row": C[d], "sums": sums, "d": d, "splits": splits}
        made.append(Launch(add_sums_kernel, (triton.cdiv(d + 1, _SUMS),), arguments, {"BN": _SUMS}, 4, 2))
    return made


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, Mapping[str, Any]]]:
    """Every configuration and dtype plain; masked, with a bias and in runs, d odd and x with padded rows; the sums."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for kind, config in all_configs(CONFIGS, arch):
        half = kind.startswith("half")
        precision = "ieee" if half else kind
        cores = "none" if kind == "ieee" else "HGMMA" if arch == "sm_90" else "HMMA"
        claims = {"tensor_cores": cores, "async_copies": "LDGSTS"}
        for dtype in (torch.bfloat16, torch.float16) if half else (torch.float32,):
            x = meta(16384, 4096, dtype=dtype)
            [launch] = launches(meta(4096, 4096), x, None, None, None, precision, config, arch)
            yield f"{dtype_name(dtype)}-{kind}", launch, claims
        x, mask = meta(16384, 784, dtype=dtype), meta(16384, dtype=torch.uint8)
        size = config.constants["BM"]
        partial, sums = meta(4, tiles_of(771, config), size, size), meta(4, 772)
        made = launches(meta(772, 772), x, mask, sums, partial, precision, config, arch, 784, 771)
        yield f"{dtype_name(dtype)}-{kind}-masked-bias-split", made[0], claims
        if kind in ("half", "half_small"):
            yield f"add-tiles-{size}", made[1], {"tensor_cores": "none"}
    yield "add-sums", made[2], {"tensor_cores": "none"}
