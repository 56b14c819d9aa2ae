"""Batched matrix products, optionally divided elementwise by ``Lam + damping`` as they are stored.

``precondition`` is four of them; the division rides on the second, so the undivided intermediate is never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, all_configs, family_of, lookup
from .launch import Launch
from .tiles import dtype_name, kind_of, tile_of, tile_product

__all__ = ["CONFIGS", "aot_cases", "divide", "product"]


@triton.jit
def product_kernel(
    out, x, y, Lam, batch, rows, columns, depth, x_batch, x_row, x_depth, y_batch, y_depth, y_column,
    out_batch, out_row, out_column, lam_row, lam_column, damping,
    DIVIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[q] = x[q] @ y[q]``, divided by ``Lam + damping`` if DIVIDE; one program a tile of one batch."""
    row_tiles = tl.cdiv(rows, BM)
    column_tiles = tl.cdiv(columns, BN)
    pid = tl.program_id(0)
    q = (pid // (row_tiles * column_tiles)).to(tl.int64)
    m, n = tile_of(pid % (row_tiles * column_tiles), row_tiles, column_tiles, GROUP)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    first_row = m.to(tl.int64) * BM
    first_column = n.to(tl.int64) * BN
    rows_left = rows - m * BM
    columns_left = columns - n * BN
    total = tile_product(
        tl.zeros((BM, BN), tl.float32),
        x + q * x_batch + first_row * x_row,
        y + q * y_batch + first_column * y_column,
        r * x_row, c * y_column, r < rows_left, c < columns_left, depth, x_depth, y_depth, BK, PRECISION,
    )  # fmt: skip
    inside = (r < rows_left)[:, None] & (c < columns_left)[None, :]
    if DIVIDE:
        at = Lam + first_row * lam_row + first_column * lam_column
        lam = tl.load(at + r[:, None] * lam_row + c[None, :] * lam_column, mask=inside, other=1.0)
        total = total / (lam.to(tl.float32) + damping)
    at = out + q * out_batch + first_row * out_row + first_column * out_column
    tl.store(at + r[:, None] * out_row + c[None, :] * out_column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def divide_kernel(
    out, x, Lam, rows, columns, x_batch, x_row, x_column, out_batch, out_row, out_column, lam_row, lam_column,
    damping, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out[q] = x[q] / (Lam + damping)``: what is left of the sandwich when both bases are the identity."""
    column_tiles = tl.cdiv(columns, BN)
    n = tl.program_id(0) % column_tiles
    m = tl.program_id(0) // column_tiles % tl.cdiv(rows, BM)
    q = (tl.program_id(0) // column_tiles // tl.cdiv(rows, BM)).to(tl.int64)
    r = tl.arange(0, BM)[:, None]
    c = tl.arange(0, BN)[None, :]
    row = m.to(tl.int64) * BM
    column = n.to(tl.int64) * BN
    inside = (r < rows - m * BM) & (c < columns - n * BN)
    at = Lam + row * lam_row + column * lam_column
    lam = tl.load(at + r * lam_row + c * lam_column, mask=inside, other=1.0).to(tl.float32)
    at = x + q * x_batch + row * x_row + column * x_column
    value = tl.load(at + r * x_row + c * x_column, mask=inside, other=0.0).to(tl.float32)
    at = out + q * out_batch + row * out_row + column * out_column
    tl.store(at + r * out_row + c * out_column, (value / (lam + damping)).to(out.dtype.element_ty), mask=inside)


def _tile(bm: int, bn: int, bk: int, warps: int, stages: int, group: int = 8) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": group}, warps, stages)


_SMALL_SHARED = {
    "half": _tile(128, 128, 32, 8, 3),
    "half_divided": _tile(128, 128, 32, 8, 3),
    "half_small": _tile(64, 64, 64, 4, 3),
    "ieee": _tile(128, 64, 16, 8, 2),
    "tf32": _tile(64, 64, 32, 4, 3),
    "tf32x3": _tile(64, 64, 32, 4, 2),
}
CONFIGS: Mapping[str, Mapping[str, Config]] = {
    "default": _SMALL_SHARED,
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "sm_80": {
        **_SMALL_SHARED,
        "half": _tile(128, 128, 64, 8, 3),
        "half_divided": _tile(128, 128, 64, 8, 3),
        "half_small": _tile(64, 64, 64, 4, 4),
    },
    "sm_90": {
        "half": _tile(128, 256, 64, 8, 3),
        "half_divided": _tile(128, 128, 64, 8, 4),
        "half_small": _tile(64, 128, 64, 4, 4),
        "ieee": _tile(128, 64, 16, 8, 2),
        "tf32": _tile(128, 128, 32, 8, 3),
        "tf32x3": _tile(64, 128, 32, 4, 3),
    },
}
"""Kinds: half precision, the same with the division (its factors need registers), small tiles where large ones would
leave most of the card idle; float32 by its precision. Chosen by what compiles without spills; not measured yet."""

_WIDE = Config({"BM": 4, "BN": 512}, num_warps=4, num_stages=1)
_FULL = 128
"""Programs below which a product takes small tiles: about the multiprocessors of an A100 (108) or an H200 (132)."""


def choose(
    batch: int, rows: int, columns: int, dtype: torch.dtype, precision: str, divided: bool, family: str
) -> Config:
    """The configuration of a product: small tiles where large ones would not fill the card."""
    kind = kind_of(dtype, precision)
    if kind == "half" and divided:
        kind = "half_divided"
    config = lookup(CONFIGS, family, kind)
    tiles = batch * triton.cdiv(rows, config.constants["BM"]) * triton.cdiv(columns, config.constants["BN"])
    return lookup(CONFIGS, family, "half_small") if kind.startswith("half") and tiles < _FULL else config


def product(
    out: Tensor,
    x: Tensor,
    y: Tensor,
    Lam: Tensor | None = None,
    damping: float = 0.0,
    precision: str = "ieee",
    config: Config | None = None,
    family: str | None = None,
) -> list[Launch]:
    """``out[q] = x[q] @ y[q]``, divided by ``Lam + damping`` where Lam is given.

    x ``[Q, m, k]``, y ``[Q, k, n]``, out ``[Q, m, n]`` in any float dtype; a batch that is shared is expanded (stride
    0). All three may be strided.
    """
    batch, rows, columns = out.shape
    if config is None:
        config = choose(batch, rows, columns, x.dtype, precision, Lam is not None, family or family_of(out.device))
    tiles = triton.cdiv(rows, config.constants["BM"]) * triton.cdiv(columns, config.constants["BN"])
    arguments = {
        "out": out, "x": x, "y": y, "Lam": Lam, "batch": batch, "rows": rows, "columns": columns, "depth": x.shape[2],
        "x_batch": x.stride(0), "x_row": x.stride(1), "x_depth": x.stride(2),
        "y_batch": y.stride(0), "y_depth": y.stride(1), "y_column": y.stride(2),
        "out_batch": out.stride(0), "out_row": out.stride(1), "out_column": out.stride(2),
        "lam_row": 0 if Lam is None else Lam.stride(0), "lam_column": 0 if Lam is None else Lam.stride(1),
        "damping": float(damping),
    }  # fmt: skip
    constants = {"DIVIDE": Lam is not None, **config.constants, "PRECISION": precision}
    return [Launch(product_kernel, (batch * tiles,), arguments, constants, config.num_warps, config.num_stages)]


def divide(out: Tensor, x: Tensor, Lam: Tensor, damping: float) -> list[Launch]:
    """``out[q] = x[q] / (Lam + damping)``; out and x ``[Q, m, n]``."""
    batch, rows, columns = out.shape
    constants = _WIDE.constants
    grid = (triton.cdiv(rows, constants["BM"]) * triton.cdiv(columns, constants["BN"]) * batch,)
    arguments = {
        "out": out, "x": x, "Lam": Lam, "rows": rows, "columns": columns,
        "x_batch": x.stride(0), "x_row": x.stride(1), "x_column": x.stride(2),
        "out_batch": out.stride(0), "out_row": out.stride(1), "out_column": out.stride(2),
        "lam_row": Lam.stride(0), "lam_column": Lam.stride(1), "damping": float(damping),
    }  # fmt: skip
    return [Launch(divide_kernel, grid, arguments, constants, _WIDE.num_warps, _WIDE.num_stages)]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """Every configuration and dtype, with the division and without, either side transposed, and an output at odd sizes
    (operands are padded to multiples of 16 by the wrapper).
    """
    for kind, config in all_configs(CONFIGS, arch):
        half = kind.startswith("half")
        precision = "ieee" if half else kind
        tensor_cores = "none" if kind == "ieee" else "HGMMA" if arch == "sm_90" and half else "HMMA|HGMMA"
        claims = {"tensor_cores": tensor_cores, "async_copies": "LDGSTS"}
        for dtype in (torch.bfloat16, torch.float16) if half else (torch.float32,):
            d_out, d_in = 4096, 14336
            V, U_S, U_A = _meta(4, d_out, d_in, dtype=dtype), _meta(d_out, d_out, dtype=dtype), _meta(d_in, d_in)
            U_A, Lam, full = U_A.to(dtype), _meta(d_out, d_in), _meta(4, d_out, d_in)
            left, right, odd = U_S.expand(4, -1, -1), U_A.expand(4, -1, -1), _meta(4, d_out - 3, d_in - 7)
            if kind != "half":
                launches = product(torch.empty_like(V), left.mT, V, Lam, 0.1, precision, config)
                yield f"{dtype_name(dtype)}-{kind}-left-divided", launches[0], claims
            if kind != "half_divided":
                launches = product(torch.empty_like(V), V, right, config=config, precision=precision)
                yield f"{dtype_name(dtype)}-{kind}-right", launches[0], claims
                launches = product(full, V, right.mT, config=config, precision=precision)
                yield f"{dtype_name(dtype)}-{kind}-transposed", launches[0], claims
                if dtype != torch.float16:  # the same instructions as for bfloat16
                    launches = product(odd, V, right.mT, None, 0.0, precision, config)
                    yield f"{dtype_name(dtype)}-{kind}-odd", launches[0], claims
    # Sizes of one, which Triton makes constants of.
    one = product(_meta(1, 1, 1), _meta(1, 1, 16), _meta(1, 16, 1), config=lookup(CONFIGS, arch, "ieee"))
    yield "single", one[0], {"tensor_cores": "none"}
    [launch] = divide(_meta(2, 768, 3072), _meta(2, 768, 3072), _meta(768, 3072), 0.1)
    yield "divide", launch, {"tensor_cores": "none"}
