"""``Λ += Σ_b (Σ_t g_t a_tᵀ)²``: a tile of one sequence's gradient is formed in registers, squared and added.

Only Λ is written (or, where its tiles alone would leave most of the card idle, one partial Λ for each of a few runs of
sequences, added up afterwards in a fixed order). A program keeps two tiles in registers: the gradient of the sequence
at hand and the sum of squares. No atomics: the same bits twice.

Rows of g and a start at multiples of 16 elements and are read up to one (``read_g``, ``read_a``), so that they come in
16-byte pieces: what lies beyond the last column only reaches results that are never stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, Table, all_configs, family_of, lookup
from .launch import Launch
from .tiles import MULTIPROCESSORS, dtype_name, tile_of

__all__ = ["CONFIGS", "aot_cases", "candidates", "choose", "launches", "splits_of"]


@triton.jit
def squares_kernel(
    Lam, partial, g, a, offsets, d_out, d_in, read_g, read_a, sequences, per_split, lam_row, g_row, a_row,
    partial_split, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of Λ over one run of ``per_split`` sequences."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(d_out, BM), tl.cdiv(d_in, BN), GROUP)
    split = tl.program_id(1)
    token = tl.arange(0, BK)
    rows = m * BM + tl.arange(0, BM)
    columns = n * BN + tl.arange(0, BN)
    g_offsets = rows[:, None] + token[None, :] * g_row
    a_offsets = token[:, None] * a_row + columns[None, :]
    read_rows = (rows < read_g)[:, None]
    read_columns = (columns < read_a)[None, :]
    squares = tl.zeros((BM, BN), tl.float32)
    for b in range(split * per_split, min((split + 1) * per_split, sequences)):
        start = tl.load(offsets + b)
        length = (tl.load(offsets + b + 1) - start).to(tl.int32)
        g_at = g + start * g_row
        a_at = a + start * a_row
        gradient = tl.zeros((BM, BN), tl.float32)
        for t in range(0, length, BK):
            inside = token < length - t
            left = tl.load(g_at + g_offsets, mask=read_rows & inside[None, :], other=0.0)
            right = tl.load(a_at + a_offsets, mask=inside[:, None] & read_columns, other=0.0)
            gradient = tl.dot(left, right, gradient, input_precision=PRECISION)
            g_at += BK * g_row
            a_at += BK * a_row
        squares += gradient * gradient
    inside = (rows < d_out)[:, None] & (columns < d_in)[None, :]
    if SPLIT:
        at = partial + split.to(tl.int64) * partial_split + rows.to(tl.int64)[:, None] * d_in + columns[None, :]
        tl.store(at, squares, mask=inside)
    else:
        at = Lam + rows.to(tl.int64)[:, None] * lam_row + columns[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + squares, mask=inside)


@triton.jit
def add_splits_kernel(Lam, partial, d_out, d_in, splits, lam_row, partial_split, BN: tl.constexpr):
    """``Λ += Σ_split partial[split]``, in the order of the splits; BN columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < d_in
    total = tl.zeros((BN,), tl.float32)
    part = partial + row * d_in
    for _ in range(0, splits):
        total += tl.load(part + columns, mask=inside, other=0.0)
        part += partial_split
    at = Lam + row * lam_row + columns
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def _tile(bm: int, bn: int, bk: int, warps: int, stages: int, group: int = 8) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": group}, warps, stages)


_SMALL_SHARED = {
    "half": _tile(128, 128, 32, 8, 3),
    "half_short": _tile(128, 128, 32, 8, 2),
    "half_small": _tile(64, 64, 32, 4, 4),
    "ieee": _tile(64, 64, 16, 8, 2),
    "tf32": _tile(64, 64, 32, 4, 3),
    "tf32x3": _tile(64, 64, 16, 8, 2),
}
CONFIGS: Table = {
    "default": _SMALL_SHARED,
    "sm_86": _SMALL_SHARED,
    "sm_89": _SMALL_SHARED,
    "sm_80": {**_SMALL_SHARED, "half": _tile(128, 128, 32, 8, 4), "half_small": _tile(64, 64, 32, 4, 5)},
    "sm_90": {
        **_SMALL_SHARED,
        "half": _tile(128, 128, 64, 8, 4),
        "half_short": _tile(128, 128, 32, 8, 4),
        "half_small": _tile(64, 64, 64, 4, 4),
    },
}
"""Kinds: half precision; the same for sequences of about 32 tokens and fewer; small tiles where large ones would leave
most of the card idle; float32 by its precision. Chosen by what compiles without spills; not measured yet."""

_ADD = Config({"BN": 1024}, num_warps=4, num_stages=2)
_SHORT = 32
_MOST_PARTIAL = 1 << 26  # elements of all partial Λ together: 256 MiB


def candidates(dtype: torch.dtype, precision: str, family: str) -> list[Config]:
    """What autotuning measures: the table's configurations for this dtype and precision."""
    wanted = precision if dtype == torch.float32 else "half"
    return [config for kind, config in all_configs(CONFIGS, family) if kind.split("_")[0] == wanted]


