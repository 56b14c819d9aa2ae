"""Scores against dense queries, by sequence or by token; neither writes a gradient or a product to memory.

By sequence: a program forms the same tile of up to four sequences' gradients in registers, then streams the tile of
every query past them. By token: a program forms ``a V_qᵀ`` for a tile of tokens, a block of outputs at a time, and
multiplies it with ``g``. Both leave partial sums that a second kernel adds up in a fixed order.
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

__all__ = [
    "SEQUENCE_CONFIGS",
    "TOKEN_CONFIGS",
    "aot_cases",
    "by_sequence",
    "by_token",
    "rows_aligned",
    "sequence_plan",
    "token_plan",
]


@triton.jit
def _gradient_tile(
    g, a, offsets, b, sequences, row_offsets, column_offsets, row_mask, column_mask, g_row, a_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of ``G_b = Σ_t g_t a_tᵀ``; zero beyond the last sequence."""
    start = tl.load(offsets + b, mask=b < sequences, other=0)
    stop = tl.load(offsets + b + 1, mask=b < sequences, other=0)
    return tile_product(
        tl.zeros((BM, BN), tl.float32), g + start * g_row, a + start * a_row, row_offsets, column_offsets,
        row_mask, column_mask, (stop - start).to(tl.int32), g_row, a_row, BK, PRECISION,
    )  # fmt: skip


@triton.jit
def _store_sum(partial, tile_of_query, x, b, sequences, queries, q, tile, tiles):
    total = tl.sum(tl.sum(x * tile_of_query, axis=1), axis=0)
    at = (b.to(tl.int64) * queries + q) * tiles + tile
    tl.store(partial + at, total, mask=b < sequences)


