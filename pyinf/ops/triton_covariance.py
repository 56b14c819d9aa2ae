"""``accumulate_covariance`` by the Triton kernel of triton_kernels/covariance.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyinf.ops.precision import float32_precision
from pyinf.ops.triton_backend import aligned_rows, check_tensors, register_triton, run
from pyinf.ops.triton_tuning import enabled, tuned

if TYPE_CHECKING:
    from pyinf.triton_kernels.configs import Config

_OP = "accumulate_covariance"


def check(C: Tensor, x: Tensor, bias: bool = False, mask: Tensor | None = None) -> str | None:
    """float32 C with adjacent columns; x float32 or half precision, in any layout."""
    reason = check_tensors(C, dtypes=(torch.float32,)) or check_tensors(x)
    if reason is None and any(t is not None and t.device != C.device for t in (x, mask)):
        reason = f"Triton kernels take tensors of one device; C is on {C.device}, x or mask is not"
    if reason is None and C.numel() and C.stride(1) != 1:
        reason = "the columns of C are not next to each other in memory"
    return reason


def accumulate_covariance(C: Tensor, x: Tensor, bias: bool = False, mask: Tensor | None = None) -> None:
    """The lower triangle tile by tile; several runs of tokens where it has few tiles.

    Allocates partial sums of about two tiles for each multiprocessor then, and copies x only where its rows do not
    start at multiples of 16 elements.
    """
    from pyinf.triton_kernels import covariance as kernels
    from pyinf.triton_kernels.configs import family_of

    tokens, d = x.shape
    if tokens == 0 or d + bias == 0:
        return
    if d == 0:  # nothing but the column of ones
        C += tokens if mask is None else mask.sum()
        return
    x, read = aligned_rows(x)
    keep = None if mask is None else mask.contiguous().view(torch.uint8)
    precision, family = float32_precision(), family_of(C.device)

    def run_with(config: Config, out: Tensor) -> None:
        splits, size = kernels.splits_of(d, tokens, config, family), config.constants["BM"]
        sums = torch.empty(splits, d + 1, device=out.device) if bias else None
        partial = None
        if splits > 1:
            partial = torch.empty(splits, kernels.tiles_of(d, config), size, size, device=out.device)
        run(kernels.launches(out, x, keep, sums, partial, precision, config, family, read, d), out.device)

    config = kernels.choose(d, x.dtype, precision, family)
    if enabled(C.device):
        key = f"{x.dtype} {precision} {d} tokens {tokens.bit_length()} {'masked' if mask is not None else 'whole'}"
        others, scratch = kernels.candidates(x.dtype, precision, family), torch.empty_like(C)
        config = tuned(_OP, key, config, others, lambda c: run_with(c, scratch), C.device)
    run_with(config, C)


register_triton(_OP, accumulate_covariance, check)
