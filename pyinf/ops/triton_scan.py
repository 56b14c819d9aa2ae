"""``scan_topk`` by Triton (triton_kernels/scan_topk.py): group maxima, then the rows of the best groups."""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.ops import triton_backend
from pyinf.ops.precision import float32_precision
from pyinf.ops.quantise import pack_signs, unpack_signs
from pyinf.ops.triton_backend import FLOATS, check_tensors, register_triton, run
from pyinf.ops.triton_gradients import far_columns

__all__ = ["scan_topk"]

_LARGEST_K, _LARGEST_OLD_K = 1024, 512


def _largest_k() -> tuple[int, str]:
    """How many rows of a query the selection keeps, and what to say of it: before 3.6 Triton spills above 512."""
    if triton_backend.interpreted() or triton_backend.triton_version() >= (3, 6):
        return _LARGEST_K, ""
    return _LARGEST_OLD_K, " (1024 from Triton 3.6 on)"


def _check_scan(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> str | None:
    reason = check_tensors(queries, dtypes=(*FLOATS, torch.int8, torch.uint8))
    reason = reason or check_tensors(queries, rows, scale, dtypes=(*FLOATS, torch.int8, torch.uint8))
    largest, newer = _largest_k()
    if reason is None and k > largest:
        reason = f"the Triton kernel keeps at most {largest} rows a query{newer}; got k={k}"
    if reason is None and rows.shape[0] >= (1 << 31) - 1024:
        reason = f"the Triton kernel scans fewer than 2**31 rows at a time; got {rows.shape[0]}"
    reason = reason or far_columns(queries, rows)
    if reason is None and queries.dtype == torch.int8 and (format != "int8" or queries.shape[1] > 1 << 17):
        reason = "the Triton kernel takes int8 queries with int8 rows of at most 2**17 columns"
    return reason


def scan_topk(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """One read of the store; the k best rows of every query in the reference's order.

    Two sides of different dtypes are multiplied in float32 (at the precision set), int8 rows in the dtype of the
    queries, which holds them exactly.
    """
    from pyinf.triton_kernels.configs import family_of
    from pyinf.triton_kernels.scan_topk import scan_launches

    device, count = queries.device, queries.shape[0]
    k = min(k, rows.shape[0])
    values = torch.empty(count, k, dtype=torch.float32, device=device)
    indices = torch.empty(count, k, dtype=torch.int64, device=device)
    if not values.numel():
        return values, indices
    sums = None
    if format == "1bit":
        width = queries.shape[1] * (8 if queries.dtype == torch.uint8 else 1)
        signs = unpack_signs(queries if queries.dtype == torch.uint8 else pack_signs(queries), width, torch.int8)
        queries = torch.nn.functional.pad(signs, (0, 8 * rows.shape[1] - width)).contiguous()
        sums = queries.sum(1, dtype=torch.int32)
        dot = torch.int8
    elif format == "int8":
        dot = queries.dtype
    else:
        dot = queries.dtype if queries.dtype == rows.dtype else torch.float32
    precision = float32_precision() if dot == torch.float32 else "ieee"

    def workspace(n: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(n, dtype=dtype, device=device)

    launches = scan_launches(queries, rows, scale, sums, dot, values, indices, workspace, family_of(device), precision)
    run(launches, device)
    return values, indices


register_triton("scan_topk", scan_topk, _check_scan)
