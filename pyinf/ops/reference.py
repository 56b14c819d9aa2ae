"""The ops as their formulas, in plain PyTorch. This is the specification: exact in float64, slow, and nothing else.

Every function takes what the schema of the op takes (packed layout). Half-precision inputs are raised to float32 first;
float64 inputs stay float64. Nothing here is tuned; look at torch_backend.py for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.ops import philox, registry
from pyinf.ops.packing import accumulator_dtype, bounds
from pyinf.ops.quantise import pack_signs, quantise_int8, unpack_signs

STREAM_PROJECTION, STREAM_G, STREAM_A, STREAM_SKETCH = 0, 1, 2, 3
"""Philox streams: flat projections, the two sides of project_gradients, the test matrix of the low-rank sketch."""


def _gradients(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """``G_b = Σ_t g_t a_tᵀ``, as [B, d_out, d_in]."""
    dtype = accumulator_dtype(g, a)
    marks = bounds(offsets, g.shape[0])
    out = torch.zeros(len(marks) - 1, g.shape[1], a.shape[1], dtype=dtype, device=g.device)
    for b in range(len(marks) - 1):
        rows = slice(marks[b], marks[b + 1])
        out[b] = g[rows].to(dtype).T @ a[rows].to(dtype)
    return out


def accumulate_covariance(C: Tensor, x: Tensor, bias: bool = False, mask: Tensor | None = None) -> None:
    """``C += XᵀX`` (lower triangle)."""
    x = x.to(C.dtype)
    if mask is not None:
        x = x[mask]
    if bias:
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
    C += (x.T @ x).tril()


def accumulate_squared_gradients(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    """``Lam += Σ_b G_b²``, elementwise."""
    Lam += _gradients(g.to(Lam.dtype), a.to(Lam.dtype), offsets).square().sum(0)


def precondition(V: Tensor, U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> Tensor:
    """``U_S[(U_Sᵀ V U_A) / (Lam + damping)]U_Aᵀ``."""
    dtype = accumulator_dtype(V, U_S, U_A, Lam)
    left = torch.eye(V.shape[1], dtype=dtype, device=V.device) if U_S is None else U_S.to(dtype)
    right = torch.eye(V.shape[2], dtype=dtype, device=V.device) if U_A is None else U_A.to(dtype)
    return left @ ((left.T @ V.to(dtype) @ right) / (Lam.to(dtype) + damping)) @ right.T


def precondition_low_rank(
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
    """The best rank-r factors of the dense answer, by singular value decomposition."""
    full = precondition(_gradients(g, a, offsets), U_S, U_A, Lam, damping)
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    r = min(rank, full.shape[1], full.shape[2])
    total = s.square().sum(-1)
    kept = s[:, :r].square().sum(-1)
    energy = torch.where(total > 0, kept / total, torch.ones_like(total))
    root = s[:, :r].sqrt()
    return u[:, :, :r] * root[:, None, :], root[:, :, None] * vh[:, :r], energy


def _token_scores(g: Tensor, a: Tensor, V: Tensor) -> Tensor:
    """``g_tᵀ V_q a_t``, as [Q, N]."""
    return torch.einsum("no,qoi,ni->qn", g, V, a)


def dense_scores(scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, V: Tensor, per_token: bool = False) -> None:
    """``scores += ⟨V_q, Σ_t g_t a_tᵀ⟩``."""
    dtype = scores.dtype
    if per_token:
        bounds(offsets, g.shape[0])
        scores += _token_scores(g.to(dtype), a.to(dtype), V.to(dtype))
    else:
        scores += torch.einsum("qoi,boi->qb", V.to(dtype), _gradients(g.to(dtype), a.to(dtype), offsets))


def low_rank_scores(
    scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, L: Tensor, R: Tensor, per_token: bool = False
) -> None:
    """``scores += Σ_t Σ_r (g_t·L_qr)(R_qr·a_t)``."""
    dense_scores(scores, g, a, offsets, L.to(scores.dtype) @ R.to(scores.dtype), per_token)


def gradient_dot(g1: Tensor, a1: Tensor, offsets1: Tensor, g2: Tensor, a2: Tensor, offsets2: Tensor) -> Tensor:
    """``⟨G1_b, G2_c⟩``, as [B1, B2]."""
    dtype = accumulator_dtype(g1, a1, g2, a2)
    first, second = _gradients(g1.to(dtype), a1, offsets1), _gradients(g2.to(dtype), a2, offsets2)
    return first.flatten(1) @ second.flatten(1).T


def gradient_norm(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """``‖G_b‖_F``, as [B]."""
    return _gradients(g, a, offsets).flatten(1).norm(dim=1)


def finish_projection(out: Tensor, epilogue: str) -> tuple[Tensor, Tensor]:
    """Pack ``out [B, k_g, k_a]`` as asked; the second tensor is the int8 scale ``[B]`` (empty otherwise)."""
    none = out.new_zeros(0, dtype=torch.float32)
    if epilogue == "int8":
        values, scale = quantise_int8(out.flatten(1))
        return values.view(out.shape), scale
    if epilogue == "sign":
        return pack_signs(out.flatten(1)), none
    return (out.to(torch.bfloat16) if epilogue == "bfloat16" else out), none


def projection_sides(
    g: Tensor, a: Tensor, P_g: Tensor | None, P_a: Tensor | None, k_g: int, k_a: int, seed: int, distribution: str
) -> tuple[Tensor, Tensor]:
    """The two matrices, drawn where not given: unit variance times ``1/√k``, so that norms are kept on average."""
    if P_g is None:
        P_g = philox.random_matrix((0, g.shape[1]), (0, k_g), seed, STREAM_G, distribution, g.device) / k_g**0.5
    if P_a is None:
        P_a = philox.random_matrix((0, a.shape[1]), (0, k_a), seed, STREAM_A, distribution, a.device) / k_a**0.5
    return P_g, P_a


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
    """``P_gᵀ G_b P_a``."""
    P_g, P_a = projection_sides(g, a, P_g, P_a, k_g, k_a, seed, distribution)
    full = _gradients(g, a, offsets)
    return finish_projection(P_g.to(full.dtype).T @ full @ P_a.to(full.dtype), epilogue)


def random_projection(x: Tensor, k: int, seed: int, distribution: str) -> Tensor:
    """``x P / √k``."""
    P = philox.random_matrix((0, x.shape[1]), (0, k), seed, STREAM_PROJECTION, distribution, x.device)
    dtype = accumulator_dtype(x)
    return x.to(dtype) @ P.to(dtype) / k**0.5


def sparse_projection(x: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """``x S / √nnz`` with nnz signed ones in every row of ``S [D, k]``."""
    bucket, sign = philox.sparse_coordinates((0, x.shape[1]), k, nnz, seed, STREAM_PROJECTION, x.device)
    dtype = accumulator_dtype(x)
    S = torch.zeros(x.shape[1], k, dtype=dtype, device=x.device)
    S.scatter_add_(1, bucket, sign.to(dtype))
    return x.to(dtype) @ S / nnz**0.5


def sparse_projection_factors(g: Tensor, a: Tensor, offsets: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """``vec(G_b) S / √nnz``, coordinate ``o · d_in + i`` of every sequence's gradient."""
    return sparse_projection(_gradients(g, a, offsets).flatten(1), k, seed, nnz)


def scan_topk(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """All scores, a stable sort (equal scores: the lower index first), the first k."""
    dtype = accumulator_dtype(queries, rows)
    if format == "1bit":
        bits = queries.shape[1] * (8 if queries.dtype == torch.uint8 else 1)
        signs = unpack_signs(queries if queries.dtype == torch.uint8 else pack_signs(queries), bits)
        scores = signs @ unpack_signs(rows, bits).T
    else:
        scores = queries.to(dtype) @ rows.to(dtype).T
    if scale is not None:
        scores = scores * scale.to(scores.dtype)
    values, indices = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


for _function in (
    accumulate_covariance,
    accumulate_squared_gradients,
    precondition,
    precondition_low_rank,
    dense_scores,
    low_rank_scores,
    gradient_dot,
    gradient_norm,
    project_gradients,
    random_projection,
    sparse_projection,
    sparse_projection_factors,
    scan_topk,
):
    registry.register(_function.__name__, "reference", _function)
