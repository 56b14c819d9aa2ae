"""One pass of the range finder over ``M_q = (x_qᵀ y_q) / (Lam + damping)``, which is never written.

``x`` and ``y`` are a query's rotated output gradients and inputs, T rows each. A program holds BM rows of ``M_q Ω``: it
forms one tile of ``M_q`` from the T rows, divides it, and multiplies it with the tile's rows of Ω at once. The
transposed pass ``M_qᵀ Z`` is the same kernel with x and y exchanged and Lam transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, all_configs, family_of, lookup
from .launch import Launch
from .philox import key, normal_tile
from .tiles import MULTIPROCESSORS, dtype_name, kind_of, tile_product

__all__ = ["CONFIGS", "STREAM_SKETCH", "aot_cases", "choose", "normal_matrix", "sketch", "splits_of", "widths"]

STREAM_SKETCH = 3
"""The Philox stream of the test matrix, that of pyinf.ops.reference."""


@triton.jit
def sketch_kernel(
    out, energy, x, y, offsets, Lam, omega, rows, columns, width, splits, out_split, out_query, out_row,
    x_token, x_column, y_token, y_column, lam_row, lam_column, omega_query, omega_row, damping,
    ENERGY: tl.constexpr, WA: tl.constexpr, WB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[split, q] = M_q Ω_q`` over every ``splits``-th tile of columns; with ENERGY also ``energy[split, q, tile] =
    Σ M²`` of these rows. The ``width`` columns of Ω are cut into WA and WB: 80 of them take 64 + 16, not 128.
    """
    row_tiles = tl.cdiv(rows, BM)
    m = tl.program_id(0) % row_tiles
    split = (tl.program_id(0) // row_tiles) % splits
    query = tl.program_id(0) // (row_tiles * splits)
    q = query.to(tl.int64)
    start = tl.load(offsets + q)
    tokens = (tl.load(offsets + q + 1) - start).to(tl.int32)
    first_row = m.to(tl.int64) * BM
    x += start * x_token + first_row * x_column
    y += start * y_token
    Lam += first_row * lam_row
    omega += q * omega_query
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    wa = tl.arange(0, WA)
    row_mask = r < rows - m * BM
    total_a = tl.zeros((BM, WA), tl.float32)
    if WB > 0:
        wb = WA + tl.arange(0, WB)
        total_b = tl.zeros((BM, WB), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    for n in range(split, tl.cdiv(columns, BN), splits):
        column = n * tl.full((), BN, tl.int64)  # a loop variable is a plain integer in the interpreter
        column_mask = c < columns - n * BN
        mask = row_mask[:, None] & column_mask[None, :]
        at = Lam + column * lam_column
        factor = tl.load(at + r[:, None] * lam_row + c[None, :] * lam_column, mask=mask, other=1.0).to(tl.float32)
        tile = tile_product(
            tl.zeros((BM, BN), tl.float32), x, y + column * y_column, r * x_column, c * y_column, row_mask,
            column_mask, tokens, x_token, y_token, BK, PRECISION,
        )  # fmt: skip
        tile = tl.where(mask, tile / (factor + damping), 0.0)
        if ENERGY:
            squares += tl.sum(tile * tile, axis=1)
        tile = tile.to(omega.dtype.element_ty)
        at = omega + column * omega_row
        test = tl.load(
            at + c[:, None] * omega_row + wa[None, :], mask=column_mask[:, None] & (wa < width)[None, :], other=0.0
        )
        total_a = tl.dot(tile, test, total_a, input_precision=PRECISION)
        if WB > 0:
            test = tl.load(
                at + c[:, None] * omega_row + wb[None, :], mask=column_mask[:, None] & (wb < width)[None, :], other=0.0
            )
            total_b = tl.dot(tile, test, total_b, input_precision=PRECISION)
    at = out + split.to(tl.int64) * out_split + q * out_query + first_row * out_row
    tl.store(at + r[:, None] * out_row + wa[None, :], total_a, mask=row_mask[:, None] & (wa < width)[None, :])
    if WB > 0:
        tl.store(at + r[:, None] * out_row + wb[None, :], total_b, mask=row_mask[:, None] & (wb < width)[None, :])
    if ENERGY:
        queries = tl.num_programs(0) // (row_tiles * splits)
        tl.store(energy + (split.to(tl.int64) * queries + q) * row_tiles + m, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def normal_kernel(
    out, rows, columns, out_row, seed_low, seed_high, STREAM: tl.constexpr, R: tl.constexpr, K: tl.constexpr
):
    """Fills ``out [rows, columns]`` with the standard normal matrix of a seed and a stream."""
    r = tl.program_id(0) * R + tl.arange(0, R).to(tl.int64)
    first = tl.program_id(1) * K
    c = first + tl.arange(0, K)
    tile = normal_tile(r, first, seed_low, seed_high, STREAM, K, tl.float32)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(out + r[:, None] * out_row + c[None, :], tile.to(out.dtype.element_ty), mask=mask)


def _tile(bm: int, bn: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk}, warps, stages)


_SMALL_SHARED = {
    "half": _tile(64, 64, 32, 8, 3),
    "half_wide": _tile(64, 32, 32, 8, 3),
    "ieee": _tile(32, 32, 16, 8, 2),
    "ieee_wide": _tile(32, 32, 16, 8, 2),
    "tf32": _tile(64, 64, 32, 8, 2),
    "tf32_wide": _tile(64, 32, 32, 8, 2),
    "tf32x3": _tile(64, 32, 16, 8, 2),
    "tf32x3_wide": _tile(64, 16, 16, 8, 2),
}
CONFIGS: Mapping[str, Mapping[str, Config]] = {
    "default": _SMALL_SHARED,
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "sm_80": {**_SMALL_SHARED, "half": _tile(64, 64, 64, 8, 3)},
    "sm_90": {
        **_SMALL_SHARED,
        "half": _tile(128, 64, 64, 8, 3),
        "half_wide": _tile(64, 64, 64, 8, 3),
    },
    "default old": {"tf32x3": _tile(32, 32, 16, 8, 2)},
    "sm_90 old": {"half": _tile(128, 64, 32, 8, 3), "half_wide": _tile(128, 32, 32, 8, 3)},
}
"""Kinds: half precision, float32 by its precision; "_wide" for sketches of more than 80 columns. Chosen by what
compiles without spills; not measured yet."""

WIDEST = 144
"""The widest sketch that stays in registers (a rank of 128 and what is drawn beyond it)."""


def widths(width: int) -> tuple[int, int]:
    """(WA, WB): powers of two of at least 16 (WB may be 0) whose sum holds ``width`` and is the least possible."""
    one = max(16, triton.next_power_of_2(width))
    pairs = [(one, 0)]
    if one > 32:
        rest = width - one // 2
        pairs.append((one // 2, max(16, triton.next_power_of_2(rest))))
    return min(pairs, key=lambda pair: (sum(pair), pair[1]))


def choose(width: int, dtype: torch.dtype, precision: str, family: str) -> Config:
    """The configuration of a pass."""
    return lookup(CONFIGS, family, kind_of(dtype, precision) + ("_wide" if width > 80 else ""))


def splits_of(rows: int, columns: int, queries: int, config: Config, family: str) -> int:
    """Splits of the columns: as many as fill the card twice over, of at least four tiles each."""
    programs = triton.cdiv(rows, config.constants["BM"]) * queries
    wanted = 2 * MULTIPROCESSORS.get(family, MULTIPROCESSORS["default"])
    most = max(1, triton.cdiv(columns, 4 * config.constants["BN"]))
    return max(1, min(most, triton.cdiv(wanted, max(programs, 1))))


def normal_matrix(out: Tensor, seed: int) -> list[Launch]:
    """Fills ``out [n, w]`` (rows contiguous, any float dtype) with the standard normal test matrix of ``seed``."""
    rows, columns = out.shape
    low, high = key(seed)
    arguments = {
        "out": out, "rows": rows, "columns": columns, "out_row": out.stride(0), "seed_low": low, "seed_high": high,
    }  # fmt: skip
    constants = {"STREAM": STREAM_SKETCH, "R": 32, "K": 64}
    return [Launch(normal_kernel, (triton.cdiv(rows, 32), triton.cdiv(columns, 64)), arguments, constants, 4, 1)]


def sketch(
    out: Tensor,
    energy: Tensor | None,
    x: Tensor,
    y: Tensor,
    offsets: Tensor,
    Lam: Tensor,
    omega: Tensor,
    damping: float,
    precision: str = "ieee",
    config: Config | None = None,
) -> list[Launch]:
    """``out[s, q]``, whose sum over s is ``M_q Ω_q`` with ``M_q = (x_qᵀ y_q) / (Lam + damping)``.

    out ``[splits, Q, m, w]`` float32; energy None or ``[splits, Q, ⌈m/BM⌉]`` float32, whose sum over splits and
    tiles is ``‖M_q‖²``; x ``[N, m]`` and y ``[N, n]``; Lam ``[m, n]``; omega ``[Q, n, w]`` (rows contiguous,
    one matrix for all queries when expanded) in the dtype of x and y; w at most :data:`WIDEST`.
    """
    splits, queries, rows, width = out.shape
    columns = y.shape[1]
    if config is None:
        config = choose(width, x.dtype, precision, family_of(x.device))
    wa, wb = widths(width)
    arguments = {
        "out": out, "energy": energy, "x": x, "y": y, "offsets": offsets, "Lam": Lam, "omega": omega, "rows": rows,
        "columns": columns, "width": width, "splits": splits, "out_split": out.stride(0), "out_query": out.stride(1),
        "out_row": out.stride(2), "x_token": x.stride(0), "x_column": x.stride(1), "y_token": y.stride(0),
        "y_column": y.stride(1), "lam_row": Lam.stride(0), "lam_column": Lam.stride(1),
        "omega_query": omega.stride(0), "omega_row": omega.stride(1), "damping": float(damping),
    }  # fmt: skip
    constants = {"ENERGY": energy is not None, "WA": wa, "WB": wb, **config.constants, "PRECISION": precision}
    grid = (triton.cdiv(rows, config.constants["BM"]) * splits * queries,)
    return [Launch(sketch_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype: the first pass (with the energy) at a rank of 64, the transposed one, the
    narrowest and the widest sketch (all sizes are multiples of 16: the wrapper pads).
    """
    offsets = _meta(3, dtype=torch.int64)
    for kind, config in all_configs(CONFIGS, arch):
        half, wide = kind.startswith("half"), kind.endswith("_wide")
        precision = "ieee" if half else kind.removesuffix("_wide")
        tensor_cores = "none" if precision == "ieee" and not half else "HMMA|HGMMA"
        if half and arch == "sm_90":
            tensor_cores = "HGMMA"
        claims = {"tensor_cores": tensor_cores, "async_copies": "LDGSTS"}
        for dtype in (torch.bfloat16, torch.float16) if half else (torch.float32,):
            x, y, Lam = _meta(256, 4096, dtype=dtype), _meta(256, 14336, dtype=dtype), _meta(4096, 14336)

            def passes(width: int, transposed: bool, x=x, y=y, Lam=Lam, config=config, precision=precision) -> Launch:
                left, right, lam = (y, x, Lam.mT) if transposed else (x, y, Lam)
                omega, out = _meta(2, lam.shape[1], width, dtype=left.dtype), _meta(2, 2, lam.shape[0], width)
                energy = None if transposed else _meta(2, 2, triton.cdiv(lam.shape[0], config.constants["BM"]))
                return sketch(out, energy, left, right, offsets, lam, omega, 0.1, precision, config)[0]

            name = f"{dtype_name(dtype)}-{kind}"
            yield f"{name}-first", passes(144 if wide else 80, False), claims
            if dtype == torch.float16:
                continue  # the rest is the same instructions as for bfloat16
            yield f"{name}-transposed", passes(144 if wide else 80, True), claims
            yield f"{name}-narrow", passes(96 if wide else 16, False), claims
    [launch] = normal_matrix(_meta(14336, 80, dtype=torch.bfloat16), 1)
    yield "normal", launch, {"tensor_cores": "none"}
    # Sizes of one, which Triton makes constants of.
    one, x, config = _meta(2, dtype=torch.int64), _meta(1, 16), lookup(CONFIGS, arch, "ieee")
    found = sketch(_meta(1, 1, 16, 16), _meta(1, 1, 1), x, x, one, _meta(16, 16), _meta(1, 16, 16), 0.1, "ieee", config)
    yield "single", found[0], {"tensor_cores": "none"}
