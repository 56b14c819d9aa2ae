"""``gradient_dot`` and ``gradient_norm`` by Triton (triton_kernels/gradients.py): Gram or gradient tiles on chip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyinf.ops import costs
from pyinf.ops.packing import bounds
from pyinf.ops.precision import float32_precision
from pyinf.ops.triton_backend import check_tensors, register_triton, run

__all__ = ["check_layer", "device_offsets", "far_columns", "gradient_dot", "gradient_norm", "workspace_on"]


def check_layer(*layers: tuple[Tensor, Tensor]) -> str | None:
    """Why the (g, a) of these layers cannot go to a kernel, or None: one device, one dtype for all."""
    every = [tensor for layer in layers for tensor in layer]
    reason = check_tensors(*every)
    if reason is None and any(tensor.dtype != every[0].dtype for tensor in every):
        reason = f"the Triton kernel takes g and a of one dtype; got {', '.join(str(x.dtype) for x in every)}"
    return reason or far_columns(*every)


def far_columns(*matrices: Tensor) -> str | None:
    """Why the columns of these ``[N, d]`` are too far apart for offsets of 32 bits inside a row, or None. Rows may lie
    anywhere.
    """
    if any(x.shape[1] * x.stride(1) >= 1 << 31 for x in matrices):
        return "the last column of a row lies 2**31 elements or more after the first; call .contiguous()"
    return None


def device_offsets(offsets: Tensor, rows: int, device: torch.device) -> Tensor:
    """``offsets`` as contiguous int64 on ``device``; those already there were checked by whoever put them there."""
    if offsets.device.type == "cpu":
        bounds(offsets, rows)
    return offsets.to(device, torch.int64, non_blocking=True).contiguous()


def workspace_on(device: torch.device) -> Callable[[int], Tensor]:
    """Allocates n uninitialised float32 on ``device``."""
    return lambda n: torch.empty(n, dtype=torch.float32, device=device)


def _check_dot(g1: Tensor, a1: Tensor, offsets1: Tensor, g2: Tensor, a2: Tensor, offsets2: Tensor) -> str | None:
    reason = check_layer((g1, a1), (g2, a2))
    if reason is None and max(offsets1.numel(), offsets2.numel(), offsets1.numel() * offsets2.numel() >> 15) > 65536:
        reason = "the Triton kernel takes at most 65535 sequences a side and 2**31 pairs"
    return reason


def _prefer_dot(g1: Tensor, a1: Tensor, offsets1: Tensor, g2: Tensor, a2: Tensor, offsets2: Tensor) -> bool:
    """Whether the kernel needs no more operations than torch, which may keep a block of all gradients in memory."""
    from pyinf.triton_kernels import gradients

    (n1, d_out), (n2, d_in) = g1.shape, a2.shape
    count1, count2 = offsets1.numel() - 1, offsets2.numel() - 1
    ghost = costs.ghost_dot_flops(n1, n2, d_out, d_in)
    kept = gradients.tile_dot_flops(n1, n2, d_out, d_in, count1, count2)
    torch_cost = min(ghost, costs.materialised_dot_flops(n1, n2, d_out, d_in, count1, count2))
    return min(ghost, kept) <= torch_cost


def gradient_dot(g1: Tensor, a1: Tensor, offsets1: Tensor, g2: Tensor, a2: Tensor, offsets2: Tensor) -> Tensor:
    """``⟨G1_b, G2_c⟩`` for every pair, float32 ``[B1, B2]``, by the cheaper of Gram tiles and gradient tiles."""
    from pyinf.triton_kernels.configs import family_of
    from pyinf.triton_kernels.gradients import dot_launches

    device = g1.device
    marks1, marks2 = device_offsets(offsets1, g1.shape[0], device), device_offsets(offsets2, g2.shape[0], device)
    out = torch.empty(marks1.numel() - 1, marks2.numel() - 1, dtype=torch.float32, device=device)
    precision = float32_precision() if g1.dtype == torch.float32 else "ieee"
    run(
        dot_launches(g1, a1, marks1, g2, a2, marks2, out, workspace_on(device), family_of(device), precision),
        device,
    )
    return out


def _check_norm(g: Tensor, a: Tensor, offsets: Tensor) -> str | None:
    reason = check_layer((g, a))
    if reason is None and offsets.numel() - 1 > 65535:
        reason = "the Triton kernel takes at most 65535 sequences"
    return reason


def gradient_norm(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """``‖G_b‖``, float32 ``[B]``; every sequence by the cheaper way for its length."""
    from pyinf.triton_kernels.configs import family_of
    from pyinf.triton_kernels.gradients import norm_launches

    device = g.device
    marks = device_offsets(offsets, g.shape[0], device)
    out = torch.empty(marks.numel() - 1, dtype=torch.float32, device=device)
    precision = float32_precision() if g.dtype == torch.float32 else "ieee"
    run(norm_launches(g, a, marks, out, workspace_on(device), family_of(device), precision), device)
    return out


register_triton("gradient_dot", gradient_dot, _check_dot, _prefer_dot)
register_triton("gradient_norm", gradient_norm, _check_norm)
