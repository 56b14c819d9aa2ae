"""``P_gᵀ (Σ_t g_t a_tᵀ) P_a`` of every sequence in one pass over g and a, for at most 128 columns a side.

A program takes token tiles of one sequence. For each it forms ``g_t P_g`` [BT, KG] and ``a_t P_a`` [BT, KA] in
registers, the P tiles given or drawn on the fly, and contracts them over the tokens into [KG, KA], in registers too.
The contraction is float32 (three tf32 products) for half-precision inputs: as in plain torch, the projected rows are
never rounded. Long sequences are split over tokens: partial results, then a second kernel that adds them in a fixed
order. The epilogue scales, and casts, quantises to int8 with a scale per sequence, or packs sign bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import philox
from .configs import Config, Table, all_configs, lookup
from .fixed_order import is_aligned
from .launch import Launch
from .philox import draw_tile, drawn_dot
from .tiles import dtype_name, kind_of

__all__ = ["EPILOGUES", "LARGEST_K", "aot_cases", "project_launches", "token_splits"]

LARGEST_K = 128
EPILOGUES = ("float32", "bfloat16", "int8", "sign")
_BLOCKS = 264  # programs that fill a large card twice


def _config(bt: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BT": bt, "BK": bk}, warps, stages)


# Kinds: by the wider side (up to 64 columns, or 128), half precision on aligned rows or not, float32 by its precision.
# Chosen by what compiles without spills; not measured yet.
_SMALL = {
    "half 64": _config(64, 32, 8, 3),
    "half 128": _config(32, 32, 8, 3),
    "half odd 64": _config(32, 32, 4, 2),
    "half odd 128": _config(32, 32, 8, 2),
    "ieee 64": _config(16, 16, 4, 2),
    "ieee 128": _config(32, 16, 8, 2),
    "tf32 64": _config(32, 32, 4, 2),
    "tf32 128": _config(32, 32, 8, 2),
    "tf32x3 64": _config(32, 16, 4, 2),
    "tf32x3 128": _config(32, 16, 8, 2),
}
CONFIGS: Table = {
    "default": _SMALL,
    "sm_90": {"half 64": _config(64, 64, 8, 4), "half 128": _config(32, 64, 8, 3)},
    "sm_90 old": {"half 64": _config(32, 64, 8, 3), "half 128": _config(32, 32, 8, 3)},
}


@triton.jit
def _projected(
    x, P, rows, inside, d, x_row, x_col, p_row, p_col, k, seed_low, seed_high,
    STREAM: tl.constexpr, GIVEN: tl.constexpr, NORMAL: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x[rows] @ P`` as [BT, K] in registers; P is read, or drawn tile by tile."""
    total = tl.zeros((BT, K), tl.float32)
    column = tl.arange(0, K)
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        kept = inner < d
        left = tl.load(
            x + rows[:, None] * x_row + inner[None, :] * x_col, mask=inside[:, None] & kept[None, :], other=0
        )
        if GIVEN:
            right = tl.load(
                P + inner[:, None] * p_row + column[None, :] * p_col,
                mask=kept[:, None] & (column < k)[None, :],
                other=0,
            ).to(x.dtype.element_ty)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        else:
            right = draw_tile(inner.to(tl.int64), 0, seed_low, seed_high, STREAM, K, NORMAL, x.dtype.element_ty)
            total = drawn_dot(left, right, total, not NORMAL, PRECISION)
    return total


