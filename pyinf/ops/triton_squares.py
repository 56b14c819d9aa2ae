"""``accumulate_squared_gradients`` by the Triton kernel of triton_kernels/squared_gradients.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyinf.ops.packing import bounds
from pyinf.ops.precision import float32_precision
from pyinf.ops.triton_backend import aligned_rows, check_tensors, register_triton, run
from pyinf.ops.triton_tuning import enabled, tuned

if TYPE_CHECKING:
    from pyinf.triton_kernels.configs import Config

_OP = "accumulate_squared_gradients"


def check(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> str | None:
    """float32 Λ with adjacent columns; g and a of one dtype, float32 or half precision, in any layout."""
    reason = check_tensors(Lam, dtypes=(torch.float32,)) or check_tensors(g, a)
    if reason is None and not (Lam.device == g.device == a.device):
        reason = f"Triton kernels take tensors of one device; got {Lam.device}, {g.device} and {a.device}"
    if reason is None and g.dtype != a.dtype:
        reason = f"the Triton kernel takes g and a of one dtype; got {g.dtype} and {a.dtype}"
    if reason is None and Lam.numel() and Lam.stride(1) != 1:
        reason = "the columns of Lam are not next to each other in memory"
    return reason


def accumulate_squared_gradients(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    """Gradients a tile at a time in registers, squared into Λ; several runs of sequences where Λ is small.

    Allocates at most 256 MiB for partial sums, and copies g or a only where their rows do not start at multiples of 16
    elements.
    """
    from pyinf.triton_kernels import squared_gradients as kernels
    from pyinf.triton_kernels.configs import family_of

    if not offsets.is_cuda:  # offsets that are on the device already were checked by whoever put them there
        bounds(offsets, g.shape[0])
    (d_out, d_in), sequences = Lam.shape, offsets.numel() - 1
    if Lam.numel() == 0 or sequences == 0 or g.shape[0] == 0:
        return
    marks = offsets.to(Lam.device, torch.int64).contiguous()
    g, read_g = aligned_rows(g)
    a, read_a = aligned_rows(a)
    precision, family = float32_precision(), family_of(Lam.device)

    def run_with(config: Config, out: Tensor) -> None:
        splits = kernels.splits_of(d_out, d_in, sequences, config, family)
        partial = torch.empty(splits, d_out, d_in, device=out.device) if splits > 1 else None
        run(kernels.launches(out, g, a, marks, partial, precision, config, family, read_g, read_a), out.device)

    config = kernels.choose(d_out, d_in, g.shape[0], sequences, g.dtype, precision, family)
    if enabled(Lam.device):
        key = f"{g.dtype} {precision} {d_out}x{d_in} length {(g.shape[0] // sequences).bit_length()}"
        others, scratch = kernels.candidates(g.dtype, precision, family), torch.empty_like(Lam)
        config = tuned(_OP, key, config, others, lambda c: run_with(c, scratch), Lam.device)
    run_with(config, Lam)


register_triton(_OP, accumulate_squared_gradients, check)
