"""Public functions for compressed gradients: projections, coordinate masks and the scan of a store.

The conventions of api.py hold here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.errors import ConfigError
from pyinf.ops.packing import accumulator_dtype, bounds, pack
from pyinf.ops.projection_options import need_options

__all__ = [
    "project_gradients",
    "random_projection",
    "scan_topk",
    "select_coordinates",
    "select_gradient_coordinates",
    "sparse_projection",
    "sparse_projection_factors",
]

FORMATS = ("bfloat16", "int8", "1bit")


def project_gradients(
    g: Tensor,
    a: Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    P_g: Tensor | None = None,
    P_a: Tensor | None = None,
    k_g: int | None = None,
    k_a: int | None = None,
    seed: int = 0,
    distribution: str = "rademacher",
    epilogue: str = "float32",
) -> Tensor | tuple[Tensor, Tensor]:
    """``P_gᵀ (Σ_t g_t a_tᵀ) P_a`` for every sequence: ``[B, k_g, k_a]`` (LoGra, Choe et al. 2024).

    P_g ``[d_out, k_g]`` and P_a ``[d_in, k_a]`` are used as given; a side that is None is drawn from Philox (``seed``,
    its own stream) with variance ``1/k``, so that norms are kept on average. ``epilogue``: "float32" (float64 for
    float64 inputs), "bfloat16", "int8" (returns int8 values and a float32 scale ``[B]`` per sequence), or "sign"
    (bits of the flattened ``k_g·k_a`` values, uint8 ``[B, ceil(k_g·k_a / 8)]``, as in :func:`pyinf.ops.pack_signs`).
    Raises ``ConfigError`` for an unknown distribution or epilogue, or a missing k.
    Cost: ``2N(d_out·k_g + d_in·k_a + k_g·k_a)`` operations, one read of g and a.
    """
    packed = pack(g, a, offsets, mask)
    need_options(distribution, epilogue)
    sizes = []
    for name, P, k, d in (("g", P_g, k_g, packed.g.shape[1]), ("a", P_a, k_a, packed.a.shape[1])):
        if P is not None and (P.dim() != 2 or P.shape[0] != d or (k is not None and k != P.shape[1])):
            raise ConfigError(f"P_{name} must be [{d}, k_{name}]; got {tuple(P.shape)} with k_{name}={k}")
        size = k if P is None else P.shape[1]
        if size is None or size < 1:
            raise ConfigError(f"give P_{name} or k_{name} (at least 1); got k_{name}={k}")
        sizes.append(size)
    values, scale = torch.ops.pyinf.project_gradients(
        packed.g, packed.a, packed.offsets, P_g, P_a, sizes[0], sizes[1], seed, distribution, epilogue
    )
    return (values, scale) if epilogue == "int8" else values


def _need_flat(x: Tensor, k: int) -> None:
    if x.dim() != 2:
        raise ConfigError(f"x must be [B, D]; got {tuple(x.shape)}")
    if k < 1:
        raise ConfigError(f"k must be at least 1; got {k}")


def random_projection(x: Tensor, k: int, seed: int = 0, distribution: str = "rademacher") -> Tensor:
    """``x P / √k`` with P ``[D, k]`` of ±1 ("rademacher") or standard normal elements drawn from Philox: ``[B, k]``.

    Johnson–Lindenstrauss: inner products are kept on average, with variance about ``1/k`` (TRAK, Park et al. 2023). The
    matrix is never held; it depends on ``seed`` alone, not on the tiling, the device or the dtype. x: ``[B, D]``.
    Raises ``ConfigError`` for an unknown distribution. Cost: ``2·B·D·k`` operations and ``D·k/128`` Philox calls
    (``D·k/4`` for normal).
    """
    _need_flat(x, k)
    return torch.ops.pyinf.random_projection(x, k, seed, distribution)


def sparse_projection(x: Tensor, k: int, seed: int = 0, nnz: int = 1) -> Tensor:
    """Every coordinate added, with a random sign, to ``nnz`` random buckets, times ``1/√nnz``: ``[B, k]``.

    The sparse Johnson–Lindenstrauss transform (Kane and Nelson 2014; GraSS, Hu et al. 2025); the buckets of a
    coordinate are drawn independently. Unbiased: ``E⟨Sx, Sy⟩ = ⟨x, y⟩``. Deterministic. Cost: ``2·B·D·nnz``
    operations, one read of x.
    """
    _need_flat(x, k)
    if nnz < 1 or k >= 1 << 32:
        raise ConfigError(f"nnz must be at least 1 and k below 2**32; got nnz={nnz}, k={k}")
    return torch.ops.pyinf.sparse_projection(x, k, seed, nnz)


def sparse_projection_factors(
    g: Tensor,
    a: Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    k: int | None = None,
    seed: int = 0,
    nnz: int = 1,
) -> Tensor:
    """:func:`sparse_projection` of every sequence's flattened gradient, from its factors: ``[B, k]``.

    ``Σ_{o,i} S[o·d_in + i] (Σ_t g_t[o] a_t[i]) / √nnz`` without the gradients ever being held whole (FactGraSS, Hu et
    al. 2025, whose factors are first cut to a subset of their columns). Equal to ``sparse_projection`` of the gradients
    flattened to ``[B, d_out·d_in]``. Raises ``ConfigError`` without a k. Cost: ``2·d_out·d_in(N + B·nnz)`` operations.
    """
    packed = pack(g, a, offsets, mask)
    if k is None or not 1 <= k < 1 << 32 or nnz < 1:
        raise ConfigError(f"k must be given, from 1 to 2**32 - 1, and nnz be at least 1; got k={k}, nnz={nnz}")
    return torch.ops.pyinf.sparse_projection_factors(packed.g, packed.a, packed.offsets, k, seed, nnz)


def select_coordinates(x: Tensor, indices: Tensor) -> Tensor:
    """A coordinate mask: ``x[:, indices]`` in float32 (float64 for float64 inputs). x: ``[B, D]``, indices: int64
    ``[k]``.
    """
    _need_flat(x, 1)
    return x.index_select(1, indices).to(accumulator_dtype(x))


def select_gradient_coordinates(
    g: Tensor,
    a: Tensor,
    rows: Tensor,
    columns: Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Elements ``(rows_k, columns_k)`` of every sequence's gradient without forming it: ``[B, k]``.

    ``Σ_t g_t[rows_k] a_t[columns_k]`` (the factorised masks of GraSS, Hu et al. 2025). rows, columns: int64 ``[k]``.
    Cost: ``2·N·k`` operations.
    """
    packed = pack(g, a, offsets, mask)
    if rows.shape != columns.shape or rows.dim() != 1:
        raise ConfigError(f"rows and columns must be [k]; got {tuple(rows.shape)} and {tuple(columns.shape)}")
    dtype = accumulator_dtype(packed.g, packed.a)
    marks = bounds(packed.offsets, packed.g.shape[0])
    out = torch.zeros(len(marks) - 1, rows.shape[0], dtype=dtype, device=packed.g.device)
    for b in range(len(marks) - 1):
        part = slice(marks[b], marks[b + 1])
        left = packed.g[part].index_select(1, rows).to(dtype)
        out[b] = left.mul_(packed.a[part].index_select(1, columns)).sum(0)
    return out


