"""Several layers of one shape in one launch: the kernel of one layer, entered through a table of addresses.

``table [layers, operands]``, int64 on the device, holds the addresses of each layer's tensors; the third axis of the
grid is the layer. Addresses must be multiples of 16 (``table_of`` refuses others), so that loads stay wide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import covariance, squared_gradients
from .configs import Config
from .launch import Launch
from .tiles import dtype_name

__all__ = ["aot_cases", "covariance_launch", "squared_gradients_launch", "table_of"]

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def table_of(*operands: Sequence[Tensor]) -> Tensor:
    """Addresses ``[layers, operands]`` on the CPU. Raises ``ValueError`` for one that is no multiple of 16."""
    rows = [[tensor.data_ptr() for tensor in layer] for layer in zip(*operands, strict=True)]
    if any(address % 16 for row in rows for address in row):
        raise ValueError("grouped kernels take tensors whose addresses are multiples of 16")
    return torch.tensor(rows, dtype=torch.int64)


@triton.jit
def squares_group_kernel(
    table, offsets, d_out, d_in, read_g, read_a, sequences, lam_row, g_row, a_row,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one layer's Λ over all sequences."""
    row = table + tl.program_id(2) * 3
    Lam = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    g = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), 16)
    a = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(DTYPE)), 16)
    squared_gradients.squares_kernel(
        Lam, None, g, a, offsets, d_out, d_in, read_g, read_a, sequences, sequences, lam_row, g_row, a_row, 0,
        False, BM, BN, BK, GROUP, PRECISION,
    )  # fmt: skip


@triton.jit
def covariance_group_kernel(
    table, d, read, tokens, c_row, x_row,
    DTYPE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one layer's triangle over all tokens."""
    row = table + tl.program_id(2) * 2
    C = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
    x = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), 16)
    covariance.covariance_kernel(
        C, None, None, x, None, d, read, tokens, tokens, c_row, x_row, 0, False, False, False, BM, BK, BAND, PRECISION
    )


def _grouped(single: Launch, kernel: Any, table: Tensor, kept: Sequence[str], dropped: Sequence[str], like: Tensor):
    """The launch of one layer, turned into one over the layers of ``table``."""
    arguments = {"table": table, **{name: single.arguments[name] for name in kept}}
    constants = {k: v for k, v in single.constants.items() if k not in dropped} | {"DTYPE": _TYPES[like.dtype]}
    grid = (single.grid[0], 1, table.shape[0])
    return dataclasses.replace(single, kernel=kernel, grid=grid, arguments=arguments, constants=constants)


def covariance_launch(
    table: Tensor,
    C: Tensor,
    x: Tensor,
    precision: str = "ieee",
    config: Config | None = None,
    family: str | None = None,
    read: int | None = None,
    columns: int | None = None,
) -> Launch:
    """The lower triangles of ``C_l += Σ_t x_lt x_ltᵀ`` for all layers of ``table [L, 2]`` (addresses of C, x).

    ``C`` and ``x`` are those of one layer: all layers share their shapes, strides and dtypes, and none has a bias or a
    mask. One run over all tokens: the layers fill the card.
    """
    [single] = covariance.launches(C, x, precision=precision, config=config, family=family, read=read, columns=columns)
    kept = ("d", "read", "tokens", "c_row", "x_row")
    return _grouped(single, covariance_group_kernel, table, kept, ("SPLIT", "BIAS", "MASKED"), x)


def squared_gradients_launch(
    table: Tensor,
    Lam: Tensor,
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    precision: str = "ieee",
    config: Config | None = None,
    family: str | None = None,
    read_g: int | None = None,
    read_a: int | None = None,
) -> Launch:
    """``Λ_l += Σ_b (Σ_t g_lt a_ltᵀ)²`` for all layers of ``table [L, 3]`` (addresses of Λ, g, a), as one launch.

    ``Lam``, ``g`` and ``a`` are those of one layer: all layers share their shapes, strides and dtypes.
    """
    [single] = squared_gradients.launches(Lam, g, a, offsets, None, precision, config, family, read_g, read_a)
    kept = ("offsets", "d_out", "d_in", "read_g", "read_a", "sequences", "lam_row", "g_row", "a_row")
    return _grouped(single, squares_group_kernel, table, kept, ("SPLIT",), g)


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, Mapping[str, Any]]]:
    """The configurations that small layers get, in every dtype."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    table, offsets = meta(12, 3, dtype=torch.int64), meta(17, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        g, a = meta(8192, 768, dtype=dtype), meta(8192, 768, dtype=dtype)
        launch = squared_gradients_launch(table, meta(768, 768), g, a, offsets, family=arch)
        cores = "none" if dtype == torch.float32 else "HGMMA" if arch == "sm_90" else "HMMA"
        yield f"squares-{dtype_name(dtype)}", launch, {"tensor_cores": cores, "async_copies": "LDGSTS"}
        x, table_of_two = meta(8192, 768, dtype=dtype), meta(12, 2, dtype=torch.int64)
        launch = covariance_launch(table_of_two, meta(768, 768), x, family=arch)
        yield f"covariance-{dtype_name(dtype)}", launch, {"tensor_cores": cores, "async_copies": "LDGSTS"}
