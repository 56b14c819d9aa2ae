"""The C++ kernels of ``pyinf._C`` (csrc/cpu): checks, pointers, and where a measurement showed that they win.

``PYINF_CPU_ISA`` (scalar, avx2, avx512 or avx512popcnt) caps the instruction set that the kernels may use; the default
is the best that the processor has. ``benchmarks/cpu_ops.py`` measures what the ``_prefer`` functions say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyinf.errors import ConfigError, PyinfError
from pyinf.ops import reference, registry
from pyinf.ops.packing import accumulator_dtype, bounds
from pyinf.ops.quantise import pack_signs

try:
    from pyinf import _C
except ImportError as error:  # a source tree that was never built: plain torch serves
    _C = None
    _missing = f"the extension pyinf._C is not built ({error}); run: pip install ."
else:
    _missing = None if hasattr(_C, "cpu_scan_bits") else "pyinf._C is older than these sources; run: pip install ."

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_ISAS = {"scalar": 0, "avx2": 1, "avx512": 2, "avx512popcnt": 4}


def _isa() -> int:
    name = os.environ.get("PYINF_CPU_ISA", "") or "avx512popcnt"
    if name not in _ISAS:
        raise ConfigError(f"PYINF_CPU_ISA={name!r}: choose one of {', '.join(_ISAS)}")
    return _ISAS[name]


def _done(op: str, code: int) -> None:
    if code:
        raise PyinfError(f"C++ kernel of {op} failed: {_C.error_name(code)}")


def _unavailable() -> str | None:
    return _missing


def _check_tensors(*tensors: Tensor | None) -> str | None:
    if _missing is not None:
        return _missing
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"C++ kernels take CPU tensors; one is on {tensor.device}"
        if tensor.dtype not in _DTYPES:
            return f"no C++ kernel for {tensor.dtype}"
    return None


def _register(op: str, function: Callable, check: Callable, prefer: Callable) -> None:
    check.unavailable = _unavailable  # type: ignore[attr-defined]
    registry.register(op, "cpu", function, check, prefer)


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), _DTYPES[x.dtype]


def _check_squared(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> str | None:
    reason = _check_tensors(Lam, g, a)
    if reason is None and Lam.dtype == torch.float32 and torch.float64 in (g.dtype, a.dtype):
        reason = "float64 inputs need a float64 accumulator"
    if reason is None and Lam.numel() and Lam.stride(1) != 1:
        reason = "the columns of Lam are not next to each other in memory"
    return reason


def _prefer_squared(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> bool:
    # benchmarks/results/cpu/ops.csv: ahead of torch from 768 by 768 on at lengths up to a few hundred, else behind it.
    return Lam.numel() >= 768 * 768 and g.shape[0] < 512 * max(1, offsets.numel() - 1)


def accumulate_squared_gradients(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    """Tiles of every gradient in registers over its tokens, squared and added to a block of Λ kept in cache."""
    bounds(offsets, g.shape[0])
    marks = offsets if offsets.is_contiguous() and offsets.device.type == "cpu" else offsets.cpu().contiguous()
    if marks.dtype != torch.int64:
        marks = marks.long()
    code = _C.cpu_accumulate_squared_gradients(
        Lam.data_ptr(),
        Lam.stride(0),
        _DTYPES[Lam.dtype],
        *_strided(g),
        *_strided(a),
        marks.data_ptr(),
        marks.numel() - 1,
        g.shape[1],
        a.shape[1],
        torch.get_num_threads(),
        _isa(),
    )
    _done("accumulate_squared_gradients", code)


def _check_projection(x: Tensor, k: int, seed: int, distribution: str) -> str | None:
    reason = _check_tensors(x)
    if reason is None and distribution != "rademacher":
        reason = f"the C++ kernel draws signs only, not {distribution!r}"
    return reason


def _always(*args: object) -> bool:
    return True


def random_projection(x: Tensor, k: int, seed: int, distribution: str) -> Tensor:
    """Panels of signs drawn into cache and multiplied at once; the columns of x are cut into a fixed number of
    slices.
    """
    batch, d = x.shape
    slices = max(1, min(-(-16 // -(-k // 512)), -(-d // 4096)))  # enough units of work for a few cores
    out = torch.zeros(slices, batch, k, dtype=accumulator_dtype(x))
    code = _C.cpu_random_projection(
        out.data_ptr(),
        _DTYPES[out.dtype],
        *_strided(x),
        batch,
        d,
        k,
        slices,
        seed & 0xFFFFFFFFFFFFFFFF,
        reference.STREAM_PROJECTION,
        torch.get_num_threads(),
        _isa(),
    )
    _done("random_projection", code)
    return (out[0] if slices == 1 else out.sum(0)).div_(k**0.5)


def _check_sparse(x: Tensor, k: int, seed: int, nnz: int) -> str | None:
    return _check_tensors(x)


def sparse_projection(x: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """Buckets drawn for a window of coordinates, then scattered row by row."""
    out = torch.zeros(x.shape[0], k, dtype=accumulator_dtype(x))
    code = _C.cpu_sparse_projection(
        out.data_ptr(),
        _DTYPES[out.dtype],
        *_strided(x),
        x.shape[0],
        x.shape[1],
        k,
        nnz,
        seed & 0xFFFFFFFFFFFFFFFF,
        reference.STREAM_PROJECTION,
        torch.get_num_threads(),
        _isa(),
    )
    _done("sparse_projection", code)
    return out.div_(nnz**0.5)


def _check_scan(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> str | None:
    if format != "1bit":
        return f"the C++ kernel scans 1bit stores; torch is as fast for {format!r}"
    reason = _check_tensors(None if queries.dtype == torch.uint8 else queries, scale)
    if reason is None and (rows.device.type != "cpu" or queries.dtype == torch.float64):
        reason = "the C++ scan takes rows on the CPU and queries that are not float64"
    return reason


def scan_topk(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Population counts of the differing bits, the best k of each query kept in a heap."""
    bits = queries.shape[1] * (8 if queries.dtype == torch.uint8 else 1)
    signs = queries if queries.dtype == torch.uint8 else pack_signs(queries)
    scales = None if scale is None else scale[:, None]
    return scan_sections(signs, rows, k, [0, rows.shape[1]], [bits], None, scales)