@triton.jit
def _finish(
    total, b, out, scale, k_g, k_a, factor, EPILOGUE: tl.constexpr, KG: tl.constexpr, KA: tl.constexpr
):  # fmt: skip
    """Scale ``total [KG, KA]`` and store it as sequence b of ``out``."""
    row = tl.arange(0, KG)
    column = tl.arange(0, KA)
    inside = (row < k_g)[:, None] & (column < k_a)[None, :]
    total = tl.where(inside, total * factor, 0.0)
    if EPILOGUE == "sign":
        # Whole bytes: the launcher takes this way only where 8 divides k_a.
        bits = tl.reshape((total < 0).to(tl.int32), [KG, KA // 8, 8])
        weights = (1 << tl.arange(0, 8))[None, None, :]
        octets = tl.sum(bits * weights, axis=2).to(tl.uint8)
        byte = tl.arange(0, KA // 8)
        at = out + b.to(tl.int64) * (k_g * (k_a // 8)) + row[:, None] * (k_a // 8) + byte[None, :]
        tl.store(at, octets, mask=(row < k_g)[:, None] & (byte < k_a // 8)[None, :])
    else:
        at = out + b.to(tl.int64) * (k_g * k_a) + row[:, None] * k_a + column[None, :]
        if EPILOGUE == "int8":
            largest = tl.max(tl.max(tl.abs(total), axis=1), axis=0)
            step = tl.div_rn(largest, 127.0)
            inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
            # Adding and taking away 1.5·2²³ rounds to the nearest integer, ties to even, as torch.round does.
            rounded = (total * inverse + 12582912.0) - 12582912.0
            tl.store(at, tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8), mask=inside)
            tl.store(scale + b, step)
        else:
            tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def project_kernel(
    g, a, offsets, P_g, P_a, out, scale,
    g_row, g_col, a_row, a_col, pg_row, pg_col, pa_row, pa_col,
    d_out, d_in, k_g, k_a, count, splits, seed_low, seed_high, factor,
    STREAM_G: tl.constexpr, STREAM_A: tl.constexpr, GIVEN_G: tl.constexpr, GIVEN_A: tl.constexpr, NORMAL: tl.constexpr,
    KG: tl.constexpr, KA: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, CONTRACT: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """One split of the tokens of one sequence; EPILOGUE "partial" stores the sum as it is, ``out [splits, B, ...]``."""
    b = tl.program_id(0)
    split = tl.program_id(1)
    start = tl.load(offsets + b)
    length = (tl.load(offsets + b + 1) - start).to(tl.int32)
    total = tl.zeros((KG, KA), tl.float32)
    for tile in range(split * BT, length, splits * BT):
        token = tile + tl.arange(0, BT)
        rows = start + token
        inside = token < length
        by_g = _projected(
            g, P_g, rows, inside, d_out, g_row, g_col, pg_row, pg_col, k_g, seed_low, seed_high,
            STREAM_G, GIVEN_G, NORMAL, BT, BK, KG, PRECISION,
        )  # fmt: skip
        by_a = _projected(
            a, P_a, rows, inside, d_in, a_row, a_col, pa_row, pa_col, k_a, seed_low, seed_high,
            STREAM_A, GIVEN_A, NORMAL, BT, BK, KA, PRECISION,
        )  # fmt: skip
        total = tl.dot(tl.trans(by_g), by_a, total, input_precision=CONTRACT)
    if EPILOGUE == "partial":
        row = tl.arange(0, KG)
        column = tl.arange(0, KA)
        at = out + (split.to(tl.int64) * count + b) * (k_g * k_a) + row[:, None] * k_a + column[None, :]
        tl.store(at, total, mask=(row < k_g)[:, None] & (column < k_a)[None, :])
    else:
        _finish(total, b, out, scale, k_g, k_a, factor, EPILOGUE, KG, KA)


@triton.jit
def finish_kernel(
    partial, out, scale, k_g, k_a, count, splits, factor,
    KG: tl.constexpr, KA: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The partial results of one sequence, added in order, and the epilogue."""
    b = tl.program_id(0)
    row = tl.arange(0, KG)
    column = tl.arange(0, KA)
    inside = (row < k_g)[:, None] & (column < k_a)[None, :]
    total = tl.zeros((KG, KA), tl.float32)
    at = partial + b * (k_g * k_a) + row[:, None] * k_a + column[None, :]
    for _ in range(0, splits):
        total += tl.load(at, mask=inside, other=0.0)
        at += count * (k_g * k_a)  # a split batch is small: 32 bits are enough
    _finish(total, b, out, scale, k_g, k_a, factor, EPILOGUE, KG, KA)


@triton.jit
def pack_kernel(x, out, size, octets, BLOCK: tl.constexpr):
    """Sign bits of contiguous float32 ``x [B, size]`` as ``out [B, octets]``: where rows of k_a end inside a byte."""
    b = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    element = byte[:, None] * 8 + bit[None, :]
    value = tl.load(x + b * size + element, mask=element < size, other=0.0)
    packed = tl.sum((value < 0).to(tl.int32) * (1 << bit)[None, :], axis=1).to(tl.uint8)
    tl.store(out + b * octets + byte, packed, mask=byte < octets)


def token_splits(tokens: int, count: int, tile: int) -> int:
    """Programs per sequence: enough to fill a card, each with at least four token tiles of an average sequence."""
    average = -(-tokens // max(count, 1))
    return max(1, min(-(-_BLOCKS // max(count, 1)), average // (4 * tile)))


def _width(k: int) -> int:
    return max(16, triton.next_power_of_2(k))


def choose(g: torch.Tensor, a: torch.Tensor, k: int, family: str, precision: str) -> Config:
    """The configuration for inputs and the wider side's number of columns."""
    kind = kind_of(g.dtype, precision)
    if kind == "half" and not (is_aligned(g) and is_aligned(a)):
        kind = "half odd"
    return lookup(CONFIGS, family, f"{kind} {64 if k <= 64 else 128}")


def project_launches(
    g: torch.Tensor,
    a: torch.Tensor,
    offsets: torch.Tensor,
    P_g: torch.Tensor | None,
    P_a: torch.Tensor | None,
    k_g: int,
    k_a: int,
    seed: int,
    distribution: str,
    epilogue: str,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    workspace: Any,
    family: str,
    precision: str = "ieee",
    config: Config | None = None,
) -> list[Launch]:
    """``out[b] = P_gᵀ G_b P_a`` through ``epilogue``; a side that is None is drawn, with variance 1/k.

    out: contiguous ``[B, k_g, k_a]`` in float32, bfloat16 or int8 (with ``scale [B]``), or uint8 ``[B, ceil(k_g·k_a /
    8)]``. ``workspace(n)`` returns n uninitialised float32 on the device.
    """
    (tokens, d_out), d_in, count = g.shape, a.shape[1], offsets.shape[0] - 1
    if not count:
        return []
    config = config or choose(g, a, max(k_g, k_a), family, precision)
    half = g.dtype != torch.float32
    splits = token_splits(tokens, count, config.constants["BT"])
    factor = 1.0
    if P_g is None:
        factor *= k_g**-0.5
    if P_a is None:
        factor *= k_a**-0.5
    widths = {"KG": _width(k_g), "KA": _width(k_a)}
    seed_low, seed_high = philox.key(seed)
    flat = epilogue == "sign" and k_a % 8 != 0  # bytes cross the rows: floats first, then a kernel that packs
    final = workspace(count * k_g * k_a).view(count, k_g * k_a) if flat else out
    stored = "float32" if flat else epilogue
    target = workspace(splits * count * k_g * k_a) if splits > 1 else final
    arguments = {
        "g": g, "a": a, "offsets": offsets, "P_g": P_g, "P_a": P_a, "out": target, "scale": scale,
        "g_row": g.stride(0), "g_col": g.stride(1), "a_row": a.stride(0), "a_col": a.stride(1),
        "pg_row": 0 if P_g is None else P_g.stride(0), "pg_col": 0 if P_g is None else P_g.stride(1),
        "pa_row": 0 if P_a is None else P_a.stride(0), "pa_col": 0 if P_a is None else P_a.stride(1),
        "d_out": d_out, "d_in": d_in, "k_g": k_g, "k_a": k_a, "count": count, "splits": splits,
        "seed_low": seed_low, "seed_high": seed_high, "factor": factor,
    }  # fmt: skip
    constants = {
        "STREAM_G": philox.STREAM_G, "STREAM_A": philox.STREAM_A, "GIVEN_G": P_g is not None,
        "GIVEN_A": P_a is not None, "NORMAL": distribution == "normal", **widths, **config.constants,
        "PRECISION": precision, "CONTRACT": "tf32x3" if half else precision,
        "EPILOGUE": "partial" if splits > 1 else stored,
    }  # fmt: skip
    launches = [Launch(project_kernel, (count, splits), arguments, constants, config.num_warps, config.num_stages)]
    if splits > 1:
        arguments = {
            "partial": target, "out": final, "scale": scale, "k_g": k_g, "k_a": k_a, "count": count, "splits": splits,
            "factor": factor,
        }  # fmt: skip
        launches.append(Launch(finish_kernel, (count,), arguments, {**widths, "EPILOGUE": stored}, 8, 2))
    if flat:
        octets = out.shape[1]
        launches.append(
            Launch(
                pack_kernel,
                (count, triton.cdiv(octets, 128)),
                {"x": final, "out": out, "size": k_g * k_a, "octets": octets},
                {"BLOCK": 128},
            )
        )
    return launches


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype with drawn signs; P given, Gaussians, every epilogue and small k for bfloat16."""

    def launches(dtype, k, precision, config, given=False, distribution="rademacher", epilogue="float32", d=1024, n=8):
        g, a, offsets = _meta(n * 128, d, dtype=dtype), _meta(n * 128, d, dtype=dtype), _meta(n + 1, dtype=torch.int64)
        P = _meta(d, k, dtype=dtype) if given else None
        out = {
            "float32": _meta(n, k, k),
            "bfloat16": _meta(n, k, k, dtype=torch.bfloat16),
            "int8": _meta(n, k, k, dtype=torch.int8),
            "sign": _meta(n, (k * k + 7) // 8, dtype=torch.uint8),
        }[epilogue]
        scale = _meta(n) if epilogue == "int8" else None
        return project_launches(
            g, a, offsets, P, P, k, k, 5, distribution, epilogue, out, scale, _meta, arch, precision, config
        )

    for kind, config in all_configs(CONFIGS, arch):
        half, odd = kind.startswith("half"), "odd" in kind
        precision = "ieee" if half else kind.split()[0]
        k = int(kind.split()[-1])
        claims = {"tensor_cores": "none" if precision == "ieee" and not half else "HMMA|HGMMA"}
        copies = {} if odd else {"async_copies": "LDGSTS"}
        d = 1023 if odd else 1024
        for dtype in (
            (torch.bfloat16, torch.float16) if half and not odd else (torch.bfloat16 if odd else torch.float32,)
        ):
            name = f"{dtype_name(dtype)}-{kind.replace(' ', '-')}"
            if dtype != torch.float16:
                [launch] = launches(dtype, k, precision, config, True, d=d, n=300)
                yield f"{name}-given", launch, {**claims, **copies}
            # tf32 differs from these in the product, which is the same as with P given.
            if half or kind in ("ieee 64", "tf32x3 64", "tf32x3 128"):
                [launch] = launches(dtype, k, precision, config, d=d, n=300)
                yield f"{name}-signs", launch, {**claims, **copies}
            if dtype == torch.bfloat16 and not odd:
                [launch] = launches(dtype, k, precision, config, distribution="normal", n=300)
                yield f"{name}-normal", launch, {**claims, **copies}
            if dtype == torch.bfloat16 and kind == "half 64":
                [launch] = launches(dtype, 16, precision, config, n=300)
                yield f"{name}-signs-16", launch, {**claims, **copies}
                for epilogue in ("int8", "sign"):
                    [launch] = launches(dtype, k, precision, config, epilogue=epilogue, n=300)
                    yield f"{name}-signs-{epilogue}", launch, {**claims, **copies}
    for epilogue in EPILOGUES:
        long = _long_finish(128, epilogue)
        yield f"finish-128-{epilogue}", long, {"tensor_cores": "none"}
    pack = launches(torch.bfloat16, 21, "ieee", None, epilogue="sign", n=300)[-1]
    yield "pack", pack, {"tensor_cores": "none"}


def _long_finish(k: int, epilogue: str) -> Launch:
    """The second kernel for one sequence that is split over its tokens."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "sign": torch.uint8}[epilogue]
    out = _meta(1, k * k // 8, dtype=dtype) if epilogue == "sign" else _meta(1, k, k, dtype=dtype)
    x = _meta(4096, 1024, dtype=torch.bfloat16)
    scale = _meta(1) if epilogue == "int8" else None
    return project_launches(
        x, x, _meta(2, dtype=torch.int64), None, None, k, k, 5, "rademacher", epilogue, out, scale, _meta, "default"
    )[1]