@triton.jit
def sequence_kernel(
    partial, g, a, V, offsets, sequences, queries, d_out, d_in, read_g, read_a, g_row, g_column, a_row,
    a_column, V_query, V_row, V_column, BB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial[b, q, tile] = ⟨V_q, G_b⟩`` over one tile of outputs and inputs, for BB sequences and all queries."""
    groups = tl.cdiv(sequences, BB)
    tile = tl.program_id(0) // groups  # the groups of one tile run together: they read the same queries
    row_tiles = tl.cdiv(d_out, BM)
    column_tiles = tl.cdiv(d_in, BN)
    tiles = row_tiles * column_tiles
    m, n = tile_of(tile, row_tiles, column_tiles, GROUP)
    b = (tl.program_id(0) % groups) * BB
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    row_mask = r < read_g - m * BM
    column_mask = c < read_a - n * BN
    first_row = m.to(tl.int64) * BM
    first_column = n.to(tl.int64) * BN
    g += first_row * g_column
    a += first_column * a_column
    row_offsets = r * g_column
    column_offsets = c * a_column
    x0 = _gradient_tile(
        g, a, offsets, b, sequences, row_offsets, column_offsets, row_mask, column_mask, g_row, a_row,
        BM, BN, BK, PRECISION,
    )  # fmt: skip
    if BB > 1:
        x1 = _gradient_tile(
            g, a, offsets, b + 1, sequences, row_offsets, column_offsets, row_mask, column_mask, g_row, a_row,
            BM, BN, BK, PRECISION,
        )  # fmt: skip
    if BB > 2:
        x2 = _gradient_tile(
            g, a, offsets, b + 2, sequences, row_offsets, column_offsets, row_mask, column_mask, g_row, a_row,
            BM, BN, BK, PRECISION,
        )  # fmt: skip
        x3 = _gradient_tile(
            g, a, offsets, b + 3, sequences, row_offsets, column_offsets, row_mask, column_mask, g_row, a_row,
            BM, BN, BK, PRECISION,
        )  # fmt: skip
    at = V + first_row * V_row + first_column * V_column
    V_offsets = r[:, None] * V_row + c[None, :] * V_column
    mask = (r < d_out - m * BM)[:, None] & (c < d_in - n * BN)[None, :]
    for q in tl.range(0, queries, num_stages=AHEAD):
        v = tl.load(at + V_offsets, mask=mask, other=0.0).to(tl.float32)
        _store_sum(partial, v, x0, b, sequences, queries, q, tile, tiles)
        if BB > 1:
            _store_sum(partial, v, x1, b + 1, sequences, queries, q, tile, tiles)
        if BB > 2:
            _store_sum(partial, v, x2, b + 2, sequences, queries, q, tile, tiles)
            _store_sum(partial, v, x3, b + 3, sequences, queries, q, tile, tiles)
        at += V_query


@triton.jit
def tile_sums_kernel(
    scores, partial, pairs, queries, tiles, scores_query, scores_sequence, BP: tl.constexpr, BT: tl.constexpr
):
    """``scores[q, b] += Σ_tile partial[b, q, tile]``, BT tiles at a time in order."""
    pair = tl.program_id(0) * BP + tl.arange(0, BP)
    inside = pair < pairs
    total = tl.zeros((BP, BT), tl.float32)
    for first in range(0, tiles, BT):
        t = first + tl.arange(0, BT)
        at = pair.to(tl.int64)[:, None] * tiles + t[None, :]
        total += tl.load(partial + at, mask=inside[:, None] & (t < tiles)[None, :], other=0.0)
    q = (pair % queries).to(tl.int64)
    b = (pair // queries).to(tl.int64)
    where = scores + q * scores_query + b * scores_sequence
    tl.store(where, tl.load(where, mask=inside, other=0.0) + tl.sum(total, axis=1), mask=inside)


@triton.jit
def token_kernel(
    out, g, a, V, offsets, tokens, sequences, steps, queries, d_out, d_in, splits, split_stride,
    out_query, out_token, g_row, g_column, a_row, a_column, V_query, V_row, V_column,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``g_tᵀ V_q a_t`` of BM tokens and one query, over every ``splits``-th block of BN outputs.

    MODE 0: sums over sequences into ``out [splits, tiles + B, Q]``. MODE 1: into ``out [splits, Q, N]``. MODE 2: added
    to ``out [Q, N]`` (one split).
    """
    token_tiles = tl.cdiv(tokens, BM)
    m = tl.program_id(0) % token_tiles  # the tiles of one query run together: they read the same query
    split = (tl.program_id(0) // token_tiles) % splits
    query = tl.program_id(0) // (token_tiles * splits)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    row_mask = r < tokens - m * BM
    first = m.to(tl.int64) * BM
    a += first * a_row
    g += first * g_row
    V += query.to(tl.int64) * V_query
    sums = tl.zeros((BM,), tl.float32)
    for n in range(split, tl.cdiv(d_out, BN), splits):
        column_mask = c < d_out - n * BN
        column = n * tl.full((), BN, tl.int64)  # a loop variable is a plain integer in the interpreter
        y = tile_product(
            tl.zeros((BM, BN), tl.float32), a, V + column * V_row, r * a_row, c * V_row, row_mask, column_mask,
            d_in, a_column, V_column, BK, PRECISION,
        )  # fmt: skip
        at = g + column * g_column
        gradient = tl.load(
            at + r[:, None] * g_row + c[None, :] * g_column, mask=row_mask[:, None] & column_mask[None, :], other=0.0
        )
        sums += tl.sum(y * gradient.to(tl.float32), axis=1)
    if MODE == 0:
        only = query + tl.arange(0, 1)
        token_tile_sequences(
            out + split.to(tl.int64) * split_stride, sums[:, None], offsets, m, tokens, sequences, steps, only,
            queries, queries, BM,
        )  # fmt: skip
    else:
        at = out + split.to(tl.int64) * split_stride + query.to(tl.int64) * out_query + (first + r) * out_token
        if MODE == 2:
            sums += tl.load(at, mask=row_mask, other=0.0)
        tl.store(at, sums, mask=row_mask)


def _sequences(bb: int, bm: int, bn: int, bk: int, warps: int, stages: int, ahead: int = 1, group: int = 8) -> Config:
    return Config({"BB": bb, "BM": bm, "BN": bn, "BK": bk, "GROUP": group, "AHEAD": ahead}, warps, stages)


def _tokens(bm: int, bn: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk}, warps, stages)


_SMALL_SHARED = {
    "half": _sequences(2, 64, 128, 32, 8, 3),
    "half_odd": _sequences(2, 64, 128, 32, 8, 3),
    "half_small": _sequences(1, 64, 64, 32, 4, 3),
    "ieee": _sequences(1, 64, 64, 16, 8, 2),
    "tf32": _sequences(1, 64, 64, 32, 4, 2),
    "tf32x3": _sequences(1, 64, 64, 16, 4, 2),
}
SEQUENCE_CONFIGS: Mapping[str, Mapping[str, Config]] = {
    "default": _SMALL_SHARED,
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "sm_80": {
        **_SMALL_SHARED,
        "half": _sequences(2, 128, 64, 32, 8, 3, 3),
        "half_odd": _sequences(2, 128, 64, 32, 8, 3, 3),
    },
    "sm_90": {
        **_SMALL_SHARED,
        "half": _sequences(4, 128, 64, 64, 8, 3, 2),
        "half_odd": _sequences(2, 128, 64, 64, 8, 3, 2),
        "half_small": _sequences(1, 64, 64, 64, 4, 3),
    },
    "sm_90 old": {"half_odd": _sequences(2, 64, 64, 64, 8, 3)},
}
_TOKENS_SMALL = {
    "half": _tokens(128, 128, 32, 8, 3),
    "half_small": _tokens(64, 64, 64, 4, 3),
    "ieee": _tokens(64, 64, 16, 4, 2),
    "tf32": _tokens(64, 64, 32, 4, 2),
    "tf32x3": _tokens(64, 64, 16, 4, 2),
}
TOKEN_CONFIGS: Mapping[str, Mapping[str, Config]] = {
    "default": _TOKENS_SMALL,
    "sm_86": _TOKENS_SMALL,
    "sm_89": _TOKENS_SMALL,
    "sm_80": {**_TOKENS_SMALL, "half": _tokens(128, 128, 64, 8, 3)},
    "sm_90": {**_TOKENS_SMALL, "half": _tokens(128, 128, 64, 8, 4)},
}
"""Kinds: half precision with large and small tiles, by sequence also large ones for queries whose rows no 16-byte load
fits (their addresses need registers); float32 by its precision. Chosen by what compiles without spills; not measured
yet."""

_SUMS = Config({"BP": 4, "BT": 512}, num_warps=4, num_stages=2)


def _processors(family: str) -> int:
    return MULTIPROCESSORS.get(family, MULTIPROCESSORS["default"])


def sequence_plan(
    sequences: int, d_out: int, d_in: int, dtype: torch.dtype, precision: str, family: str, aligned: bool = True
) -> tuple[Config, int]:
    """(configuration, tiles): small tiles where large ones would not fill the card. ``aligned``: whether the rows of
    the queries start on 16 bytes and are whole numbers of them.
    """
    kind = kind_of(dtype, precision)
    for name in ("half" if aligned else "half_odd", "half_small") if kind == "half" else (kind,):
        config = lookup(SEQUENCE_CONFIGS, family, name)
        tiles = triton.cdiv(d_out, config.constants["BM"]) * triton.cdiv(d_in, config.constants["BN"])
        if tiles * triton.cdiv(sequences, config.constants["BB"]) >= _processors(family):
            break
    return config, tiles


def token_plan(
    tokens: int, queries: int, d_out: int, dtype: torch.dtype, precision: str, family: str
) -> tuple[Config, int]:
    """(configuration, splits of the outputs): as many splits as fill the card, at most one a block of outputs."""
    kind = kind_of(dtype, precision)
    for name in (kind, "half_small") if kind == "half" else (kind,):
        config = lookup(TOKEN_CONFIGS, family, name)
        programs = triton.cdiv(tokens, config.constants["BM"]) * queries
        blocks = triton.cdiv(d_out, config.constants["BN"])
        if programs * blocks >= _processors(family):
            break
    return config, max(1, min(blocks, triton.cdiv(_processors(family), max(programs, 1))))


def rows_aligned(V: Tensor) -> bool:
    """Whether Triton can read the rows of ``V [Q, d_out, d_in]`` in 16-byte pieces."""
    strides = V.stride(2) == 1 and V.stride(1) % 16 == 0 and V.stride(0) % 16 == 0
    return strides and V.shape[2] % 16 == 0 and (V.is_meta or V.data_ptr() % 16 == 0)


def by_sequence(
    scores: Tensor,
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    V: Tensor,
    partial: Tensor,
    precision: str = "ieee",
    config: Config | None = None,
) -> list[Launch]:
    """``scores[q, b] += ⟨V_q, Σ_t g_t a_tᵀ⟩``.

    scores ``[Q, B]`` float32; g ``[N, d_out]`` and a ``[N, d_in]`` of one dtype, or wider, with zeros there; V ``[Q,
    d_out, d_in]`` of any float dtype; partial ``[B, Q, tiles]`` float32 (see :func:`sequence_plan`); offsets int64
    ``[B+1]`` on the same device.
    """
    queries, sequences = scores.shape
    d_out, d_in = V.shape[1:]
    if config is None:
        family = family_of(g.device)
        config = sequence_plan(sequences, d_out, d_in, g.dtype, precision, family, rows_aligned(V))[0]
    tiles = partial.shape[2]
    arguments = {
        "partial": partial, "g": g, "a": a, "V": V, "offsets": offsets, "sequences": sequences, "queries": queries,
        "d_out": d_out, "d_in": d_in, "read_g": g.shape[1], "read_a": a.shape[1], "g_row": g.stride(0),
        "g_column": g.stride(1), "a_row": a.stride(0), "a_column": a.stride(1), "V_query": V.stride(0),
        "V_row": V.stride(1), "V_column": V.stride(2),
    }  # fmt: skip
    constants = {**config.constants, "PRECISION": precision}
    grid = (tiles * triton.cdiv(sequences, config.constants["BB"]) if queries else 0,)
    first = Launch(sequence_kernel, grid, arguments, constants, config.num_warps, config.num_stages)
    pairs = queries * sequences
    arguments = {
        "scores": scores, "partial": partial, "pairs": pairs, "queries": queries, "tiles": tiles,
        "scores_query": scores.stride(0), "scores_sequence": scores.stride(1),
    }  # fmt: skip
    grid = (triton.cdiv(pairs, _SUMS.constants["BP"]),)
    return [first, Launch(tile_sums_kernel, grid, arguments, _SUMS.constants, _SUMS.num_warps, _SUMS.num_stages)]


def by_token(
    scores: Tensor,
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    V: Tensor,
    partial: Tensor | None,
    per_token: bool,
    precision: str = "ieee",
    config: Config | None = None,
) -> list[Launch]:
    """``scores[q, t] += g_tᵀ V_q a_t`` (``[Q, N]``), or their sums over sequences (``[Q, B]``).

    g, a and V of one dtype; a and V may both be wider than d_in, with zeros there. partial, float32: ``[splits, tiles +
    B, Q]`` for sums over sequences; per token ``[splits, Q, N]``, or None where there is one split (see
    :func:`token_plan`).
    """
    (tokens, d_out), queries, sequences = g.shape, V.shape[0], offsets.shape[0] - 1
    if config is None:
        config = token_plan(tokens, queries, d_out, g.dtype, precision, family_of(g.device))[0]
    bm = config.constants["BM"]
    splits = 1 if partial is None else partial.shape[0]
    out = scores if partial is None else partial
    arguments = {
        "out": out, "g": g, "a": a, "V": V, "offsets": offsets, "tokens": tokens, "sequences": sequences,
        "steps": max(sequences, 1).bit_length(), "queries": queries, "d_out": d_out, "d_in": a.shape[1],
        "splits": splits, "split_stride": 0 if partial is None else partial.stride(0),
        "out_query": out.stride(-2), "out_token": out.stride(-1), "g_row": g.stride(0), "g_column": g.stride(1),
        "a_row": a.stride(0), "a_column": a.stride(1), "V_query": V.stride(0), "V_row": V.stride(1),
        "V_column": V.stride(2),
    }  # fmt: skip
    mode = 0 if not per_token else 2 if partial is None else 1
    constants = {"MODE": mode, **config.constants, "PRECISION": precision}
    grid = (triton.cdiv(tokens, bm) * splits * queries,)
    launches = [Launch(token_kernel, grid, arguments, constants, config.num_warps, config.num_stages)]
    if partial is not None:
        launches.append(split_sums(scores, partial) if per_token else segment_sums(scores, partial, offsets, bm))
    return launches


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype of both routes; queries in the inputs' dtype and in float32, and at odd sizes."""
    offsets, none = _meta(9, dtype=torch.int64), {"tensor_cores": "none"}
    for route, table in (("sequence", SEQUENCE_CONFIGS), ("token", TOKEN_CONFIGS)):
        for kind, config in all_configs(table, arch):
            half = kind.startswith("half")
            precision = "ieee" if half else kind
            tensor_cores = "none" if kind == "ieee" else "HGMMA" if arch == "sm_90" and half else "HMMA|HGMMA"
            claims = {"tensor_cores": tensor_cores, "async_copies": "LDGSTS"}
            for dtype in (torch.bfloat16, torch.float16) if half else (torch.float32,):
                name = f"{route}-{dtype_name(dtype)}-{kind}"
                g, a = _meta(8192, 4096, dtype=dtype), _meta(8192, 1024, dtype=dtype)
                V = _meta(16, 4096, 1024, dtype=dtype)
                if route == "token":
                    for mode in ("sequences", "tokens", "splits"):
                        per_token = mode != "sequences"
                        partial = {"sequences": _meta(2, 72, 16), "splits": _meta(2, 16, 8192)}.get(mode)
                        scores = _meta(16, 8192 if per_token else 8)
                        found = by_token(scores, g, a, offsets, V, partial, per_token, precision, config)
                        if mode == "sequences" or (dtype != torch.float16 and (half or mode == "tokens")):
                            yield f"{name}-{mode}", found[0], claims
                    continue
                tiles = triton.cdiv(4096, config.constants["BM"]) * triton.cdiv(1024, config.constants["BN"])
                partial = _meta(8, 16, tiles)
                if kind != "half_odd":
                    found = by_sequence(_meta(16, 8), g, a, offsets, V, partial, precision, config)
                    yield f"{name}-same", found[0], claims
                if dtype == torch.bfloat16 and kind != "half_odd":
                    found = by_sequence(_meta(16, 8), g, a, offsets, V.float(), partial, precision, config)
                    yield f"{name}-float32", found[0], claims
                if dtype != torch.float16 and kind != "half":
                    odd = _meta(16, 4096, 1001, dtype=dtype)[:, :4093]
                    found = by_sequence(_meta(16, 8), g, a, offsets, odd, partial, precision, config)
                    yield f"{name}-odd", found[0], claims
    found = by_sequence(_meta(16, 8), _meta(9, 16), _meta(9, 16), offsets, _meta(16, 16, 16), _meta(8, 16, 300))
    yield "tile-sums", found[1], none
    # Sizes of one, which Triton makes constants of.
    one, x, V = _meta(2, dtype=torch.int64), _meta(1, 16), _meta(1, 16, 16)
    config = lookup(SEQUENCE_CONFIGS, arch, "ieee")
    found = by_sequence(_meta(1, 1), x, x, one, V, _meta(1, 1, 1), "ieee", config)
    yield "single-sequence", found[0], none
    yield "single-sums", found[1], none
    config = lookup(TOKEN_CONFIGS, arch, "ieee")
    yield "single-token", by_token(_meta(1, 1), x, x, one, V, _meta(1, 2, 1), False, "ieee", config)[0], none
    found = by_token(_meta(1, 1), x, x, one, V, _meta(1, 1, 1), True, "ieee", config)
    yield "single-split", found[0], none
    yield "single-split-sums", found[1], none