def scan_topk(
    queries: Tensor, rows: Tensor, k: int, format: str = "bfloat16", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best rows of a store for every query: values ``[Q, k]`` and indices ``[Q, k]`` (int64), best first.

    ``format``: "bfloat16" scores ``queries · rowsᵀ`` for floating-point rows ``[N, d]``; "int8" the same for int8 rows;
    "1bit" scores the number of agreeing minus differing signs over d bits, with rows as uint8 ``[N, ceil(d/8)]`` from
    :func:`pyinf.ops.pack_signs` and queries as ``[Q, d]`` values (their signs are taken) or packed like the rows.
    ``scale [N]`` multiplies the scores of each row. Equal scores: the lower index first. k is cut to N. The ``[Q, N]``
    scores are never held. Raises ``ConfigError`` for an unknown format or widths that differ.
    Cost: ``2·Q·N·d`` operations, one read of the store.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; choose one of: {', '.join(FORMATS)}")
    if queries.dim() != 2 or rows.dim() != 2 or k < 0:
        raise ConfigError("queries and rows must be matrices and k must not be negative")
    wanted = {"bfloat16": "floating-point", "int8": "int8", "1bit": "uint8"}[format]
    found = "floating-point" if rows.is_floating_point() else str(rows.dtype).removeprefix("torch.")
    if wanted != found:
        raise ConfigError(f"format {format!r} scans {wanted} rows; got {rows.dtype}")
    width = rows.shape[1]
    fits = queries.shape[1] == width
    if format == "1bit" and queries.dtype != torch.uint8:
        fits = (queries.shape[1] + 7) // 8 == width
    if not fits:
        raise ConfigError(
            f"queries are {queries.shape[1]} wide, which does not fit rows of {width} in format {format!r}"
        )
    if scale is not None and tuple(scale.shape) != (rows.shape[0],):
        raise ConfigError(f"scale must be [{rows.shape[0]}]; got {tuple(scale.shape)}")
    return torch.ops.pyinf.scan_topk(queries, rows, k, format, scale)
