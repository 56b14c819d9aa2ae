"""Per-sequence gradients in a layer's eigenbasis, by the order of products that costs least."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["input_rows", "rotate_input", "rotate_output", "rotated_gradients", "rotation_is_first", "working"]


def working(x: Tensor) -> Tensor:
    """``x`` in the dtype its products are formed in: fp64 stays, everything else becomes fp32 (accumulation is never
    half).
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def input_rows(a: Tensor, bias: bool) -> Tensor:
    """``[N, d_in(+1)]``: the layer's inputs, with a last column of ones where it has a bias."""
    a = working(a)
    return torch.cat([a, a.new_ones(a.shape[0], 1)], dim=1) if bias else a


def rotate_input(a: Tensor, basis: Tensor | None, bias: bool) -> Tensor:
    """``[a, 1] U_A`` without forming the column of ones."""
    if basis is None:
        return input_rows(a, bias)
    a = working(a)
    return torch.addmm(basis[-1], a, basis[:-1]) if bias else a @ basis


def rotate_output(g: Tensor, basis: Tensor | None) -> Tensor:
    """``g U_S``."""
    g = working(g)
    return g if basis is None else g @ basis


def rotation_is_first(tokens: float, other: int) -> bool:
    """Whether rotating one side's rows costs less than rotating that side of the formed gradient.

    Rows: ``2·T·d²`` FLOPs; the gradient: ``2·other·d²``, with ``other`` the width of the other side.
    """
    return tokens < other


def rotated_gradients(
    g: Tensor, a: Tensor, offsets: Tensor, U_S: Tensor | None, U_A: Tensor | None, bias: bool
) -> Iterator[Tensor]:
    """``U_Sᵀ G_b U_A`` for each sequence ``b``, one at a time; the yielded buffer is overwritten by the next.

    Each side is rotated before or after the contraction over tokens, whichever is cheaper at this length.
    """
    bounds = offsets.tolist()
    columns = a.shape[1] + int(bias)
    mean_tokens = g.shape[0] / max(1, len(bounds) - 1)
    late_out = U_S is not None and not rotation_is_first(mean_tokens, columns)
    late_in = U_A is not None and not rotation_is_first(mean_tokens, g.shape[1])
    left = working(g) if late_out else rotate_output(g, U_S)
    right = input_rows(a, bias) if late_in else rotate_input(a, U_A, bias)
    out = left.new_empty(g.shape[1], columns)
    spare = torch.empty_like(out) if late_out or late_in else out
    for start, stop in pairwise(bounds):
        torch.mm(left[start:stop].T, right[start:stop], out=out)
        result, other = out, spare
        if late_out and U_S is not None:
            torch.mm(U_S.T, result, out=other)
            result, other = other, result
        if late_in and U_A is not None:
            torch.mm(result, U_A, out=other)
            result, other = other, result
        yield result
