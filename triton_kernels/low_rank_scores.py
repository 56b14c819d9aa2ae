"""Scores against factored queries: both skinny products of a tile, their elementwise product and its sums, on chip.

A program holds BM tokens and the columns (q, j) of BN/RB queries: RB columns of each at a time, so that a rank that
is no power of two wastes at most a part of RB. It forms ``a Rᵀ`` and ``g L`` for them in registers, multiplies, and
sums over j; what leaves is one number for a token (per token) or for a sequence that the tile touches.

Up to three layers that share their input are one launch: the tile of ``a`` is then read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, all_configs, family_of, lookup
from .launch import Launch
from .tiles import (
    MULTIPROCESSORS,
    dtype_name,
    kind_of,
    segment_sums,
    split_sums,
    tile_of,
    tile_product,
    token_tile_sequences,
)

__all__ = ["CONFIGS", "MAX_LAYERS", "aot_cases", "can_share", "choose", "launches", "partial_shape", "rank_block"]

MAX_LAYERS = 3


@triton.jit
def _input_product(
    s0, s1, s2, a, R0, R1, R2, a_rows, R_columns, row_mask, column_mask, d_in, a_column,
    LAYERS: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``s_l += a R_lᵀ`` for every layer, each piece of ``a`` loaded once."""
    inner = tl.arange(0, BK)
    a_offsets = a_rows[:, None] + inner[None, :] * a_column
    R_offsets = inner[:, None] + R_columns[None, :]
    for start in range(0, d_in, BK):
        left = tl.load(a + a_offsets, mask=row_mask[:, None] & (inner < d_in - start)[None, :], other=0.0)
        mask = column_mask[None, :] & (inner < d_in - start)[:, None]
        s0 = tl.dot(left, tl.load(R0 + R_offsets, mask=mask, other=0.0), s0, input_precision=PRECISION)
        R0 += BK
        if LAYERS > 1:
            s1 = tl.dot(left, tl.load(R1 + R_offsets, mask=mask, other=0.0), s1, input_precision=PRECISION)
            R1 += BK
        if LAYERS > 2:
            s2 = tl.dot(left, tl.load(R2 + R_offsets, mask=mask, other=0.0), s2, input_precision=PRECISION)
            R2 += BK
        a += BK * a_column
    return s0, s1, s2


