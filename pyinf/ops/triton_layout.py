"""Operands as the Triton matrix kernels read them fastest: one dtype, rows in pieces of 16 elements, zero-padded."""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.ops.packing import bounds
from pyinf.ops.triton_backend import ALIGNMENT, LARGEST_STRIDE

__all__ = ["common_dtype", "device_offsets", "near", "one_device", "padded", "rounded"]


def rounded(size: int) -> int:
    """``size`` rounded up to a multiple of 16."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def padded(x: Tensor, rows: int, columns: int, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """``x [..., r, c]`` as ``[..., rows, columns]`` in ``dtype``, what is new filled with ``fill``; x itself where it
    has that form already.

    Triton fetches rows in 16-byte pieces, and asynchronously, only where it knows that 16 divides their stride and
    their length; the layers of GPT-2, whose bias is one more column, are one element off. The copy costs one read and
    one write of x.
    """
    fits = tuple(x.shape[-2:]) == (rows, columns) and x.dtype == dtype
    aligned = x.stride(-1) == 1 and x.stride(-2) % ALIGNMENT == 0 and x.stride(-2) < LARGEST_STRIDE
    if fits and aligned and columns % ALIGNMENT == 0 and x.data_ptr() % 16 == 0:
        return x
    out = torch.empty(*x.shape[:-2], rows, columns, dtype=dtype, device=x.device)
    r, c = x.shape[-2:]
    out[..., :r, :c] = x
    out[..., :r, c:] = fill
    out[..., r:, :] = fill
    return out


def near(x: Tensor) -> Tensor:
    """x, or a contiguous copy of it where its elements lie too far apart for 32-bit offsets inside a tile."""
    return x.contiguous() if any(stride >= LARGEST_STRIDE for stride in x.stride()[-2:]) else x


def common_dtype(*tensors: Tensor | None) -> torch.dtype | None:
    """The one dtype in which these are multiplied: theirs, or float32 where one of them is float32; None for a mixture
    of bfloat16 and float16, which has none without a loss."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float32 if torch.float32 in dtypes else None


def one_device(*tensors: Tensor | None) -> str | None:
    """A reason where tensors are on several devices."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) == 1:
        return None
    return f"Triton kernels take tensors of one device; got {' and '.join(sorted(map(str, devices)))}"


def device_offsets(offsets: Tensor, rows: int, device: torch.device) -> Tensor:
    """Offsets as a kernel reads them. On the CPU they are checked (``ConfigError``); those that are on the device
    already were checked by whoever put them there."""
    if offsets.device.type == "cpu":
        bounds(offsets, rows)
    return offsets.to(device, torch.int64).contiguous()
