"""Storage formats of projected gradients: int8 rows with one scale each, and packed sign bits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_signs", "quantise_int8", "unpack_signs"]


def pack_signs(x: Tensor) -> Tensor:
    """Sign bits of ``x [..., d]`` as uint8 ``[..., ceil(d / 8)]``; bit ``i % 8`` of byte ``i // 8`` is set where x_i <
    0.

    The bits after the last element are 0 in every row, so they never differ between two rows.
    """
    d = x.shape[-1]
    bits = (x < 0).to(torch.uint8)
    if d % 8:
        bits = torch.nn.functional.pad(bits, (0, 8 - d % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of :func:`pack_signs`: ±1 of shape ``[..., d]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts) & 1
    return (1 - 2 * bits.flatten(-2).to(torch.int8)).to(dtype)[..., :d]


def quantise_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``x [B, d]`` as int8 in [−127, 127] and a float32 scale ``[B]`` with ``x ≈ scale · int8`` (absolute
    maximum).

    A row of zeros has scale 0. The largest error of an element is half its row's scale.
    """
    x = x.float()
    scale = x.abs().amax(-1) / 127 if x.shape[-1] else x.new_zeros(x.shape[0])
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (x * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale
