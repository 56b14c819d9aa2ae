"""The CUDA kernels of ``pyinf._C``: checks, workspaces, pointers. "auto" takes one only where it was verified on the
card at hand (verified.py). Everything runs on the current stream of the tensors' device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyinf.errors import PyinfError
from pyinf.ops import reference, registry
from pyinf.ops.packing import bounds
from pyinf.ops.projection_options import empty_result, side_sizes, too_wide
from pyinf.ops.quantise import pack_signs
from pyinf.ops.verified import is_verified

try:
    from pyinf import _C
except ImportError as error:
    _C = None
    _missing = f"the extension pyinf._C is not built ({error}); run: pip install ."
else:
    _missing = None
    if not hasattr(_C, "cuda_accumulate_squared_gradients"):
        _missing = "pyinf._C was built without CUDA; rebuild with PYINF_CUDA=1 (it needs nvcc)"
    elif not hasattr(_C, "cuda_scan_topk"):
        _missing = "pyinf._C lacks CUDA kernels that these sources have; run: pip install ."

_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
_DISTRIBUTIONS = {"rademacher": 0, "normal": 1}
_EPILOGUES = {"float32": 0, "bfloat16": 1, "int8": 2, "sign": 3}
_LARGEST_SIDE, _LARGEST_TOPK, _LARGEST_GRID = 128, 512, 65535
_SEED = 0xFFFFFFFFFFFFFFFF


def _unavailable() -> str | None:
    return _missing or (None if torch.cuda.is_available() else "torch sees no CUDA device")


def _register(op: str, function: Callable, check: Callable) -> None:
    check.unavailable = _unavailable  # type: ignore[attr-defined]

    def prefer(first: Tensor, *rest: object) -> bool:
        return is_verified(op, torch.cuda.get_device_name(first.device))

    registry.register(op, "cuda", function, check, prefer)


def _done(op: str, code: int) -> None:
    if code:
        raise PyinfError(f"CUDA kernel of {op} failed: {_C.error_name(code)}")


def _check_tensors(**tensors: Tensor | None) -> str | None:
    """Why these matrices cannot go to a CUDA kernel: one CUDA device, columns side by side, rows apart."""
    if _missing is not None:
        return _missing
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(given.values())).device
    for name, tensor in given.items():
        if not tensor.is_cuda or tensor.device != device:
            return f"CUDA kernels take tensors of one CUDA device; {name} is on {tensor.device}"
        if tensor.dim() == 2 and tensor.numel():
            if tensor.shape[1] > 1 and tensor.stride(1) != 1:
                return f"the columns of {name} must be next to each other in memory"
            if tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
                return f"the rows of {name} overlap in memory"
    return None


def _check_dtypes(**tensors: Tensor) -> str | None:
    """Why these dtypes are not served: all the same, one of float32, float16, bfloat16."""
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(found.values())) > 1 or next(iter(found.values())) not in _DTYPES:
        return "no CUDA kernel for " + ", ".join(f"{name} {dtype}" for name, dtype in found.items())
    return None


def _rows(x: Tensor) -> tuple[int, int]:
    """Address and row stride; a matrix of one row or none may have any stride, so it gets its width."""
    return x.data_ptr(), max(x.stride(0), x.shape[1])


def _where(x: Tensor) -> tuple[int, int]:
    """Device and stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _workspace(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _marks(offsets: Tensor, rows: int, device: torch.device) -> Tensor:
    if not offsets.is_cuda:  # offsets that are on the device already were checked by whoever put them there
        bounds(offsets, rows)
    return offsets.to(device, torch.int64).contiguous()


def _check_squared(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> str | None:
    reason = _check_tensors(Lam=Lam, g=g, a=a) or _check_dtypes(g=g, a=a)
    if reason is None and Lam.dtype != torch.float32:
        reason = f"no CUDA kernel for Lam {Lam.dtype}"
    return reason


def accumulate_squared_gradients(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    """Tiles of every gradient in registers over its tokens, squared into Λ."""
    marks = _marks(offsets, g.shape[0], Lam.device)
    code = _C.cuda_accumulate_squared_gradients(
        *_rows(Lam),
        *_rows(g),
        *_rows(a),
        marks.data_ptr(),
        marks.numel() - 1,
        g.shape[1],
        a.shape[1],
        _DTYPES[g.dtype],
        *_where(Lam),
    )
    _done("accumulate_squared_gradients", code)


def _check_random(x: Tensor, k: int, seed: int, distribution: str) -> str | None:
    return _check_tensors(x=x) or _check_dtypes(x=x)


def random_projection(x: Tensor, k: int, seed: int, distribution: str) -> Tensor:
    """128 rows by 128 columns a block; elements drawn into shared memory and multiplied on tensor cores."""
    out = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    size = _C.cuda_random_projection_workspace(*x.shape, k)
    space = _workspace(x, size)
    code = _C.cuda_random_projection(
        out.data_ptr(),
        k,
        *_rows(x),
        *x.shape,
        k,
        seed & _SEED,
        reference.STREAM_PROJECTION,
        _DISTRIBUTIONS[distribution],
        _DTYPES[x.dtype],
        space.data_ptr(),
        size,
        *_where(x),
    )
    _done("random_projection", code)
    return out


def _check_sparse(x: Tensor, k: int, seed: int, nnz: int) -> str | None:
    return _check_tensors(x=x) or _check_dtypes(x=x)


def sparse_projection(x: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """Chains of a slice's coordinates a bucket, each added by the bucket's owner in order."""
    out = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    size = _C.cuda_sparse_projection_workspace(*x.shape, k)
    space = _workspace(x, size)
    code = _C.cuda_sparse_projection(
        out.data_ptr(),
        k,
        *_rows(x),
        *x.shape,
        k,
        nnz,
        seed & _SEED,
        reference.STREAM_PROJECTION,
        _DTYPES[x.dtype],
        space.data_ptr(),
        size,
        *_where(x),
    )
    _done("sparse_projection", code)
    return out


def _check_sparse_factors(g: Tensor, a: Tensor, offsets: Tensor, k: int, seed: int, nnz: int) -> str | None:
    return _check_tensors(g=g, a=a) or _check_dtypes(g=g, a=a)


def sparse_projection_factors(g: Tensor, a: Tensor, offsets: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """The same over 64 by 64 tiles of every gradient, formed in shared memory from the factors."""
    marks = _marks(offsets, g.shape[0], g.device)
    count, d_out, d_in = marks.numel() - 1, g.shape[1], a.shape[1]
    out = torch.empty(count, k, dtype=torch.float32, device=g.device)
    size = _C.cuda_sparse_projection_factors_workspace(count, d_out, d_in, k)
    space = _workspace(g, size)
    code = _C.cuda_sparse_projection_factors(
        out.data_ptr(),
        k,
        *_rows(g),
        *_rows(a),
        marks.data_ptr(),
        count,
        d_out,
        d_in,
        k,
        nnz,
        seed & _SEED,
        reference.STREAM_PROJECTION,
        _DTYPES[g.dtype],
        space.data_ptr(),
        size,
        *_where(g),
    )
    _done("sparse_projection_factors", code)
    return out


def scan_layout(queries: Tensor, rows: Tensor, format: str) -> tuple[int, int] | str:
    """The kernel's format and the number of bfloat16 parts that the queries are cut into, or why there is none."""
    if format == "1bit":
        return 0, 1
    cuts = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}.get(queries.dtype)
    if rows.dtype == torch.int8 and queries.dtype == torch.int8:
        return 1, 1
    if rows.dtype == torch.float16 and queries.dtype == torch.float16:
        return 2, 1
    if rows.dtype in (torch.bfloat16, torch.int8) and cuts is not None:
        return (3 if rows.dtype == torch.bfloat16 else 4), cuts
    return f"no CUDA kernel for {queries.dtype} queries on {rows.dtype} rows"


def cut_queries(queries: Tensor, parts: int) -> Tensor:
    """bfloat16 ``[parts, Q, d]`` whose sum over parts is ``queries``: exact for 2 of float16 and 3 of float32."""
    if parts == 1:
        return queries[None]
    cut, rest = [], queries.float()
    for _ in range(parts):
        cut.append(rest.to(torch.bfloat16))
        rest = rest - cut[-1].float()
    return torch.stack(cut)


def _check_scan(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> str | None:
    reason = _check_tensors(queries=queries, rows=rows, scale=scale)
    layout = scan_layout(queries, rows, format)
    if reason is None and isinstance(layout, str):
        return layout
    if reason is None and min(k, rows.shape[0]) > _LARGEST_TOPK:
        reason = f"the CUDA scan keeps up to {_LARGEST_TOPK} rows a query, not {min(k, rows.shape[0])}"
    elif reason is None and min(k, rows.shape[0]) > _LARGEST_TOPK // 2 and layout[1] > 1:
        reason = f"the CUDA scan keeps up to {_LARGEST_TOPK // 2} rows a query that is not of the store's precision"
    elif reason is None and rows.shape[0] >= (1 << 32) - 1:
        reason = "the CUDA scan counts rows in 32 bits"
    elif reason is None and layout[0] == 1 and rows.shape[1] > 1 << 17:
        reason = "int8 products of more than 2**17 columns could overflow int32"
    return reason


def scan_topk(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Strips of the store past a few queries a block; candidates above a running threshold, then a merge."""
    count, n, k = queries.shape[0], rows.shape[0], min(k, rows.shape[0])
    layout = scan_layout(queries, rows, format)
    assert not isinstance(layout, str)  # check said so
    kind, parts = layout
    bits = queries.shape[1] * (8 if queries.dtype == torch.uint8 else 1)
    if format == "1bit":
        queries = queries if queries.dtype == torch.uint8 else pack_signs(queries)
    cut = cut_queries(queries, parts)
    factor = None if scale is None else scale.float().contiguous()
    values = torch.empty(count, k, dtype=torch.float32, device=rows.device)
    indices = torch.empty(count, k, dtype=torch.int64, device=rows.device)
    size = _C.cuda_scan_topk_workspace(count, n, rows.shape[1], k, kind, parts)
    space = _workspace(rows, size)
    code = _C.cuda_scan_topk(
        values.data_ptr(),
        indices.data_ptr(),
        cut.data_ptr(),
        cut.stride(0),
        max(cut.stride(1), cut.shape[2]),
        *_rows(rows),
        0 if factor is None else factor.data_ptr(),
        count,
        n,
        rows.shape[1],
        bits,
        k,
        kind,
        parts,
        space.data_ptr(),
        size,
        *_where(rows),
    )
    _done("scan_topk", code)
    return values, indices


def _check_project(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    P_g: Tensor | None,
    P_a: Tensor | None,
    k_g: int,
    k_a: int,
    seed: int,
    distribution: str,
    epilogue: str,
) -> str | None:
    reason = _check_tensors(g=g, a=a) or _check_dtypes(g=g, a=a)
    if reason is None and any(P is not None and P.device != g.device for P in (P_g, P_a)):
        reason = f"CUDA kernels take tensors of one CUDA device; g is on {g.device}, P_g or P_a is not"
    if reason is None and any(P is not None and P.dtype == torch.float64 for P in (P_g, P_a)):
        reason = "no CUDA kernel for a float64 P_g or P_a"
    reason = reason or too_wide("CUDA", _LARGEST_SIDE, *side_sizes(P_g, P_a, k_g, k_a))
    if reason is None and offsets.numel() - 1 > _LARGEST_GRID:
        reason = f"the CUDA kernel serves up to {_LARGEST_GRID} sequences at a time"
    return reason


def project_gradients(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    P_g: Tensor | None,
    P_a: Tensor | None,
    k_g: int,
    k_a: int,
    seed: int,
    distribution: str,
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    """64 tokens a block: both sides projected on tensor cores, contracted, the pieces of a sequence added in order."""
    marks = _marks(offsets, g.shape[0], g.device)
    count = marks.numel() - 1
    k_g, k_a = side_sizes(P_g, P_a, k_g, k_a)
    out, scale = empty_result(count, k_g, k_a, epilogue, g.device)
    # As plain torch does on a GPU: given matrices in the dtype of the inputs.
    given = [None if P is None else P.to(g.dtype).contiguous() for P in (P_g, P_a)]
    size = _C.cuda_project_gradients_workspace(g.shape[0], count, k_g, k_a)
    space = _workspace(g, size)
    code = _C.cuda_project_gradients(
        out.data_ptr(),
        scale.data_ptr(),
        *_rows(g),
        *_rows(a),
        marks.data_ptr(),
        g.shape[0],
        count,
        g.shape[1],
        a.shape[1],
        *((0, 0) if given[0] is None else _rows(given[0])),
        *((0, 0) if given[1] is None else _rows(given[1])),
        k_g,
        k_a,
        seed & _SEED,
        reference.STREAM_G,
        reference.STREAM_A,
        _DISTRIBUTIONS[distribution],
        _EPILOGUES[epilogue],
        _DTYPES[g.dtype],
        space.data_ptr(),
        size,
        *_where(g),
    )
    _done("project_gradients", code)
    return out, scale


_register("accumulate_squared_gradients", accumulate_squared_gradients, _check_squared)
_register("random_projection", random_projection, _check_random)
_register("sparse_projection", sparse_projection, _check_sparse)
_register("sparse_projection_factors", sparse_projection_factors, _check_sparse_factors)
_register("scan_topk", scan_topk, _check_scan)
_register("project_gradients", project_gradients, _check_project)
