"""Inner products and norms of per-sequence gradients that are never formed: ``Σ_{t,s} (a_t·a'_s)(g_t·g'_s)``.

Two ways, both with everything between the inputs and one number per pair kept in registers:

- ghost: the two Gram tiles of a pair of token tiles, multiplied and summed; cost ``2·T·T'(d_in + d_out)``. A norm takes
  each pair of tiles once and counts those off the diagonal twice.
- materialised: a tile of the gradient itself, over all tokens; squared and summed (norm), or multiplied with the same
  tile of every sequence of the other side. Cheaper for long sequences.

Programs write partial sums; a second kernel adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import Config, Table, all_configs, lookup
from .fixed_order import is_aligned, sum_launch
from .launch import Launch
from .tiles import dtype_name, kind_of

__all__ = ["aot_cases", "dot_is_ghost", "dot_launches", "norm_crossover", "norm_launches", "norm_splits"]

_BLOCKS = 528  # programs that fill four times the 132 multiprocessors of the largest card this is meant for
_WORKSPACE = 1 << 26  # floats of partial sums a launch may have


def _ghost(bt: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BT": bt, "BK": bk}, warps, stages)


def _tile(bo: int, bi: int, bt: int, warps: int, stages: int) -> Config:
    return Config({"BO": bo, "BI": bi, "BT": bt}, warps, stages)


# Kinds: half precision, the same with short sequences, rows that no 16-byte copy fits, float32 by its precision
# (without tensor cores or with three products a tile needs more registers). Chosen by what compiles without spills; not
# measured yet.
_GHOST = {
    "half": _ghost(64, 64, 4, 3),
    "half short": _ghost(32, 64, 4, 3),
    "half odd": _ghost(64, 32, 8, 2),
    "ieee": _ghost(64, 16, 8, 2),
    "tf32": _ghost(64, 32, 4, 3),
    "tf32x3": _ghost(64, 32, 8, 2),
}
_TILE = {
    "half": _tile(128, 64, 32, 4, 4),
    "half odd": _tile(64, 64, 32, 8, 2),
    "ieee": _tile(64, 64, 16, 8, 2),
    "tf32": _tile(64, 64, 32, 4, 3),
    "tf32x3": _tile(64, 64, 32, 8, 2),
}
GHOST: Table = {
    "default": _GHOST,
    "sm_80": {"half": _ghost(128, 32, 8, 4), "half short": _ghost(32, 64, 4, 4)},
    "sm_90": {"half": _ghost(128, 64, 8, 4), "half short": _ghost(64, 64, 4, 4)},
}
TILE: Table = {
    "default": _TILE,
    "sm_80": {"half": _tile(128, 128, 32, 8, 4)},
    "sm_90": {"half": _tile(128, 128, 64, 8, 4)},
}


@triton.jit
def _gram(
    x1, x2, rows1, rows2, ok1, ok2, row1, col1, row2, col2, d,
    BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``X1 X2ᵀ`` of two token tiles, [BT, BT] in registers."""
    total = tl.zeros((BT, BT), tl.float32)
    for k in range(0, d, BK):
        inner = k + tl.arange(0, BK)
        inside = inner < d
        left = tl.load(x1 + rows1[:, None] * row1 + inner[None, :] * col1, mask=ok1[:, None] & inside[None, :], other=0)
        right = tl.load(
            x2 + rows2[None, :] * row2 + inner[:, None] * col2, mask=inside[:, None] & ok2[None, :], other=0
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _gradient(
    g, a, start, length, o, i, g_row, g_col, a_row, a_col, d_out, d_in,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``Σ_t g_t a_tᵀ``, [BO, BI] in registers."""
    total = tl.zeros((BO, BI), tl.float32)
    o_in = o < d_out
    i_in = i < d_in
    for t in range(0, length, BT):
        token = t + tl.arange(0, BT)
        inside = token < length
        rows = start + token
        left = tl.load(
            g + rows[None, :] * g_row + o.to(tl.int64)[:, None] * g_col, mask=o_in[:, None] & inside[None, :], other=0
        )
        right = tl.load(
            a + rows[:, None] * a_row + i.to(tl.int64)[None, :] * a_col, mask=inside[:, None] & i_in[None, :], other=0
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def ghost_dot_kernel(
    g1, a1, offsets1, g2, a2, offsets2, partial,
    g1_row, g1_col, a1_row, a1_col, g2_row, g2_col, a2_row, a2_col,
    d_out, d_in, count2, pairs, splits,
    BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial[split, b, c]``: the split's share of the pairs of token tiles of sequences b and c."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // count2
    c = pair % count2
    start1 = tl.load(offsets1 + b)
    start2 = tl.load(offsets2 + c)
    length1 = (tl.load(offsets1 + b + 1) - start1).to(tl.int32)
    length2 = (tl.load(offsets2 + c + 1) - start2).to(tl.int32)
    tiles2 = tl.cdiv(length2, BT)
    total = 0.0
    for p in range(split, tl.cdiv(length1, BT) * tiles2, splits):
        t = (p // tiles2) * BT + tl.arange(0, BT)
        s = (p % tiles2) * BT + tl.arange(0, BT)
        by_a = _gram(
            a1, a2, start1 + t, start2 + s, t < length1, s < length2, a1_row, a1_col, a2_row, a2_col, d_in,
            BT, BK, PRECISION,
        )  # fmt: skip
        by_g = _gram(
            g1, g2, start1 + t, start2 + s, t < length1, s < length2, g1_row, g1_col, g2_row, g2_col, d_out,
            BT, BK, PRECISION,
        )  # fmt: skip
        total += tl.sum(by_a * by_g)
    tl.store(partial + split.to(tl.int64) * pairs + pair, total)


@triton.jit
def tile_dot_kernel(
    g1, a1, offsets1, g2, a2, offsets2, partial,
    g1_row, g1_col, a1_row, a1_col, g2_row, g2_col, a2_row, a2_col,
    d_out, d_in, count2, pairs, by_first, by_second,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial[tile, b, c]``: the product of one tile of gradient b, kept, with that of every gradient c."""
    tile = tl.program_id(0)
    b = tl.program_id(1)
    across = tl.cdiv(d_in, BI)
    o = (tile // across) * BO + tl.arange(0, BO)
    i = (tile % across) * BI + tl.arange(0, BI)
    start = tl.load(offsets1 + b)
    length = (tl.load(offsets1 + b + 1) - start).to(tl.int32)
    first = _gradient(
        g1, a1, start, length, o, i, g1_row, g1_col, a1_row, a1_col, d_out, d_in, BO, BI, BT, PRECISION
    )  # fmt: skip
    for c in range(0, count2):
        start = tl.load(offsets2 + c)
        length = (tl.load(offsets2 + c + 1) - start).to(tl.int32)
        second = _gradient(
            g2, a2, start, length, o, i, g2_row, g2_col, a2_row, a2_col, d_out, d_in, BO, BI, BT, PRECISION
        )  # fmt: skip
        tl.store(partial + tile.to(tl.int64) * pairs + b * by_first + c * by_second, tl.sum(first * second))


@triton.jit
def ghost_norm_kernel(
    g, a, offsets, partial, g_row, g_col, a_row, a_col, d_out, d_in, count, splits, crossover,
    BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial[split, b]``: the split's share of the lower triangle of token tiles; 0 above the crossover length."""
    b = tl.program_id(0)
    split = tl.program_id(1)
    start = tl.load(offsets + b)
    length = (tl.load(offsets + b + 1) - start).to(tl.int32)
    tiles = tl.where(length <= crossover, tl.cdiv(length, BT), 0)
    width = tiles + 1 - tiles % 2
    total = 0.0
    for p in range(split, tiles * (tiles + 1) // 2, splits):
        # Rows n-1-r and r (r-1 for odd n) of the triangle together fill row r of a rectangle: exact in integers.
        r = p // width
        column = p % width
        upper = column < tiles - r
        i = tl.where(upper, tiles - 1 - r, r - tiles % 2)
        j = tl.where(upper, column, column - (tiles - r))
        t = i * BT + tl.arange(0, BT)
        s = j * BT + tl.arange(0, BT)
        by_a = _gram(
            a, a, start + t, start + s, t < length, s < length, a_row, a_col, a_row, a_col, d_in, BT, BK, PRECISION
        )  # fmt: skip
        by_g = _gram(
            g, g, start + t, start + s, t < length, s < length, g_row, g_col, g_row, g_col, d_out, BT, BK, PRECISION
        )  # fmt: skip
        total += tl.where(i == j, 1.0, 2.0) * tl.sum(by_a * by_g)
    tl.store(partial + split.to(tl.int64) * count + b, total)


@triton.jit
def tile_norm_kernel(
    g, a, offsets, partial, g_row, g_col, a_row, a_col, d_out, d_in, count, crossover,
    BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial[tile, b]``: the sum of squares of one tile of gradient b; 0 up to the crossover length."""
    tile = tl.program_id(0)
    b = tl.program_id(1)
    across = tl.cdiv(d_in, BI)
    o = (tile // across) * BO + tl.arange(0, BO)
    i = (tile % across) * BI + tl.arange(0, BI)
    start = tl.load(offsets + b)
    length = (tl.load(offsets + b + 1) - start).to(tl.int32)
    length = tl.where(length > crossover, length, 0)
    square = 0.0
    if length > 0:
        full = _gradient(g, a, start, length, o, i, g_row, g_col, a_row, a_col, d_out, d_in, BO, BI, BT, PRECISION)
        square = tl.sum(full * full)
    tl.store(partial + tile.to(tl.int64) * count + b, square)


def keep_first(tokens1: int, tokens2: int, count1: int, count2: int) -> bool:
    """Whether to keep side 1's gradient tile in registers and form side 2's anew for each of its sequences."""
    return tokens1 + count1 * tokens2 <= tokens2 + count2 * tokens1


def tile_dot_flops(tokens1: int, tokens2: int, d_out: int, d_in: int, count1: int, count2: int) -> int:
    """Tiles of one side kept, those of the other formed for each of its sequences: ``2(N₁ + B₁·N₂ + B₁B₂)·d_in·d_out``
    or the same with the sides exchanged, whichever is less.
    """
    kept = min(tokens1 + count1 * tokens2, tokens2 + count2 * tokens1)
    return 2 * (kept + count1 * count2) * d_in * d_out


def dot_is_ghost(tokens1: int, tokens2: int, d_out: int, d_in: int, count1: int, count2: int) -> bool:
    """Whether Gram tiles, ``2·N₁·N₂(d_in + d_out + 1)``, need no more operations than :func:`tile_dot_flops`.

    For many sequences of equal length T the crossover is near ``T = d_in·d_out / (d_in + d_out)``.
    """
    ghost = 2 * tokens1 * tokens2 * (d_in + d_out + 1)
    return ghost <= tile_dot_flops(tokens1, tokens2, d_out, d_in, count1, count2)


def norm_crossover(d_out: int, d_in: int, tile: int) -> int:
    """The longest sequence for which the triangle of Gram tiles is cheaper: ``T(T + tile)(d_in + d_out) ≤ 2T·d_in·
    d_out``; about twice :func:`pyinf.ops.costs.norm_is_ghost`'s, because of the symmetry.
    """
    return max(0, 2 * d_in * d_out // max(d_in + d_out, 1) - tile)


def _kind(precision: str, *tensors: torch.Tensor) -> str:
    kind = kind_of(tensors[0].dtype, precision)
    return kind if kind != "half" or all(map(is_aligned, tensors)) else "half odd"


def _ghost_kind(kind: str, tokens: int, count: int) -> str:
    return "half short" if kind == "half" and tokens <= 48 * max(count, 1) else kind


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    out = {}
    for name, x in tensors.items():
        out[f"{name}_row"], out[f"{name}_col"] = x.stride()
    return out


def norm_splits(tokens: int, count: int) -> int:
    """Programs per sequence of the ghost norm: enough to fill a card, no more than there are pairs of tiles."""
    average = -(-tokens // max(count, 1))
    tiles = -(-average // 64)
    return max(1, min(-(-_BLOCKS // max(count, 1)), tiles * (tiles + 1) // 2))


def norm_launches(
    g: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    workspace: Any,
    family: str,
    precision: str = "ieee",
    config: tuple[Config, Config] | None = None,
) -> list[Launch]:
    """``out[b] = ‖Σ_t g_t a_tᵀ‖_F`` (float32 [B]) for int64 ``offsets [B + 1]`` on the device of g.

    Every sequence takes the cheaper way by its own length, read on the device: sequences up to :func:`norm_crossover`
    the Gram tiles, longer ones the tiles of the gradient. ``workspace(n)`` returns n uninitialised float32 on the
    device.
    """
    (tokens, d_out), d_in, count = g.shape, a.shape[1], out.numel()
    kind = _kind(precision, g, a)
    ghost, tile = config or (
        lookup(GHOST, family, _ghost_kind(kind, tokens, count)),
        lookup(TILE, family, kind),
    )
    if not count:
        return []
    crossover = norm_crossover(d_out, d_in, ghost.constants["BT"])
    splits = norm_splits(tokens, count)
    # No sequence is longer than all rows together: mostly the second kernel need not be launched at all.
    tiles = (
        0 if tokens <= crossover else triton.cdiv(d_out, tile.constants["BO"]) * triton.cdiv(d_in, tile.constants["BI"])
    )
    partial = workspace((splits + tiles) * count).view(splits + tiles, count)
    shared = {"g": g, "a": a, "offsets": offsets}
    sizes = {**_strides(g=g, a=a), "d_out": d_out, "d_in": d_in, "count": count}
    launches = [
        Launch(
            ghost_norm_kernel,
            (count, splits),
            {**shared, "partial": partial, **sizes, "splits": splits, "crossover": crossover},
            {**ghost.constants, "PRECISION": precision},
            ghost.num_warps,
            ghost.num_stages,
        )
    ]
    if tiles:
        launches.append(
            Launch(
                tile_norm_kernel,
                (tiles, count),
                {**shared, "partial": partial[splits:], **sizes, "crossover": crossover},
                {**tile.constants, "PRECISION": precision},
                tile.num_warps,
                tile.num_stages,
            )
        )
    return [*launches, sum_launch(partial, out, root=True)]


def dot_launches(
    g1: torch.Tensor,
    a1: torch.Tensor,
    offsets1: torch.Tensor,
    g2: torch.Tensor,
    a2: torch.Tensor,
    offsets2: torch.Tensor,
    out: torch.Tensor,
    workspace: Any,
    family: str,
    precision: str = "ieee",
    config: Config | None = None,
    ghost: bool | None = None,
) -> list[Launch]:
    """``out[b, c] = ⟨G1_b, G2_c⟩`` (float32, contiguous [B1, B2]); ``ghost`` None takes the cheaper way.

    ``workspace(n)`` returns n uninitialised float32 on the device; it holds the partial sums of every pair.
    """
    (n1, d_out), d_in, n2 = g1.shape, a1.shape[1], g2.shape[0]
    count1, count2 = out.shape
    if not out.numel():
        return []
    kind = _kind(precision, g1, a1, g2, a2)
    tile = lookup(TILE, family, kind)
    if not ghost and config is not None:
        tile = config
    tiles = triton.cdiv(d_out, tile.constants["BO"]) * triton.cdiv(d_in, tile.constants["BI"])
    if ghost is None:
        # The tiles' partial sums are bounded: with that many pairs the Gram tiles need no more memory than the result.
        fits = tiles * count1 * count2 <= _WORKSPACE
        ghost = not fits or dot_is_ghost(n1, n2, d_out, d_in, count1, count2)
    if ghost:
        config = config or lookup(GHOST, family, _ghost_kind(kind, min(n1 * count2, n2 * count1), count1 * count2))
        side = config.constants["BT"]
        pairs = count1 * count2
        tile_pairs = -(-n1 // (count1 * side)) * -(-n2 // (count2 * side))
        splits = max(1, min(-(-_BLOCKS // pairs), tile_pairs))
        partial = workspace(splits * pairs).view(splits, pairs)
        arguments = {
            "g1": g1, "a1": a1, "offsets1": offsets1, "g2": g2, "a2": a2, "offsets2": offsets2, "partial": partial,
            **_strides(g1=g1, a1=a1, g2=g2, a2=a2),
            "d_out": d_out, "d_in": d_in, "count2": count2, "pairs": pairs, "splits": splits,
        }  # fmt: skip
        constants = {**config.constants, "PRECISION": precision}
        first = Launch(ghost_dot_kernel, (pairs, splits), arguments, constants, config.num_warps, config.num_stages)
        return [first, sum_launch(partial, out)]
    config = tile
    by_first, by_second = count2, 1
    if not keep_first(n1, n2, count1, count2):
        g1, a1, offsets1, g2, a2, offsets2 = g2, a2, offsets2, g1, a1, offsets1
        count1, count2, by_first, by_second = count2, count1, 1, count2
    pairs = count1 * count2
    partial = workspace(tiles * pairs).view(tiles, pairs)
    arguments = {
        "g1": g1, "a1": a1, "offsets1": offsets1, "g2": g2, "a2": a2, "offsets2": offsets2, "partial": partial,
        **_strides(g1=g1, a1=a1, g2=g2, a2=a2),
        "d_out": d_out, "d_in": d_in, "count2": count2, "pairs": pairs, "by_first": by_first, "by_second": by_second,
    }  # fmt: skip
    constants = {**config.constants, "PRECISION": precision}
    first = Launch(tile_dot_kernel, (tiles, count1), arguments, constants, config.num_warps, config.num_stages)
    return [first, sum_launch(partial, out)]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype of the four kernels on aligned rows, and bfloat16 on rows of odd length."""

    def layer(d_out: int, d_in: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        tokens = 8 * 512
        return _meta(tokens, d_out, dtype=dtype), _meta(tokens, d_in, dtype=dtype), _meta(9, dtype=torch.int64)

    def launches(x: tuple[torch.Tensor, ...], precision: str, ghost: Config, tile: Config) -> dict[str, Launch]:
        norm = norm_launches(*x, _meta(8), _meta, arch, precision, (ghost, tile))
        dots = dot_launches(*x, *x, _meta(8, 8), _meta, arch, precision, ghost, True)
        kept = dot_launches(*x, *x, _meta(8, 8), _meta, arch, precision, tile, False)
        return {"norm": norm[0], "norm-tile": norm[1], "dot": dots[0], "dot-tile": kept[0]}

    for kind, ghost in all_configs(GHOST, arch):
        half = kind.startswith("half")
        tile = lookup(TILE, arch, kind.removesuffix(" short"))
        claims = {"tensor_cores": "none" if kind == "ieee" else "HMMA|HGMMA"}
        for dtype in (torch.bfloat16, torch.float16) if half else (torch.float32,):
            precision = "ieee" if half else kind
            for name, launch in launches(layer(768, 1024, dtype), precision, ghost, tile).items():
                if kind == "half odd":
                    continue
                if ("tile" in name and kind == "half short") or ("dot" in name and dtype == torch.float16):
                    continue  # the same kernel as that of another kind, the same instructions as for bfloat16
                case = f"{dtype_name(dtype)}-{kind.replace(' ', '-')}-{name}"
                yield case, launch, {**claims, "async_copies": "LDGSTS"}
            if kind == "half odd" and dtype == torch.bfloat16:
                for name, launch in launches(layer(767, 1025, dtype), precision, ghost, tile).items():
                    yield f"{dtype_name(dtype)}-odd-{name}", launch, claims
    total = sum_launch(_meta(64, 8192), _meta(8192))
    yield "sum", total, {"tensor_cores": "none"}
    yield "sum-root", sum_launch(_meta(600, 8), _meta(8), root=True), {"tensor_cores": "none"}