def _tiles(d_out: int, d_in: int, config: Config) -> int:
    return triton.cdiv(d_out, config.constants["BM"]) * triton.cdiv(d_in, config.constants["BN"])


def choose(
    d_out: int, d_in: int, tokens: int, sequences: int, dtype: torch.dtype, precision: str, family: str
) -> Config:
    """The configuration for these sizes."""
    if dtype == torch.float32:
        return lookup(CONFIGS, family, precision)
    config = lookup(CONFIGS, family, "half_short" if tokens <= _SHORT * sequences else "half")
    small = lookup(CONFIGS, family, "half_small")
    enough = MULTIPROCESSORS.get(family, MULTIPROCESSORS["default"])
    return small if _tiles(d_out, d_in, config) * max(sequences, 1) < enough else config


def splits_of(d_out: int, d_in: int, sequences: int, config: Config, family: str) -> int:
    """Into how many runs the sequences are cut: enough to fill the card about twice, and the partial Λ stay small."""
    enough = 2 * MULTIPROCESSORS.get(family, MULTIPROCESSORS["default"])
    tiles = _tiles(d_out, d_in, config)
    if tiles == 0 or tiles * 2 > enough:
        return 1
    most = max(1, _MOST_PARTIAL // (d_out * d_in))
    splits = max(1, min(enough // tiles, sequences, most))
    return triton.cdiv(sequences, triton.cdiv(sequences, splits)) if sequences else 1  # none of them empty


def launches(
    Lam: Tensor,
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    partial: Tensor | None = None,
    precision: str = "ieee",
    config: Config | None = None,
    family: str | None = None,
    read_g: int | None = None,
    read_a: int | None = None,
) -> list[Launch]:
    """``Lam [d_out, d_in] += Σ_b (Σ_t g_t a_tᵀ)²`` for ``g [N, d_out]``, ``a [N, d_in]``, int64 ``offsets [B+1]``.

    The columns of all three are next to each other in memory, rows are strided. ``partial`` is float32 ``[splits,
    d_out, d_in]``, or None for one run over all sequences. ``read_g`` and ``read_a`` (default: d_out, d_in) say up to
    which column the rows of g and a may be read; the gate compiles multiples of 16, for these and for the row strides.
    """
    (d_out, d_in), sequences = Lam.shape, offsets.shape[0] - 1
    family = family or family_of(Lam.device)
    config = config or choose(d_out, d_in, g.shape[0], sequences, g.dtype, precision, family)
    splits = 1 if partial is None else partial.shape[0]
    constants = {"SPLIT": partial is not None, **config.constants, "PRECISION": precision}
    arguments = {
        "Lam": Lam, "partial": partial, "g": g, "a": a, "offsets": offsets, "d_out": d_out, "d_in": d_in,
        "read_g": read_g or d_out, "read_a": read_a or d_in, "sequences": sequences,
        "per_split": triton.cdiv(sequences, splits), "lam_row": Lam.stride(0), "g_row": g.stride(0),
        "a_row": a.stride(0), "partial_split": 0 if partial is None else partial.stride(0),
    }  # fmt: skip
    grid = (_tiles(d_out, d_in, config), splits)
    first = Launch(squares_kernel, grid, arguments, constants, config.num_warps, config.num_stages)
    return [first] if partial is None else [first, _add(Lam, partial)]


def _add(Lam: Tensor, partial: Tensor) -> Launch:
    (splits, d_out, d_in), constants = partial.shape, _ADD.constants
    arguments = {
        "Lam": Lam, "partial": partial, "d_out": d_out, "d_in": d_in, "splits": splits, "lam_row": Lam.stride(0),
        "partial_split": partial.stride(0),
    }  # fmt: skip
    grid = (d_out, triton.cdiv(d_in, constants["BN"]))
    return Launch(add_splits_kernel, grid, arguments, constants, _ADD.num_warps, _ADD.num_stages)


def aot_cases(arch: str) -> Iterator[tuple[str, Launch, Mapping[str, Any]]]:
    """Every configuration and dtype in one run; in several runs with a Λ of odd size, whose inputs have padded rows."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    offsets = meta(17, dtype=torch.int64)
    for kind, config in all_configs(CONFIGS, arch):
        half = kind.startswith("half")
        precision = "ieee" if half else kind
        cores = "none" if kind == "ieee" else "HGMMA" if arch == "sm_90" else "HMMA"
        claims = {"tensor_cores": cores, "async_copies": "LDGSTS"}
        for dtype in (torch.bfloat16, torch.float16) if half else (torch.float32,):
            g, a = meta(8192, 4096, dtype=dtype), meta(8192, 14336, dtype=dtype)
            [launch] = launches(meta(4096, 14336), g, a, offsets, None, precision, config, arch)
            yield f"{dtype_name(dtype)}-{kind}", launch, claims
        g, a, partial = meta(8192, 768, dtype=dtype), meta(8192, 784, dtype=dtype), meta(4, 768, 769)
        launch, add = launches(meta(768, 769), g, a[:, :769], offsets, partial, precision, config, arch, None, 784)
        yield f"{dtype_name(dtype)}-{kind}-split", launch, claims
    yield "add-splits", add, {"tensor_cores": "none"}
