"""The packed layout: rows of all sequences one after the other, and where each sequence starts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyinf.errors import ConfigError

__all__ = ["Packed", "accumulator_dtype", "bounds", "pack", "unpack_tokens"]


class Packed(NamedTuple):
    """``g [N, d_out]``, ``a [N, d_in]``, ``offsets [B+1]``; ``mask`` is kept when rows were dropped from [B, T]."""

    g: Tensor
    a: Tensor
    offsets: Tensor
    shape: tuple[int, int] | None
    mask: Tensor | None


def accumulator_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, else float32: half precision is never accumulated in."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def pack(g: Tensor, a: Tensor, offsets: Tensor | None = None, mask: Tensor | None = None) -> Packed:
    """Bring layer inputs and output gradients to the packed layout.

    ``g [B, T, d_out]``, ``a [B, T, d_in]`` with ``mask [B, T]`` (True = counted), or ``[N, d]`` with ``offsets`` (None
    = one sequence) and optionally ``mask [N]``. A view where nothing is masked, a gather of the counted rows otherwise.
    Raises ``ConfigError`` when the shapes do not fit each other.
    """
    if g.dim() != a.dim() or g.dim() not in (2, 3) or g.shape[:-1] != a.shape[:-1]:
        raise ConfigError(
            "g and a must be [N, d] or [B, T, d] with the same leading sizes; "
            f"got {tuple(g.shape)} and {tuple(a.shape)}"
        )
    if mask is not None and mask.shape != g.shape[:-1]:
        raise ConfigError(f"mask must have the shape {tuple(g.shape[:-1])}; got {tuple(mask.shape)}")
    if mask is not None:
        mask = mask.bool()
        if bool(mask.all()):
            mask = None
    if g.dim() == 3:
        if offsets is not None:
            raise ConfigError("offsets belong to the packed layout [N, d]; with [B, T, d] give a mask instead")
        batch, length = g.shape[:2]
        if mask is None:
            marks = torch.arange(batch + 1, dtype=torch.int64) * length
            return Packed(g.reshape(-1, g.shape[2]), a.reshape(-1, a.shape[2]), marks, (batch, length), None)
        counts = mask.sum(1).cpu()
        return Packed(g[mask], a[mask], _starts(counts), (batch, length), mask)
    if offsets is None:
        offsets = torch.tensor([0, g.shape[0]], dtype=torch.int64)
    if mask is None:
        return Packed(g, a, offsets, None, None)
    kept = torch.zeros(g.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(mask.cpu(), 0, out=kept[1:])
    return Packed(g[mask], a[mask], kept[offsets.cpu()], None, mask)


def _starts(counts: Tensor) -> Tensor:
    marks = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=marks[1:])
    return marks


def unpack_tokens(values: Tensor, packed: Packed) -> Tensor:
    """Scores per packed row ``[Q, N]`` back to the caller's positions; positions that were masked get 0."""
    if packed.mask is not None:
        full = values.new_zeros((values.shape[0], *packed.mask.shape))
        full[:, packed.mask] = values
        return full
    return values if packed.shape is None else values.reshape(values.shape[0], *packed.shape)


def bounds(offsets: Tensor, rows: int) -> list[int]:
    """``offsets`` as a list, checked: starts at 0, never falls, ends at ``rows``. Raises ``ConfigError`` otherwise."""
    marks = offsets.tolist()
    if not marks or marks[0] != 0 or marks[-1] != rows:
        raise ConfigError(f"offsets must run from 0 to the {rows} rows of g and a; got {marks[:1]} ... {marks[-1:]}")
    if sorted(marks) != marks:
        raise ConfigError("offsets must never fall from one sequence to the next")
    return marks
