"""The k best rows of a store for every query, in one read of the store and without the [Q, N] scores.

1. ``group_kernel`` scores tiles of rows against tiles of queries on the tensor cores and stores the largest score of
   every group of 16 rows: [Q, N/16].
2. ``select_kernel`` takes the k best groups of each query, by score and then by lower index. No row outside them can be
   among the k best: each of the k groups holds a row that goes before it.
3. ``rescore_kernel`` scores the 16k rows of those groups again, and ``select_kernel`` takes the k best rows.

A score and an index are one 64-bit key that orders by score and, among equal scores, by falling index: the reference's
order exactly. Rows are floats (any of two dtypes on the two sides), int8, or sign bits; a row of sign bits is unpacked
to 0 and 1 and multiplied in int8 with the query's signs, since ``Σ q_i(1 − 2b_i) = Σ q_i − 2 Σ q_i b_i``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import Config, Table, all_configs, is_old, lookup
from .fixed_order import is_aligned
from .launch import Launch
from .tiles import dtype_name, kind_of

__all__ = ["GROUP", "LARGEST_K", "aot_cases", "scan_launches"]

GROUP = 16
LARGEST_K = 1024
_LEAST_WIDTH = 256  # keys that select_kernel looks at together
_BLOCKS_A_PROGRAM = 16  # how many blocks of keys a program of select_kernel looks through
_MAXIMA = 1 << 28  # group maxima held at a time: with more the queries are taken a part at a time


def _config(bn: int, bq: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BN": bn, "BQ": bq, "BK": bk}, warps, stages)


# Kinds: up to 16 queries or more; half precision on aligned rows or not, int8 with int8, sign bits, float32 by its
# precision. BK counts elements (bits). Chosen by what compiles without spills; not measured yet.
_SMALL = {
    "half few": _config(64, 16, 64, 4, 4),
    "half many": _config(128, 64, 32, 4, 4),
    "half odd few": _config(64, 16, 32, 4, 2),
    "half odd many": _config(64, 64, 32, 4, 2),
    "int8 few": _config(128, 16, 128, 4, 4),
    "int8 many": _config(128, 64, 64, 4, 4),
    "bits few": _config(64, 16, 128, 4, 3),
    "bits many": _config(64, 64, 128, 4, 3),
    "ieee few": _config(64, 16, 16, 4, 2),
    "ieee many": _config(64, 64, 16, 8, 2),
    "tf32 few": _config(64, 16, 32, 4, 2),
    "tf32 many": _config(64, 64, 32, 4, 2),
    "tf32x3 few": _config(64, 16, 16, 4, 2),
    "tf32x3 many": _config(64, 64, 16, 8, 2),
}
CONFIGS: Table = {
    "default": _SMALL,
    "sm_80": {"half few": _config(128, 16, 128, 4, 3), "half many": _config(128, 64, 64, 4, 4)},
    "sm_90": {"half few": _config(128, 16, 128, 4, 4), "half many": _config(128, 64, 64, 4, 4)},
}


@triton.jit
def _bits(octets, BN: tl.constexpr, BK: tl.constexpr):
    """Bytes [BN, BK / 8] as bits [BN, BK] in int8, lowest bit of each byte first."""
    bits = (octets[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(bits, [BN, BK]).to(tl.int8)


@triton.jit
def group_kernel(
    queries, rows, scale, sums, best, q_row, q_col, r_row, r_col, count, n_rows, d, groups, query_tiles,
    BITS: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``best[q, n // GROUP] = max score`` of each group; ``best`` is contiguous [Q, groups], ``d`` in elements of
    queries.
    """
    tile = tl.program_id(0) // query_tiles
    q = (tl.program_id(0) % query_tiles) * BQ + tl.arange(0, BQ)  # neighbours read the same rows
    n = tile * BN + tl.arange(0, BN)
    q_in = q < count
    n_in = n < n_rows
    row = n.to(tl.int64)[:, None] * r_row
    if DOT == tl.int8:
        total = tl.zeros((BN, BQ), tl.int32)
    else:
        total = tl.zeros((BN, BQ), tl.float32)
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        kept = inner < d
        right = tl.load(
            queries + inner[:, None] * q_col + q[None, :] * q_row, mask=kept[:, None] & q_in[None, :], other=0
        ).to(DOT)
        if BITS:
            byte = start // 8 + tl.arange(0, BK // 8)
            octets = tl.load(rows + row + byte[None, :] * r_col, mask=n_in[:, None] & (byte < d // 8)[None, :], other=0)
            left = _bits(octets, BN, BK)
        else:
            left = tl.load(rows + row + inner[None, :] * r_col, mask=n_in[:, None] & kept[None, :], other=0).to(DOT)
        if DOT == tl.int8:
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        else:
            total = tl.dot(left, right, total, input_precision=PRECISION)
    score = total.to(tl.float32)
    if BITS:
        score = tl.load(sums + q, mask=q_in, other=0).to(tl.float32)[None, :] - 2.0 * score
    if scale is not None:
        score = score * tl.load(scale + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    score = tl.where(n_in[:, None], score, float("-inf"))
    largest = tl.max(tl.reshape(score, [BN // GROUP, GROUP, BQ]), axis=1)
    group = tile * (BN // GROUP) + tl.arange(0, BN // GROUP)
    at = best + q.to(tl.int64)[None, :] * groups + group[:, None]
    tl.store(at, largest, mask=(group < groups)[:, None] & q_in[None, :])


@triton.jit
def _key(score, index):
    """One int64 that orders by score and, among equal scores, by falling index."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits).to(tl.int64)
    return (ordered << 32) + (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def select_kernel(
    scores, keys, out_keys, values, indices, length, k, splits, per_split,
    KEYS: tl.constexpr, FINAL: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The k largest of ``length`` keys a query, in order, of one split of them; the keys are ``keys [Q, length]`` or
    made from ``scores [Q, length]`` and positions.

    Writes ``out_keys [Q, splits, k]``, or with FINAL ``values`` and ``indices`` [Q, k]. A block is sorted in only if
    its largest key is larger than the smallest that is kept.
    """
    q = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    lane = tl.arange(0, W)
    lowest = -9223372036854775807
    kept = tl.full((W,), lowest, tl.int64)
    threshold = tl.min(kept, axis=0)
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    for start in range(first, last, W):
        at = start + lane
        if KEYS:
            block = tl.load(keys + q * length + at, mask=at < last, other=lowest)
        else:
            score = tl.load(scores + q * length + at, mask=at < last, other=0.0)
            block = tl.where(at < last, _key(score, at), lowest)
        if tl.max(block, axis=0) > threshold:
            both = tl.sort(tl.reshape(tl.join(kept, block), [2 * W]), descending=True)
            halves = tl.permute(tl.reshape(both, [2, W]), (1, 0))
            kept, _ = tl.split(halves)
            threshold = tl.min(tl.where(lane < k, kept, 9223372036854775807), axis=0)
    if FINAL:
        ordered = kept >> 32
        bits = tl.where(ordered < 0, (-(ordered + 1)) | 0x80000000, ordered)
        value = (bits & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
        if values is not None:
            tl.store(values + q * k + lane, value, mask=lane < k)
        tl.store(indices + q * k + lane, 0xFFFFFFFF - (kept & 0xFFFFFFFF), mask=lane < k)
    else:
        tl.store(out_keys + (q * splits + split) * k + lane, kept, mask=lane < k)


@triton.jit
def rescore_kernel(
    queries, rows, scale, sums, chosen, keys, q_row, q_col, r_row, r_col, n_rows, d, k, candidates,
    BITS: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``keys [Q, candidates]`` of the rows of the chosen groups ``[Q, k]``; the lowest key beyond the last row."""
    q = tl.program_id(0).to(tl.int64)
    candidate = tl.program_id(1) * BR + tl.arange(0, BR)
    inside = candidate < candidates
    group = tl.load(chosen + q * k + candidate // GROUP, mask=inside, other=0)
    n = group * GROUP + candidate % GROUP
    n_in = inside & (n < n_rows)
    row = n[:, None] * r_row
    if DOT == tl.int8:
        total = tl.zeros((BR,), tl.int32)
    else:
        total = tl.zeros((BR,), tl.float32)
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        right = tl.load(queries + q * q_row + inner * q_col, mask=inner < d, other=0)
        if BITS:
            byte = start // 8 + tl.arange(0, BK // 8)
            octets = tl.load(rows + row + byte[None, :] * r_col, mask=n_in[:, None] & (byte < d // 8)[None, :], other=0)
            left = _bits(octets, BR, BK)
        else:
            left = tl.load(rows + row + inner[None, :] * r_col, mask=n_in[:, None] & (inner < d)[None, :], other=0)
        if DOT == tl.int8:
            total += tl.sum(left.to(tl.int32) * right.to(tl.int32)[None, :], axis=1)
        else:
            total += tl.sum(left.to(tl.float32) * right.to(tl.float32)[None, :], axis=1)
    score = total.to(tl.float32)
    if BITS:
        score = tl.load(sums + q).to(tl.float32) - 2.0 * score
    if scale is not None:
        score = score * tl.load(scale + n, mask=n_in, other=0.0).to(tl.float32)
    key = tl.where(n_in, _key(score, n), -9223372036854775807)
    tl.store(keys + q * candidates + candidate, key, mask=inside)


def _select(
    length: int, k: int, queries: int, scores: Any, keys: Any, values: Any, indices: Any, workspace: Any
) -> Iterator[Launch]:
    """The k best of ``length`` keys a query, in as many rounds as it takes one program to look through what is left."""
    width = max(_LEAST_WIDTH, triton.next_power_of_2(k))
    while True:
        per_split = _BLOCKS_A_PROGRAM * width
        splits = triton.cdiv(length, per_split)
        final = splits == 1
        out = None if final else workspace(queries * splits * k, torch.int64)
        arguments = {
            "scores": scores, "keys": keys, "out_keys": out, "values": values if final else None,
            "indices": indices if final else None, "length": length, "k": k, "splits": splits, "per_split": per_split,
        }  # fmt: skip
        constants = {"KEYS": keys is not None, "FINAL": final, "W": width}
        yield Launch(
            select_kernel, (queries, splits), arguments, constants, 4 if width <= 256 else 8 if width < 1024 else 16, 2
        )
        if final:
            return
        scores, keys, length = None, out, splits * k


def _kind(queries: torch.Tensor, rows: torch.Tensor, dot: torch.dtype, bits: bool, precision: str) -> str:
    if bits or dot == torch.int8:
        kind = "bits" if bits else "int8"
    else:
        kind = kind_of(dot, precision)
        if kind == "half" and not (is_aligned(queries) and is_aligned(rows)):
            kind = "half odd"
    return f"{kind} {'few' if queries.shape[0] <= 16 else 'many'}"


_TL = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}


def scan_launches(
    queries: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor | None,
    sums: torch.Tensor | None,
    dot: torch.dtype,
    values: torch.Tensor,
    indices: torch.Tensor,
    workspace: Any,
    family: str,
    precision: str = "ieee",
    config: Config | None = None,
) -> list[Launch]:
    """Fills ``values`` (float32) and ``indices`` (int64), contiguous ``[Q, k]`` with ``1 ≤ k ≤ N``.

    ``sums`` (int32 [Q]) is given for sign bits: rows are then uint8 ``[N, W]`` and queries int8 ``[Q, 8W]`` of ±1, 0 in
    the padding, with ``sums`` their sums. ``dot``: the dtype both sides are multiplied in. ``workspace(n, dtype)``
    returns n uninitialised elements on the device.
    """
    count, d = queries.shape
    n_rows, k = rows.shape[0], values.shape[1]
    bits = sums is not None
    config = config or lookup(CONFIGS, family, _kind(queries, rows, dot, bits, precision))
    groups = triton.cdiv(n_rows, GROUP)
    chosen_count = min(k, groups)
    candidates = chosen_count * GROUP
    launches = []
    part = max(config.constants["BQ"], _MAXIMA // max(groups, 1))
    for start in range(0, count, part):
        stop = min(start + part, count)
        q = queries[start:stop]
        inputs = {"queries": q, "rows": rows, "scale": scale, "sums": None if sums is None else sums[start:stop]}
        strides = {"q_row": q.stride(0), "q_col": q.stride(1), "r_row": rows.stride(0), "r_col": rows.stride(1)}
        best = workspace((stop - start) * groups, torch.float32)
        query_tiles = triton.cdiv(stop - start, config.constants["BQ"])
        common = {"BITS": bits, "DOT": _TL[dot], "GROUP": GROUP}
        arguments = {
            **inputs, "best": best, **strides, "count": stop - start, "n_rows": n_rows, "d": d, "groups": groups,
            "query_tiles": query_tiles,
        }  # fmt: skip
        grid = (triton.cdiv(n_rows, config.constants["BN"]) * query_tiles,)
        constants = {**common, **config.constants, "PRECISION": precision}
        launches.append(Launch(group_kernel, grid, arguments, constants, config.num_warps, config.num_stages))
        chosen = workspace((stop - start) * chosen_count, torch.int64)
        launches += _select(groups, chosen_count, stop - start, best, None, None, chosen, workspace)
        keys = workspace((stop - start) * candidates, torch.int64)
        arguments = {
            **inputs, "chosen": chosen, "keys": keys, **strides, "n_rows": n_rows, "d": d, "k": chosen_count,
            "candidates": candidates,
        }  # fmt: skip
        constants = {**common, "BR": 16, "BK": 256}
        launches.append(Launch(rescore_kernel, (stop - start, triton.cdiv(candidates, 16)), arguments, constants, 4, 2))
        launches += _select(candidates, k, stop - start, None, keys, values[start:stop], indices[start:stop], workspace)
    return launches


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype of the group kernel; the selections and the second scoring."""
    n_rows = 1 << 20

    def launches(count, dtype, rows_dtype, config, precision="ieee", d=4096, scaled=False, k=100, n=n_rows):
        bits = rows_dtype == torch.uint8
        queries, rows = _meta(count, d, dtype=dtype), _meta(n, d // 8 if bits else d, dtype=rows_dtype)
        return scan_launches(
            queries, rows, _meta(n) if scaled else None, _meta(count, dtype=torch.int32) if bits else None, dtype,
            _meta(count, k), _meta(count, k, dtype=torch.int64), lambda m, t: _meta(m, dtype=t), arch, precision,
            config,
        )  # fmt: skip

    for kind, config in all_configs(CONFIGS, arch):
        family, few, odd = kind.split()[0], "few" in kind, "odd" in kind
        count = 8 if few else 128
        name = kind.replace(" ", "-")
        if family == "half":
            for dtype in (torch.bfloat16, torch.float16)[: 2 - odd]:
                claims = {"tensor_cores": "HMMA|HGMMA", **({} if odd else {"async_copies": "LDGSTS"})}
                launch = launches(count, dtype, dtype, config, d=4096 - odd)[0]
                yield f"{dtype_name(dtype)}-{name}", launch, claims
            if not odd:
                launch = launches(count, torch.bfloat16, torch.int8, config, scaled=True)[0]
                yield f"bfloat16-int8-{name}-scaled", launch, {"tensor_cores": "HMMA|HGMMA"}
        elif family in ("int8", "bits"):
            rows_dtype = torch.int8 if family == "int8" else torch.uint8
            launch = launches(count, torch.int8, rows_dtype, config, scaled=True)[0]
            yield name, launch, {"tensor_cores": "IMMA|IGMMA"}
        else:
            launch = launches(count, torch.float32, torch.float32, config, family)[0]
            yield f"float32-{name}", launch, {"tensor_cores": "none" if family == "ieee" else "HMMA|HGMMA"}
    none = {"tensor_cores": "none"}
    # Triton before 3.6 spills in a selection of more than 512: the op is refused there.
    many = 500 if is_old() else 1000
    for k in (10, many):
        steps = launches(8, torch.bfloat16, torch.bfloat16, None, k=k)
        for number, launch in enumerate(steps[1:]):
            if launch.kernel is select_kernel and (k == many or launch.constants["FINAL"]):
                part = "final" if launch.constants["FINAL"] else "part"
                yield f"select-{k}-{number}-{part}", launch, none
    for dtype, rows_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.int8, torch.uint8),
    ):
        steps = launches(8, dtype, rows_dtype, None, scaled=rows_dtype != torch.bfloat16)
        [launch] = [step for step in steps if step.kernel is rescore_kernel]
        yield f"rescore-{dtype_name(dtype)}-{dtype_name(rows_dtype)}", launch, none
