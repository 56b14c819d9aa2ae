"""Random matrices that are never stored: element (i, j) is a function of (seed, stream, i, j) alone.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The same numbers
come from csrc/include/pyinf/philox.h. Layout of the 128-bit counter for element (i, j), all words 32 bits:

- Rademacher: counter = (j >> 7, i & 0xffffffff, i >> 32, stream); bit ``j & 127`` of the output (word ``(j & 127) >>
  5``, bit ``j & 31``); the element is +1 for bit 0 and −1 for bit 1.
- normal: counter = (j >> 2, i & 0xffffffff, i >> 32, stream | 0x80000000); words (w0, w1) give elements ``j & 3`` = 0,
  1 and (w2, w3) give 2, 3 by Box–Muller: ``sqrt(-2 ln((w0 + 1) / 2³²))`` times the cosine (even) or sine (odd) of ``2π
  w1 / 2³²``.
- sparse: counter = (s, i & 0xffffffff, i >> 32, stream | 0x40000000) for the s-th non-zero of column i; the bucket is
  ``(w0 · k) >> 32`` and the sign is +1 for bit 0 of w1 equal to 0, else −1.

The key is (seed & 0xffffffff, seed >> 32 & 0xffffffff).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyinf.errors import ConfigError

__all__ = ["DISTRIBUTIONS", "need_distribution", "philox4x32", "random_matrix", "sparse_coordinates"]

DISTRIBUTIONS = ("rademacher", "normal")
_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF
NORMAL_BIT, SPARSE_BIT = 0x80000000, 0x40000000


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32. Words are int64 tensors holding values below 2³²; shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _LOW, key[1] & _LOW
    for _ in range(10):
        p0, p1 = c0 * _signed(_M0), c2 * _signed(_M1)  # wraps mod 2⁶⁴: the bits are those of the unsigned product
        hi0, lo0 = (p0 >> 32) & _LOW, p0 & _LOW
        hi1, lo1 = (p1 >> 32) & _LOW, p1 & _LOW
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _key(seed: int) -> tuple[int, int]:
    return seed & _LOW, (seed >> 32) & _LOW


def _range(start: int, stop: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int64, device=device)


def need_distribution(distribution: str) -> None:
    """Raise ``ConfigError`` for a name that is not a distribution of random projections."""
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"unknown distribution {distribution!r}; choose one of: {', '.join(DISTRIBUTIONS)}")


def random_matrix(
    rows: tuple[int, int],
    columns: tuple[int, int],
    seed: int,
    stream: int = 0,
    distribution: str = "rademacher",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Elements ``rows[0]:rows[1]`` by ``columns[0]:columns[1]`` of the endless matrix (seed, stream), unit variance.

    Any window of it gives the same elements, however it is cut. ``distribution``: "rademacher" (±1) or "normal".
    Raises ``ConfigError`` for another distribution.
    """
    (i0, i1), (j0, j1) = rows, columns
    need_distribution(distribution)
    if i1 <= i0 or j1 <= j0:
        return torch.zeros((max(i1 - i0, 0), max(j1 - j0, 0)), dtype=dtype, device=device)
    shift = 7 if distribution == "rademacher" else 2
    block0, block1 = j0 >> shift, ((j1 - 1) >> shift) + 1
    i = _range(i0, i1, device)[:, None]
    block = _range(block0, block1, device)[None, :]
    tag = stream if distribution == "rademacher" else stream | NORMAL_BIT
    words = torch.stack(philox4x32((block, i & _LOW, i >> 32, torch.full_like(i, tag)), _key(seed)), -1)
    if distribution == "rademacher":
        # Bytes of the words in rising order of bits (little-endian): an eighth of the memory of shifting whole words.
        octets = words.to(torch.int32).view(torch.uint8)
        bits = (octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
        full = bits.to(dtype).mul_(-2).add_(1)
    else:
        w = words.double() * 2.0**-32
        radius = torch.sqrt(-2.0 * torch.log(w[..., 0::2] + 2.0**-32))
        angle = 2.0 * math.pi * w[..., 1::2]
        full = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).to(dtype)
    full = full.reshape(i1 - i0, (block1 - block0) << shift)
    first = block0 << shift
    return full[:, j0 - first : j1 - first].contiguous()


def sparse_coordinates(
    rows: tuple[int, int], k: int, nnz: int, seed: int, stream: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Buckets ``[n, nnz]`` (int64, below k) and signs ``[n, nnz]`` (float32, ±1) of input coordinates
    ``rows[0]:rows[1]``.
    """
    i = _range(rows[0], rows[1], device)[:, None]
    s = _range(0, nnz, device)[None, :]
    w0, w1, _, _ = philox4x32((s, i & _LOW, i >> 32, torch.full_like(i, stream | SPARSE_BIT)), _key(seed))
    return (w0 * k) >> 32, (1 - 2 * (w1 & 1)).float()
