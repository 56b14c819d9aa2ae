"""How one would write each op in plain torch, in the dtype of the inputs: what a kernel is compared with.

A function takes the arguments of the op and returns its result (or adds into its first argument). Tensors between
input and result are in the inputs' dtype, as they are when a user writes the line. Together with the registry's
"torch" backend, the fastest of them is "the best torch formulation" of a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyinf.ops import philox, reference, torch_backend
from pyinf.ops.packing import accumulator_dtype

__all__ = ["FORMULATIONS", "plain", "rounded_projection"]

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")


def _covariance_addmm(C: Tensor, x: Tensor, bias: bool = False, mask: Tensor | None = None) -> None:
    """The full product of (masked, extended) rows, added."""
    if mask is not None:
        x = x[mask]
    if bias:
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
    if x.dtype == C.dtype:
        C.addmm_(x.T, x)
    elif _HAS_OUT_DTYPE and x.is_cuda:
        C += torch.mm(x.T, x, out_dtype=C.dtype)
    else:
        x = x.to(C.dtype)
        C.addmm_(x.T, x)


def _batched(t: Tensor, offsets: Tensor) -> Tensor:
    """Rows of equal sequences as [B, T, d]; a list is what ragged ones would need."""
    count = offsets.shape[0] - 1
    if count == 0 or t.shape[0] % count:
        raise NotImplementedError("sequences of different lengths")
    length = t.shape[0] // count
    if offsets.tolist() != [i * length for i in range(count + 1)]:
        raise NotImplementedError("sequences of different lengths")
    return t.reshape(count, length, t.shape[1])


def _each(t: Tensor, offsets: Tensor) -> list[Tensor]:
    marks = offsets.tolist()
    return [t[marks[b] : marks[b + 1]] for b in range(len(marks) - 1)]


def _gradients(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """``[B, d_out, d_in]`` in the inputs' dtype."""
    try:
        return torch.bmm(_batched(g, offsets).transpose(1, 2), _batched(a, offsets))
    except NotImplementedError:
        made = [left.T @ right for left, right in zip(_each(g, offsets), _each(a, offsets), strict=True)]
        return torch.stack(made) if made else g.new_zeros(0, g.shape[1], a.shape[1])


