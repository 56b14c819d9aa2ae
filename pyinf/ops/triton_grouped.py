"""The grouped launches of grouped.py, by the Triton kernels of triton_kernels/grouped.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyinf.ops.packing import bounds
from pyinf.ops.precision import float32_precision
from pyinf.ops.triton_backend import aligned_rows, run

__all__ = ["covariances", "squared_gradients"]


def _aligned(rows: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Rows that a kernel may read in 16-byte pieces, of one layout for all layers, and how far they may be read."""
    made = [aligned_rows(x) for x in rows]
    if len({(x.stride(), read) for x, read in made}) > 1:  # some were copied and others not: then all are
        width = max(read for _, read in made)
        copies = [x.new_empty(x.shape[0], width) for x in rows]
        for copy, x in zip(copies, rows, strict=True):
            copy[:, : x.shape[1]] = x
        made = [(copy, width) for copy in copies]
    return [x for x, _ in made], made[0][1]


def _on(device: torch.device, table: Tensor) -> Tensor:
    """The table of addresses on the device, without making the host wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def covariances(C: Sequence[Tensor], x: Sequence[Tensor]) -> None:
    """``C_l += Σ_t x_lt x_ltᵀ``, lower triangles, for layers of one shape and layout, without a bias."""
    from pyinf.triton_kernels import grouped as kernels

    tokens, d = x[0].shape
    if tokens == 0 or d == 0:
        return
    rows, read = _aligned(x)
    table = _on(C[0].device, kernels.table_of(C, rows))
    run([kernels.covariance_launch(table, C[0], rows[0], float32_precision(), read=read, columns=d)], C[0].device)


def squared_gradients(Lam: Sequence[Tensor], g: Sequence[Tensor], a: Sequence[Tensor], offsets: Tensor) -> None:
    """``Λ_l += Σ_b (Σ_t g_lt a_ltᵀ)²`` for layers of one shape and layout."""
    from pyinf.triton_kernels import grouped as kernels

    if not offsets.is_cuda:
        bounds(offsets, g[0].shape[0])
    if Lam[0].numel() == 0 or g[0].shape[0] == 0 or offsets.numel() < 2:
        return
    device = Lam[0].device
    left, read_g = _aligned(g)
    right, read_a = _aligned(a)
    table = _on(device, kernels.table_of(Lam, left, right))
    marks = offsets.to(device, torch.int64).contiguous()
    precision = float32_precision()
    launch = kernels.squared_gradients_launch(
        table, Lam[0], left[0], right[0], marks, precision, read_g=read_g, read_a=read_a
    )
    run([launch], device)
