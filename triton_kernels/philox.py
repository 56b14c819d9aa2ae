"""Philox4x32-10 in Triton: the numbers of pyinf/ops/philox.py and csrc/include/pyinf/philox.h, whatever the tiling.

Element (i, j) of a random matrix is a function of (seed, stream, i, j) alone; pyinf/ops/philox.py says what the counter
holds. Signs are equal bit for bit. Normal numbers are Box–Muller in float32 with an exact reduction of the angle (the
top bits of the word are the quadrant), so they agree with the float64 formula to a few units in the last place.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "STREAM_A",
    "STREAM_G",
    "STREAM_PROJECTION",
    "draw_tile",
    "drawn_dot",
    "key",
    "normal_tile",
    "sign_tile",
    "sparse_draw",
]

STREAM_PROJECTION, STREAM_G, STREAM_A = 0, 1, 2
"""The streams of pyinf.ops.reference (a test compares them)."""


def key(seed: int) -> tuple[int, int]:
    """The two key words of a seed, as signed 32-bit integers: what a kernel takes without specialising on the value."""
    words = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return tuple(w - (1 << 32) if w >= 1 << 31 else w for w in words)  # type: ignore[return-value]


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 tensors; shapes broadcast."""
    M0: tl.constexpr = 0xD2511F53
    M1: tl.constexpr = 0xCD9E8D57
    W0: tl.constexpr = 0x9E3779B9
    W1: tl.constexpr = 0xBB67AE85
    for _ in tl.static_range(10):
        old0 = c0
        old2 = c2
        c0 = tl.umulhi(old2, tl.full(old2.shape, M1, tl.uint32)) ^ c1 ^ k0
        c2 = tl.umulhi(old0, tl.full(old0.shape, M0, tl.uint32)) ^ c3 ^ k1
        c1 = old2 * tl.full(old2.shape, M1, tl.uint32)
        c3 = old0 * tl.full(old0.shape, M0, tl.uint32)
        k0 = k0 + tl.full((1,), W0, tl.uint32)
        k1 = k1 + tl.full((1,), W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _rows(i):
    """Low and high words of int64 row numbers."""
    return i.to(tl.uint32), (i >> 32).to(tl.uint32)


@triton.jit
def sign_tile(i, block, seed_low, seed_high, STREAM: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """±1 of rows ``i`` (int64 [R]) and columns ``128·block .. 128·block + K - 1`` as [R, K]; K is 16, 32, 64 or 128.

    One call serves 128 columns of a row.
    """
    low, high = _rows(i)
    w0, w1, w2, w3 = philox4x32(
        tl.zeros_like(low) + block,
        low,
        high,
        tl.full(low.shape, STREAM, tl.uint32),
        seed_low.to(tl.uint32, bitcast=True) + tl.zeros((1,), tl.uint32),
        seed_high.to(tl.uint32, bitcast=True) + tl.zeros((1,), tl.uint32),
    )
    if K <= 32:
        words = w0[:, None]
        shift = tl.arange(0, K).to(tl.uint32)[None, :]
    elif K == 64:
        words = tl.join(w0, w1)[:, :, None]
        shift = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    else:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [low.shape[0], 4])[:, :, None]
        shift = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    sign = ((words >> shift) & 1) << 31
    # The sign bit over the pattern of 1.0: no conversion from integer, which is slow.
    if DTYPE == tl.float32:
        ones = (sign | 0x3F800000).to(tl.float32, bitcast=True)
    elif DTYPE == tl.bfloat16:
        ones = ((sign >> 16) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        tl.static_assert(DTYPE == tl.float16)
        ones = ((sign >> 16) | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.reshape(ones, [low.shape[0], K])


@triton.jit
def _minus_log(w):
    """``-ln((w + 1) / 2³²)`` for uint32 w, accurate at both ends: above a half through the distance to one."""
    upper = w >= 0x80000000
    distance = (0xFFFFFFFF - w).to(tl.float32) * -2.3283064365386963e-10
    u = tl.where(upper, 1.0 + distance, (w.to(tl.float32) + 1.0) * 2.3283064365386963e-10)
    log = tl.log(u)
    rest = u - 1.0
    exact = rest == 0.0
    corrected = tl.where(exact, distance, log * (distance / tl.where(exact, 1.0, rest)))
    return -tl.where(upper, corrected, log)


@triton.jit
def _cos_sin(w):
    """Cosine and sine of ``2π w / 2³²``: quadrant from the top bits, then polynomials on [−π/4, π/4] (Cephes)."""
    quadrant = (w + 0x20000000) >> 30
    r = (w - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    s = r * r
    sine = r + r * s * (-1.6666654611e-1 + s * (8.3321608736e-3 + s * -1.9515295891e-4))
    cosine = 1.0 - 0.5 * s + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5))
    odd = (quadrant & 1) == 1
    c = tl.where(odd, sine, cosine)
    z = tl.where(odd, cosine, sine)
    c = tl.where(((quadrant + 1) & 2) == 2, -c, c)
    return c, tl.where((quadrant & 2) == 2, -z, z)


@triton.jit
def normal_tile(i, first, seed_low, seed_high, STREAM: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """Standard normal elements of rows ``i`` (int64 [R]) and columns ``first .. first + K - 1`` (``first`` a multiple
    of 4) as [R, K].

    One call serves four columns of a row.
    """
    low, high = _rows(i)
    Q: tl.constexpr = K // 4
    low = low[:, None] + tl.zeros((1, Q), tl.uint32)
    high = high[:, None] + tl.zeros((1, Q), tl.uint32)
    block = (first // 4 + tl.arange(0, Q)).to(tl.uint32)[None, :] + tl.zeros_like(low)
    w0, w1, w2, w3 = philox4x32(
        block,
        low,
        high,
        tl.full(low.shape, STREAM | 0x80000000, tl.uint32),
        seed_low.to(tl.uint32, bitcast=True) + tl.zeros((1, 1), tl.uint32),
        seed_high.to(tl.uint32, bitcast=True) + tl.zeros((1, 1), tl.uint32),
    )
    radius0 = tl.sqrt(2.0 * _minus_log(w0))
    radius1 = tl.sqrt(2.0 * _minus_log(w2))
    cos0, sin0 = _cos_sin(w1)
    cos1, sin1 = _cos_sin(w3)
    even = tl.join(radius0 * cos0, radius1 * cos1)
    odd = tl.join(radius0 * sin0, radius1 * sin1)
    return tl.reshape(tl.join(even, odd), [i.shape[0], K]).to(DTYPE)


@triton.jit
def draw_tile(
    i, first, seed_low, seed_high, STREAM: tl.constexpr, K: tl.constexpr, NORMAL: tl.constexpr, DTYPE: tl.constexpr
):
    """Rows ``i`` and columns ``first .. first + K - 1`` of either distribution; ``first`` is a multiple of 128."""
    if NORMAL:
        return normal_tile(i, first, seed_low, seed_high, STREAM, K, DTYPE)
    else:
        return sign_tile(i, first // 128, seed_low, seed_high, STREAM, K, DTYPE)


@triton.jit
def _high_part(x):
    """float32 x with the mantissa bits cut off that tf32 has no room for."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def drawn_dot(left, right, total, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """``total + left @ right`` for a right side that was made in registers; EXACT: of 0 and ±1.

    "tf32x3" is written out: Triton 3.2 stops at its own where an operand was not loaded. Of a right side that tf32
    holds exactly two products are enough.
    """
    if PRECISION == "tf32x3":
        high = _high_part(left)
        if EXACT:
            total = tl.dot(left - high, right, total, input_precision="tf32")
            total = tl.dot(high, right, total, input_precision="tf32")
        else:
            right_high = _high_part(right)
            total = tl.dot(left - high, right_high, total, input_precision="tf32")
            total = tl.dot(high, right - right_high, total, input_precision="tf32")
            total = tl.dot(high, right_high, total, input_precision="tf32")
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def sparse_draw(i, s, k, seed_low, seed_high, STREAM: tl.constexpr):
    """Bucket (uint32, below ``k``) and sign bit of the s-th non-zero of coordinates ``i`` (int64)."""
    low, high = _rows(i)
    w0, w1, _, _ = philox4x32(
        tl.full(low.shape, s, tl.uint32),
        low,
        high,
        tl.full(low.shape, STREAM | 0x40000000, tl.uint32),
        seed_low.to(tl.uint32, bitcast=True) + tl.zeros((1,), tl.uint32),
        seed_high.to(tl.uint32, bitcast=True) + tl.zeros((1,), tl.uint32),
    )
    return tl.umulhi(w0, tl.zeros_like(w0) + k.to(tl.uint32)), w1 & 1


@triton.jit
def fill_kernel(
    out,
    rows,
    columns,
    first_row,
    first_column,
    seed_low,
    seed_high,
    STREAM: tl.constexpr,
    NORMAL: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Writes a window of the endless matrix: what tests and ``pyinf doctor --verify`` compare."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * K + tl.arange(0, K)
    first = first_column + tl.program_id(1) * K
    tile = draw_tile(first_row + r.to(tl.int64), first, seed_low, seed_high, STREAM, K, NORMAL, tl.float32)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * columns + c[None, :], tile, mask=inside)