@triton.jit
def _output_product(
    g, L, query, part, query_lane, rank_lane, rows, row_mask, column_mask, d_out, g_row, g_column, L_out, L_rank,
    RANK: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``g L`` for the columns of this tile."""
    return tile_product(
        tl.zeros((BM, BN), tl.float32), g, L + query * d_out * RANK + part * RB * L_rank, rows * g_row,
        query_lane * (d_out * RANK) + rank_lane * L_rank, row_mask, column_mask, d_out, g_column, L_out, BK, PRECISION,
    )  # fmt: skip


@triton.jit
def low_rank_kernel(
    out, a, offsets, tokens, queries, sequences, steps, d_in, a_row, a_column, out_query, out_token,
    g0, L0, R0, d_out0, g0_row, g0_column, L0_out, L0_rank,
    g1, L1, R1, d_out1, g1_row, g1_column, L1_out, L1_rank,
    g2, L2, R2, d_out2, g2_row, g2_column, L2_out, L2_rank,
    LAYERS: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, PER_TOKEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Σ_l Σ_j (g_l·L_lqj)(R_lqj·a)`` of BM tokens and BN/RB queries: added to ``out [Q, N]`` per token, or summed
    over each sequence into a row of ``out [tiles + B, Q]``.
    """
    BQ: tl.constexpr = BN // RB
    PARTS: tl.constexpr = (RANK + RB - 1) // RB
    m, n = tile_of(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(queries, BQ), GROUP)
    rows = tl.arange(0, BM)
    row_mask = rows < tokens - m * BM
    first = m.to(tl.int64) * BM
    lane = tl.arange(0, BN)
    query_lane = lane // RB
    rank_lane = lane % RB
    query = n.to(tl.int64) * BQ
    sums = tl.zeros((BM, BQ), tl.float32)
    for part in range(0, PARTS):
        column_mask = query_lane < queries - n * BQ
        if RANK % RB != 0:
            column_mask = column_mask & (part * RB + rank_lane < RANK)
        zeros = tl.zeros((BM, BN), tl.float32)
        at = (query * RANK + part * RB) * d_in
        s0, s1, s2 = _input_product(
            zeros, zeros, zeros, a + first * a_row, R0 + at, R0 + at if LAYERS < 2 else R1 + at,
            R0 + at if LAYERS < 3 else R2 + at, rows * a_row, (query_lane * RANK + rank_lane) * d_in,
            row_mask, column_mask, d_in, a_column, LAYERS, BK, PRECISION,
        )  # fmt: skip
        both = s0 * _output_product(
            g0 + first * g0_row, L0, query, part, query_lane, rank_lane, rows, row_mask, column_mask, d_out0,
            g0_row, g0_column, L0_out, L0_rank, RANK, RB, BM, BN, BK, PRECISION,
        )  # fmt: skip
        if LAYERS > 1:
            both += s1 * _output_product(
                g1 + first * g1_row, L1, query, part, query_lane, rank_lane, rows, row_mask, column_mask, d_out1,
                g1_row, g1_column, L1_out, L1_rank, RANK, RB, BM, BN, BK, PRECISION,
            )  # fmt: skip
        if LAYERS > 2:
            both += s2 * _output_product(
                g2 + first * g2_row, L2, query, part, query_lane, rank_lane, rows, row_mask, column_mask, d_out2,
                g2_row, g2_column, L2_out, L2_rank, RANK, RB, BM, BN, BK, PRECISION,
            )  # fmt: skip
        sums += tl.sum(tl.reshape(both, (BM, BQ, RB)), axis=2)
    q = tl.arange(0, BQ)
    if PER_TOKEN:
        at = out + query * out_query + first * out_token
        at = at + rows.to(tl.int64)[:, None] * out_token + q.to(tl.int64)[None, :] * out_query
        mask = row_mask[:, None] & (q < queries - n * BQ)[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + sums, mask=mask)
    else:
        token_tile_sequences(out, sums, offsets, m, tokens, sequences, steps, n * BQ + q, queries, queries, BM)


def _tile(bm: int, bn: int, bk: int, warps: int, stages: int, group: int = 8) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": group}, warps, stages)


_SMALL_SHARED = {
    "half": _tile(128, 128, 32, 8, 3),
    "half_parts": _tile(64, 64, 32, 8, 3),
    "half_small": _tile(64, 64, 32, 4, 4),
    "half_shared": _tile(64, 64, 32, 8, 3),
    "ieee": _tile(64, 64, 16, 4, 2),
    "tf32": _tile(64, 64, 32, 4, 2),
    "tf32x3": _tile(64, 64, 16, 8, 2),
}
CONFIGS: Mapping[str, Mapping[str, Config]] = {
    "default": _SMALL_SHARED,
    "default old": {"ieee": _tile(64, 64, 16, 8, 2)},
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "sm_80": {
        **_SMALL_SHARED,
        "half": _tile(128, 128, 64, 8, 3),
        "half_parts": _tile(64, 128, 64, 8, 3),
        "half_small": _tile(64, 64, 64, 4, 4),
    },
    "sm_90": {
        **_SMALL_SHARED,
        "half": _tile(128, 128, 64, 8, 4),
        "half_parts": _tile(64, 128, 64, 8, 4),
        "half_small": _tile(64, 64, 64, 4, 4),
        "half_shared": _tile(128, 64, 64, 8, 3),
    },
}
"""Kinds: half precision with large tiles and with several layers at a time (both for ranks of one block only: a loop
over blocks would spill), with tiles for any rank, large and small; float32 by its precision, one layer at a time (its
products are slow enough that a second read of ``a`` does not matter). Chosen by what compiles without spills; not
measured yet."""

_ONE_BLOCK = ("half", "half_shared")


def rank_block(rank: int, kind: str, config: Config) -> list[int]:
    """The blocks of columns of one query that a tile may be cut into: powers of two, up to the tile.

    BM·BN / block sums of queries must fit into registers beside the products: at most 512 of them. Empty where the
    configuration cannot serve the rank.
    """
    bm, bn = config.constants["BM"], config.constants["BN"]
    smallest = max(bm * bn // 512, min(8, triton.next_power_of_2(rank)))
    if kind in _ONE_BLOCK:
        smallest = max(smallest, triton.next_power_of_2(rank))
    return [1 << e for e in range(smallest.bit_length() - 1, bn.bit_length())]


def _cost(tokens: int, queries: int, rank: int, config: Config, block: int, processors: int) -> int:
    """Waves of programs × parts of a program × what a part takes: its products, and its operands' way on chip."""
    bm, bn = config.constants["BM"], config.constants["BN"]
    programs = triton.cdiv(tokens, bm) * triton.cdiv(queries, bn // block)
    return triton.cdiv(programs, processors) * triton.cdiv(rank, block) * (bm * bn + 64 * (bm + bn))


def can_share(rank: int, dtype: torch.dtype, family: str) -> bool:
    """Whether layers of this rank and dtype can be one launch."""
    return dtype != torch.float32 and bool(rank_block(rank, "half_shared", lookup(CONFIGS, family, "half_shared")))


def choose(
    tokens: int, queries: int, rank: int, layers: int, dtype: torch.dtype, precision: str, family: str
) -> tuple[Config, int]:
    """(configuration, rank block) of the least cost; the wider block where costs are equal."""
    kind = kind_of(dtype, precision)
    kinds = [kind] if kind != "half" else ["half_shared"] if layers > 1 else ["half", "half_parts", "half_small"]
    options = [(k, lookup(CONFIGS, family, k)) for k in kinds]
    pairs = [(config, block) for k, config in options for block in rank_block(rank, k, config)]
    processors = MULTIPROCESSORS.get(family, MULTIPROCESSORS["default"])
    return min(pairs, key=lambda p: (_cost(tokens, queries, rank, p[0], p[1], processors), -p[1]))


def partial_shape(tokens: int, sequences: int, queries: int, config: Config) -> tuple[int, int, int]:
    """The workspace of ``launches`` (float32) where scores are summed over sequences."""
    return 1, triton.cdiv(tokens, config.constants["BM"]) + sequences, queries


def launches(
    scores: Tensor,
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    a: Tensor,
    offsets: Tensor,
    partial: Tensor | None,
    precision: str = "ieee",
    config: Config | None = None,
    block: int | None = None,
    family: str | None = None,
) -> list[Launch]:
    """``scores += Σ_layers Σ_j (g·L_j)(R_j·a)``, per token ``[Q, N]`` where ``partial`` is None, else ``[Q, B]``.

    layers: up to three, in float32 one (g ``[N, d_out]``, L ``[Q, d_out, r]``, R ``[Q, r, d_in]``) with one input a
    ``[N, d_in]``; d_out may differ. L and R lie compact: R contiguous, L contiguous or with its last two dimensions
    exchanged. g and a may be strided. All in one dtype; scores and partial float32; offsets int64 ``[B+1]`` on the same
    device.
    """
    tokens, d_in = a.shape
    queries, _, rank = layers[0][1].shape
    sequences = offsets.shape[0] - 1
    if config is None or block is None:
        family = family or family_of(a.device)
        best = choose(tokens, queries, rank, len(layers), a.dtype, precision, family)
        config, block = config or best[0], block or best[1]
    bm, bn = config.constants["BM"], config.constants["BN"]
    arguments: dict[str, Any] = {
        "out": scores if partial is None else partial, "a": a, "offsets": offsets, "tokens": tokens,
        "queries": queries, "sequences": sequences, "steps": max(sequences, 1).bit_length(), "d_in": d_in,
        "a_row": a.stride(0), "a_column": a.stride(1),
        "out_query": scores.stride(0), "out_token": scores.stride(1),
    }  # fmt: skip
    for i in range(MAX_LAYERS):
        g, L, R = layers[i] if i < len(layers) else (None, None, None)
        arguments |= {
            f"g{i}": g, f"L{i}": L, f"R{i}": R, f"d_out{i}": None if g is None else g.shape[1],
            f"g{i}_row": None if g is None else g.stride(0), f"g{i}_column": None if g is None else g.stride(1),
            f"L{i}_out": None if L is None else L.stride(1), f"L{i}_rank": None if L is None else L.stride(2),
        }  # fmt: skip
    constants = {
        "LAYERS": len(layers), "RANK": rank, "RB": block, "PER_TOKEN": partial is None, **config.constants,
        "PRECISION": precision,
    }  # fmt: skip
    grid = (triton.cdiv(tokens, bm) * triton.cdiv(queries, bn // block),)
    first = Launch(low_rank_kernel, grid, arguments, constants, config.num_warps, config.num_stages)
    return [first] if partial is None else [first, segment_sums(scores, partial, offsets, bm)]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype: per sequence and per token, a rank of 64, and odd sizes (a rank of 40 and sizes
    that are multiples of 16, to which the wrapper pads); two and three layers at a time."""
    offsets, segments = _meta(9, dtype=torch.int64), {"tensor_cores": "none"}
    for kind, config in all_configs(CONFIGS, arch):
        half = kind.startswith("half")
        precision = "ieee" if half else kind
        tensor_cores = "none" if kind == "ieee" else "HGMMA" if arch == "sm_90" and half else "HMMA|HGMMA"
        claims = {"tensor_cores": tensor_cores, "async_copies": "LDGSTS"}
        partial = _meta(*partial_shape(8192, 8, 32, config))
        for dtype in (torch.bfloat16, torch.float16) if half else (torch.float32,):
            a, name = _meta(8192, 4096, dtype=dtype), f"{dtype_name(dtype)}-{kind}"

            def layer(width: int, rank: int = 64, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor, Tensor]:
                L = _meta(32, rank, width, dtype=dtype).mT if rank % 16 else _meta(32, width, rank, dtype=dtype)
                return _meta(8192, width, dtype=dtype), L, _meta(32, rank, 4096, dtype=dtype)

            layers = [layer(4096), layer(1024)] if kind == "half_shared" else [layer(14336)]
            found = launches(_meta(32, 8), layers, a, offsets, partial, precision, config, 64)
            yield f"{name}-sequences", found[0], claims
            if dtype == torch.float16:
                continue  # the rest is the same instructions as for bfloat16
            found = launches(_meta(32, 8192), layers, a, offsets, None, precision, config, 64)
            yield f"{name}-tokens", found[0], claims
            if kind == "half_shared":
                layers.append(layer(1024))
                found = launches(_meta(32, 8), layers, a, offsets, partial, precision, config, 64)
                yield f"{name}-three-layers", found[0], claims
            odd = rank_block(40, kind, config)[0]
            layers = [layer(784, 40)] * len(layers)
            found = launches(_meta(32, 8), layers, a, offsets, partial, precision, config, odd)
            yield f"{name}-odd", found[0], claims
    # Sizes of one, which Triton makes constants of.
    layers, one = [(_meta(1, 16), _meta(1, 16, 8), _meta(1, 8, 16))], _meta(2, dtype=torch.int64)
    config = lookup(CONFIGS, arch, "ieee")
    found = launches(_meta(1, 1), layers, _meta(1, 16), one, _meta(1, 2, 1), "ieee", config, 8)
    yield "single-sequences", found[0], {"tensor_cores": "none"}
    yield "single-segments", found[1], segments
    found = launches(_meta(1, 1), layers, _meta(1, 16), one, None, "ieee", config, 8)
    yield "single-tokens", found[0], {"tensor_cores": "none"}
    yield "segments", segment_sums(_meta(32, 8), _meta(1, 72, 32), offsets, 128), segments
    yield "splits", split_sums(_meta(32, 8192), _meta(4, 32, 8192)), segments
