"""Rows as bytes: six formats, each one fixed number of bytes a row.

A row is the values of every group one after the other (each group begins on a byte), then one scale a group where the
format has scales. A vector section is one group; a section of factors is one group for every ``u_c`` and every ``v_c``,
because their sizes have nothing to do with each other. Everything is little-endian.

======== ============================================== ==========================================
format   bytes of a group of w values                   scale
======== ============================================== ==========================================
float32  4w                                             none
bfloat16 2w                                             none
float16  2w, value / scale                              float32, the power of two below max |x|
int8     w, two's complement in [−127, 127]             float32, max |x| / 127
int4     ⌈w/2⌉, value + 8 in four bits, low half first  bfloat16, max |x| / 7
1bit     ⌈w/8⌉, bit i%8 of byte i//8 set where x_i < 0  bfloat16, mean |x|
======== ============================================== ==========================================
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyinf.errors import ConfigError, NonFiniteError
from pyinf.ops.quantise import pack_signs
from pyinf.store.sections import Section, row_width

__all__ = [
    "FORMATS",
    "as_tensor",
    "decode",
    "encode",
    "groups",
    "row_bytes",
    "scale_bytes",
    "scales",
    "value_bytes",
    "viewed",
]

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "1bit")

_SCALE: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": None,
    "float16": torch.float32,
    "int8": torch.float32,
    "int4": torch.bfloat16,
    "1bit": torch.bfloat16,
}
_VALUE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}

if sys.byteorder != "little":  # torch views bytes in the order of the machine
    raise ImportError("pyinf.store keeps little-endian files; this machine is big-endian")


class Run(NamedTuple):
    """``count`` consecutive groups of ``width`` columns each: first column, first group, first byte of the values."""

    column: int
    group: int
    byte: int
    count: int
    width: int
    nbytes: int  # of one group


def _need_format(format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; choose one of: {', '.join(FORMATS)}")


def _group_bytes(width: int, format: str) -> int:
    if format == "1bit":
        return (width + 7) // 8
    if format == "int4":
        return (width + 1) // 2
    return width * _VALUE[format].itemsize


def groups(sections: Sequence[Section]) -> list[int]:
    """Width of every group, in the order of the columns."""
    found: list[int] = []
    for section in sections:
        if section.kind == "factors":
            c, m, n = section.shape
            found += [m] * c + [n] * c
        else:
            found.append(section.width)
    return found


def _runs(sections: Sequence[Section], format: str) -> list[Run]:
    found: list[Run] = []
    column = byte = 0
    for index, width in enumerate(groups(sections)):
        nbytes = _group_bytes(width, format)
        if found and found[-1].width == width:
            found[-1] = found[-1]._replace(count=found[-1].count + 1)
        else:
            found.append(Run(column, index, byte, 1, width, nbytes))
        column, byte = column + width, byte + nbytes
    return found


def value_bytes(sections: Sequence[Section], format: str) -> int:
    """Bytes of a row before its scales."""
    _need_format(format)
    return sum(_group_bytes(width, format) for width in groups(sections))


def scale_bytes(sections: Sequence[Section], format: str) -> int:
    """Bytes of a row's scales."""
    _need_format(format)
    dtype = _SCALE[format]
    return 0 if dtype is None else dtype.itemsize * len(groups(sections))


def row_bytes(sections: Sequence[Section], format: str) -> int:
    """Bytes of a row. Raises ``ConfigError`` for an unknown format."""
    return value_bytes(sections, format) + scale_bytes(sections, format)


def encode(rows: Tensor, sections: Sequence[Section], format: str) -> np.ndarray:
    """Rows as bytes: float ``[B, width]`` to uint8 ``[B, row_bytes]``.

    Largest error of a value: half a unit in the last place for the floats, ``scale / 2`` for int8, and for int4
    ``scale / 2`` as well (its scale is rounded up to bfloat16, so that nothing is clipped).
    Raises ``NonFiniteError`` naming the row where a value is NaN or infinite (also: too large for the format), and
    ``ConfigError`` where the width does not fit.
    """
    size = row_bytes(sections, format)
    if rows.dim() != 2 or rows.shape[1] != row_width(sections):
        raise ConfigError(f"rows must be [B, {row_width(sections)}]; got {tuple(rows.shape)}")
    x = rows.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(1)).nonzero()[0])
        raise NonFiniteError(f"row {bad} of {x.shape[0]} holds NaN or infinity; look at the gradient of that example")
    out = torch.zeros(x.shape[0], size, dtype=torch.uint8)
    if not len(x):
        return out.numpy()
    dtype, first = _SCALE[format], value_bytes(sections, format)
    for run in _runs(sections, format):
        part = x[:, run.column : run.column + run.count * run.width].reshape(len(x), run.count, run.width)
        values, scale = _encode_groups(part, format)
        out[:, run.byte : run.byte + run.count * run.nbytes] = values.reshape(len(x), run.count * run.nbytes)
        if dtype is not None:
            at = first + run.group * dtype.itemsize
            out[:, at : at + run.count * dtype.itemsize] = scale.contiguous().view(torch.uint8)
    if format == "bfloat16" and not bool(torch.isfinite(out.view(torch.bfloat16)).all()):
        raise NonFiniteError("a value is too large for bfloat16; use float32")
    return out.numpy()