def _squared_bmm(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    """All gradients at once, squared, summed."""
    Lam += _gradients(g, a, offsets).to(Lam.dtype).square_().sum(0)


def _precondition_products(V: Tensor, U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> Tensor:
    """Four products in the dtype of V."""
    x = V
    if U_A is not None:
        x = x @ U_A
    if U_S is not None:
        x = U_S.T @ x
    x = (x / (Lam + damping)).to(V.dtype)
    if U_S is not None:
        x = U_S @ x
    if U_A is not None:
        x = x @ U_A.T
    return x.to(accumulator_dtype(V, U_S, U_A, Lam))


def _sandwich_svd(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    U_S: Tensor | None,
    U_A: Tensor | None,
    Lam: Tensor,
    damping: float,
    rank: int,
    power_iterations: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The dense preconditioned gradient, then torch's own randomised decomposition of it."""
    dense = _precondition_products(_gradients(g, a, offsets), U_S, U_A, Lam, damping)
    r = min(rank, *dense.shape[1:])
    q = min(r + 8, *dense.shape[1:])
    u, s, v = torch.svd_lowrank(dense, q=q, niter=power_iterations)
    u, s, v = u[..., :r], s[..., :r], v[..., :r]
    total = dense.square().sum((1, 2))
    energy = torch.where(total > 0, s.square().sum(-1) / total, torch.ones_like(total))
    root = s.sqrt()
    return u * root[:, None, :], root[:, :, None] * v.transpose(1, 2), energy


def _dense_bmm(scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, V: Tensor, per_token: bool = False) -> None:
    """Per-sequence gradients, then one product with all queries; per token, a product for each query."""
    if per_token:
        for q in range(V.shape[0]):
            scores[q] += ((g @ V[q]) * a).sum(1, dtype=scores.dtype)
    else:
        scores += (V.flatten(1) @ _gradients(g, a, offsets).flatten(1).T).to(scores.dtype)


def _low_rank_products(
    scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, L: Tensor, R: Tensor, per_token: bool = False
) -> None:
    """The two skinny products, multiplied, summed over the rank and the tokens."""
    queries, d_out, r = L.shape
    left = g @ L.permute(1, 0, 2).reshape(d_out, queries * r)
    right = a @ R.reshape(queries * r, -1).T
    tokens = (left * right).view(-1, queries, r).sum(2, dtype=scores.dtype)
    if per_token:
        scores += tokens.T
    else:
        sums = [part.sum(0) for part in _each(tokens, offsets)]
        if sums:
            scores += torch.stack(sums, 1)


def _low_rank_rebuilt(
    scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, L: Tensor, R: Tensor, per_token: bool = False
) -> None:
    """Every query rebuilt as a matrix, then scored densely."""
    _dense_bmm(scores, g, a, offsets, L @ R, per_token)


def _dot_gradients(g1: Tensor, a1: Tensor, offsets1: Tensor, g2: Tensor, a2: Tensor, offsets2: Tensor) -> Tensor:
    """The gradients of both sides, flattened, multiplied."""
    first, second = _gradients(g1, a1, offsets1).flatten(1), _gradients(g2, a2, offsets2).flatten(1)
    return (first @ second.T).to(accumulator_dtype(g1, a1, g2, a2))


def _dot_grams(g1: Tensor, a1: Tensor, offsets1: Tensor, g2: Tensor, a2: Tensor, offsets2: Tensor) -> Tensor:
    """Both Gram matrices of all tokens, multiplied, summed block by block."""
    out = g1.new_zeros(offsets1.shape[0] - 1, offsets2.shape[0] - 1, dtype=accumulator_dtype(g1, a1, g2, a2))
    for b, (gb, ab) in enumerate(zip(_each(g1, offsets1), _each(a1, offsets1), strict=True)):
        both = (gb @ g2.T) * (ab @ a2.T)
        for c, part in enumerate(_each(both.sum(0, dtype=out.dtype)[:, None], offsets2)):
            out[b, c] = part.sum()
    return out


def _norm_gradients(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """The gradients, then their norms."""
    return _gradients(g, a, offsets).flatten(1).to(accumulator_dtype(g, a)).norm(dim=1)


def _norm_grams(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """Two Gram matrices for each sequence, multiplied, summed."""
    g, a = _batched(g, offsets), _batched(a, offsets)
    both = torch.bmm(g, g.transpose(1, 2)) * torch.bmm(a, a.transpose(1, 2))
    return both.sum((1, 2), dtype=accumulator_dtype(g, a)).clamp_(min=0).sqrt_()


def _project_tokens(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    P_g: Tensor | None,
    P_a: Tensor | None,
    k_g: int,
    k_a: int,
    seed: int = 0,
    distribution: str = "rademacher",
    epilogue: str = "float32",
) -> tuple[Tensor, Tensor]:
    """Both sides projected, then one small product for each sequence; the projections held, in the inputs' dtype."""
    P_g, P_a = reference.projection_sides(g, a, P_g, P_a, k_g, k_a, seed, distribution)
    full = _gradients(g @ P_g.to(g.dtype), a @ P_a.to(a.dtype), offsets)
    return reference.finish_projection(full.to(accumulator_dtype(g, a)), epilogue)


def _stored_projection(x: Tensor, k: int, seed: int = 0, distribution: str = "rademacher") -> Tensor:
    """The whole matrix drawn and held, then one product."""
    P = philox.random_matrix((0, x.shape[1]), (0, k), seed, reference.STREAM_PROJECTION, distribution, x.device)
    return (x @ P.to(x.dtype)).to(accumulator_dtype(x)) / k**0.5


def _sparse_gradients(g: Tensor, a: Tensor, offsets: Tensor, k: int, seed: int = 0, nnz: int = 1) -> Tensor:
    """The gradients, flattened, then the projection of flat gradients."""
    return torch_backend.sparse_projection(_gradients(g, a, offsets).flatten(1), k, seed, nnz)


def rounded_projection(x: Tensor, k: int, seed: int = 0, distribution: str = "rademacher") -> Tensor:
    """The product with a matrix held in the dtype of ``x``, summed in float32: what its rounding alone costs."""
    P = philox.random_matrix((0, x.shape[1]), (0, k), seed, reference.STREAM_PROJECTION, distribution, x.device)
    dtype = accumulator_dtype(x)
    return x.to(dtype) @ P.to(x.dtype).to(dtype) / k**0.5


def _scan_all(
    queries: Tensor, rows: Tensor, k: int, format: str = "bfloat16", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All scores at once, then topk; for floating-point rows."""
    if format != "bfloat16":
        raise NotImplementedError(format)
    scores = queries.to(rows.dtype) @ rows.T
    if scale is not None:
        scores = scores * scale
    values, indices = scores.topk(min(k, rows.shape[0]), dim=1)
    return values.to(accumulator_dtype(queries, rows)), indices


FORMULATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "accumulate_covariance": {"addmm": _covariance_addmm},
    "accumulate_squared_gradients": {"bmm": _squared_bmm},
    "precondition": {"four products": _precondition_products},
    "precondition_low_rank": {"sandwich, svd_lowrank": _sandwich_svd},
    "dense_scores": {"bmm": _dense_bmm},
    "low_rank_scores": {"two products": _low_rank_products, "rebuilt": _low_rank_rebuilt},
    "gradient_dot": {"gradients": _dot_gradients, "grams": _dot_grams},
    "gradient_norm": {"gradients": _norm_gradients, "grams": _norm_grams},
    "project_gradients": {"tokens first": _project_tokens},
    "random_projection": {"stored": _stored_projection},
    "sparse_projection": {},
    "sparse_projection_factors": {"gradients first": _sparse_gradients},
    "scan_topk": {"all scores": _scan_all},
}
"""Formulations of each op beside the registry's "torch" backend."""


def plain(op: str) -> Callable[..., Any] | None:
    """The first formulation: the line a user would write, by which half precision is judged; None where there is
    none."""
    return next(iter(FORMULATIONS[op].values()), None)
