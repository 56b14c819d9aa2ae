"""Inputs of every op, and the outputs that tests compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyinf.ops import pack_signs, philox
from pyinf.ops.registry import _implementations, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LAYOUTS: dict[str, tuple[list[int], int, int]] = {
    "small": ([3, 4], 5, 9),
    "odd": ([17, 0, 1, 40], 33, 65),
    "long": ([300, 129, 513], 26, 70),  # across the depth at which the C++ tiles are cut
    "wide": ([3, 2], 400, 530),  # across the blocks of rows and columns
    "short": ([1] * 9, 12, 32),
    "no tokens": ([0, 0], 6, 7),
    "no sequences": ([], 6, 7),
}


@dataclass
class Layer:
    g: Tensor
    a: Tensor
    offsets: Tensor


def layer(name: str, dtype: torch.dtype, strided: bool = False, seed: int = 0) -> Layer:
    lengths, d_out, d_in = LAYOUTS[name]
    return make_layer(lengths, d_out, d_in, dtype, strided, seed)


def make_layer(
    lengths: list[int], d_out: int, d_in: int, dtype: torch.dtype, strided: bool = False, seed: int = 0
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int64)
    if strided:
        g = torch.randn(d_out, n, generator=generator).to(dtype).T
        a = torch.randn(n, 2 * d_in + 1, generator=generator).to(dtype)[:, 1::2]
    else:
        g = torch.randn(n, d_out, generator=generator).to(dtype)
        a = torch.randn(n, d_in, generator=generator).to(dtype)
    return Layer(g, a, offsets)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_rounded: torch.dtype | None = None  # inputs are rounded to this before they are raised to float64


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(_rounded or dtype).to(dtype)


def sums(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """What an accumulator holds before the op adds to it: the same float32 values for every dtype of the inputs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(accumulator(dtype))


def basis(d: int, seed: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(values).Q.to(_rounded or dtype).to(dtype)


def _op(name: str) -> Callable:
    return getattr(torch.ops.pyinf, name)


def _covariance(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    d = x.a.shape[1]
    out = []
    keep = torch.arange(x.a.shape[0]) % 3 != 1
    for bias, mask in ((False, None), (True, keep)):
        C = sums(d + bias, d + bias, seed=1, dtype=dtype)
        _op("accumulate_covariance")(C, x.a, bias, mask)
        out.append(C.tril())
    return out


def _squared(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    Lam = sums(x.g.shape[1], x.a.shape[1] + 3, seed=1, dtype=dtype).abs()
    outside = Lam[:, -3:].clone()
    _op("accumulate_squared_gradients")(Lam[:, :-3], x.g, x.a, x.offsets)
    assert torch.equal(Lam[:, -3:], outside), "wrote beyond the row"
    return [Lam]


def _precondition(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    d_out, d_in = x.g.shape[1], x.a.shape[1]
    V = randn(3, d_out, d_in, seed=2, dtype=dtype)
    Lam = randn(d_out, d_in, seed=3, dtype=dtype).abs()
    U_S, U_A = basis(d_out, 4, dtype), basis(d_in, 5, dtype)
    return [_op("precondition")(V, left, right, Lam, 0.3) for left, right in ((U_S, U_A), (None, U_A), (U_S, None))]


def _dense(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    V = randn(3, x.g.shape[1], x.a.shape[1], seed=2, dtype=dtype)
    out = []
    for per_token in (False, True):
        columns = x.g.shape[0] if per_token else x.offsets.numel() - 1
        scores = sums(3, columns, seed=3, dtype=dtype)
        _op("dense_scores")(scores, x.g, x.a, x.offsets, V, per_token)
        out.append(scores)
    return out


def _low_rank(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    out = []
    for rank in (2, 5):  # the torch path takes either of its two routes
        L = randn(4, x.g.shape[1], rank, seed=2, dtype=dtype)
        R = randn(4, rank, x.a.shape[1], seed=3, dtype=dtype)
        for per_token in (False, True):
            columns = x.g.shape[0] if per_token else x.offsets.numel() - 1
            scores = sums(4, columns, seed=4, dtype=dtype)
            _op("low_rank_scores")(scores, x.g, x.a, x.offsets, L, R, per_token)
            out.append(scores)
    return out


def _dot(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    y = make_layer([5, 0, 2], x.g.shape[1], x.a.shape[1], _rounded or dtype, seed=9)
    y = Layer(y.g.to(dtype), y.a.to(dtype), y.offsets)
    return [_op("gradient_dot")(x.g, x.a, x.offsets, y.g, y.a, y.offsets)]


def _norm(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    return [_op("gradient_norm")(x.g, x.a, x.offsets)]


def _project(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    P_g, P_a = randn(x.g.shape[1], 4, seed=2, dtype=dtype), randn(x.a.shape[1], 3, seed=3, dtype=dtype)
    given = _op("project_gradients")(x.g, x.a, x.offsets, P_g, P_a, 4, 3)[0]
    drawn = _op("project_gradients")(x.g, x.a, x.offsets, None, None, 6, 5, 7)[0]
    normal = _op("project_gradients")(x.g, x.a, x.offsets, P_g, None, 4, 5, 7, "normal")[0]
    return [given, drawn, normal]


def _random(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    return [_op("random_projection")(v, k, 1 << 40) for v in (x.a, x.g.T) for k in (1, 40, 700)]


def _sparse(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    return [_op("sparse_projection")(v, k, 3, nnz) for v in (x.a, x.g.T) for k, nnz in ((1, 1), (16, 3))]


def _sparse_factors(x: Layer, dtype: torch.dtype) -> list[Tensor]:
    return [_op("sparse_projection_factors")(x.g, x.a, x.offsets, k, 3, nnz) for k, nnz in ((900, 1), (4000, 2))]


CASES: dict[str, Callable[[Layer, torch.dtype], list[Tensor]]] = {
    "accumulate_covariance": _covariance,
    "accumulate_squared_gradients": _squared,
    "precondition": _precondition,
    "dense_scores": _dense,
    "low_rank_scores": _low_rank,
    "gradient_dot": _dot,
    "gradient_norm": _norm,
    "project_gradients": _project,
    "random_projection": _random,
    "sparse_projection": _sparse,
    "sparse_projection_factors": _sparse_factors,
}
"""precondition_low_rank and scan_topk are judged by what they promise, in their own tests."""


def run(op: str, backend: str, x: Layer, dtype: torch.dtype) -> list[Tensor]:
    with use_backend(backend, op):
        return CASES[op](x, dtype)


def exact(op: str, x: Layer, dtype: torch.dtype) -> list[Tensor]:
    """The reference in float64 on the very values that the inputs of ``dtype`` have."""
    global _rounded
    _rounded = dtype
    try:
        return run(op, "reference", Layer(x.g.double(), x.a.double(), x.offsets), torch.float64)
    finally:
        _rounded = None


def backends(op: str) -> list[str]:
    return [i.backend for i in _implementations[op] if i.backend not in ("cuda", "triton", "reference")]


def packed_signs(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    values = philox.random_matrix((0, n), (0, d), seed)
    return values, pack_signs(values)