def _encode_groups(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Float32 ``[B, groups, w]`` as uint8 ``[B, groups, bytes]``, and the scales ``[B, groups]`` as stored."""
    if format in ("float32", "bfloat16"):
        return x.to(_VALUE[format]).contiguous().view(torch.uint8), x
    if format == "1bit":
        return pack_signs(x), x.abs().mean(-1).to(torch.bfloat16)
    largest = x.abs().amax(-1)
    if format == "float16":
        # A power of two, so that the only rounding is that of float16; its exponent is kept in the normal range.
        scale = torch.ldexp(torch.ones_like(largest), (torch.frexp(largest).exponent - 1).clamp_(-126))
        scale = torch.where(largest > 0, scale, torch.zeros_like(scale))
        return _divided(x, scale).half().view(torch.uint8), scale
    if format == "int8":
        scale = largest / 127
        return _divided(x, scale).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8), scale
    exact = largest / 7
    scale = exact.to(torch.bfloat16)
    above = (scale.view(torch.int16) + 1).view(torch.bfloat16)  # the next larger bfloat16
    scale = torch.where((scale.float() < exact) & above.isfinite(), above, scale)
    codes = (_divided(x, scale.float()).round_().clamp_(-7, 7) + 8).to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    # Division, not a product with the inverse: the inverse of a tiny scale is infinite.
    return x / torch.where(scale > 0, scale, torch.ones_like(scale))[..., None]


def scales(raw: np.ndarray | Tensor, sections: Sequence[Section], format: str) -> Tensor | None:
    """Scales of rows: float32 ``[B, groups]``; None for formats without."""
    dtype = _SCALE[format]
    if dtype is None:
        return None
    data = _bytes(raw, sections, format)
    return viewed(data[:, value_bytes(sections, format) :], dtype).float()


def decode(raw: np.ndarray | Tensor, sections: Sequence[Section], format: str) -> Tensor:
    """The inverse of :func:`encode`: uint8 ``[B, row_bytes]`` to float32 ``[B, width]``; 1bit gives ±scale."""
    data = _bytes(raw, sections, format)
    scale = scales(data, sections, format)
    out = torch.empty(data.shape[0], row_width(sections))
    for run in _runs(sections, format):
        part = data[:, run.byte : run.byte + run.count * run.nbytes]
        values = _decode_groups(part, run, format)
        if scale is not None:
            values = values * scale[:, run.group : run.group + run.count, None]
        out[:, run.column : run.column + run.count * run.width] = values.reshape(len(data), run.count * run.width)
    return out


def viewed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes ``[B, n]`` as ``dtype``: a view where they lie together and aligned, else a copy."""
    if not data.numel():
        return data.new_empty((data.shape[0], data.shape[1] // dtype.itemsize), dtype=dtype)
    together = data.is_contiguous() and data.storage_offset() % dtype.itemsize == 0
    if not together or data.data_ptr() % dtype.itemsize:
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(dtype)


def _decode_groups(part: Tensor, run: Run, format: str) -> Tensor:
    """uint8 ``[B, groups·bytes]`` to ``[B, groups, w]``, not yet multiplied by the scales."""
    if format in _VALUE:
        return viewed(part, _VALUE[format]).reshape(len(part), run.count, run.width).float()
    if format == "1bit":
        table = _sign_table()
        signs = table.index_select(0, part.reshape(-1).int()).reshape(len(part), run.count, run.nbytes * 8)
        return signs[..., : run.width]
    codes = torch.stack((part & 15, part >> 4), -1).reshape(len(part), run.count, run.nbytes * 2)
    return codes[..., : run.width].float() - 8


_TABLE: list[Tensor] = []


def _sign_table() -> Tensor:
    """±1 of the eight bits of every byte: float32 ``[256, 8]``."""
    if not _TABLE:
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        _TABLE.append(1.0 - 2.0 * bits)
    return _TABLE[0]


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory, which may be a read-only memory map: do not write into it."""
    return torch.from_numpy(array)


with (
    warnings.catch_warnings()
):  # torch says once a process that read-only arrays must not be written; nothing here does
    warnings.simplefilter("ignore")
    as_tensor(np.frombuffer(b"\0", np.uint8))


def _bytes(raw: np.ndarray | Tensor, sections: Sequence[Section], format: str) -> Tensor:
    size = row_bytes(sections, format)
    data = as_tensor(raw) if isinstance(raw, np.ndarray) else raw
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != size:
        raise ConfigError(f"rows of format {format!r} must be uint8 [B, {size}]; got {data.dtype} {tuple(data.shape)}")
    return data