def scan_sections(
    queries: Tensor,
    rows: Tensor,
    k: int,
    starts: Sequence[int],
    widths: Sequence[int],
    query_scale: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Packed signs ``[Q, bytes]`` against rows ``[N, bytes]`` in sections with a scale each; see ``csrc`` ``scan.h``.

    Rows may lie any number of bytes apart. Values float32 and indices ``[Q, min(k, N)]``.
    """
    queries = queries.contiguous()
    if rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]):
        rows = rows.contiguous()
    marks = torch.tensor([*starts], dtype=torch.int64), torch.tensor([*widths], dtype=torch.int64)
    scales = [None if s is None else s.float().contiguous() for s in (query_scale, row_scale)]
    k = min(k, rows.shape[0])
    values = torch.empty(queries.shape[0], k)
    indices = torch.empty(queries.shape[0], k, dtype=torch.int64)
    code = _C.cpu_scan_bits(
        queries.data_ptr(),
        queries.shape[0],
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        rows.shape[1],
        len(widths),
        marks[0].data_ptr(),
        marks[1].data_ptr(),
        *(0 if s is None else s.data_ptr() for s in scales),
        k,
        values.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
        _isa(),
    )
    _done("scan_topk", code)
    return values, indices


_register("accumulate_squared_gradients", accumulate_squared_gradients, _check_squared, _prefer_squared)
_register("random_projection", random_projection, _check_projection, _always)
_register("sparse_projection", sparse_projection, _check_sparse, _always)
_register("scan_topk", scan_topk, _check_scan, _always)
