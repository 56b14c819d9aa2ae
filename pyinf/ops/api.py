"""Public functions: layout, checks and allocation around ``torch.ops.pyinf.*``.

Conventions of every function here. ``a`` are layer inputs and ``g`` gradients of the summed loss with respect to layer
outputs, either packed (``[N, d]`` with ``offsets`` int64 ``[B+1]``, on the CPU by preference) or ``[B, T, d]`` with an
optional ``mask [B, T]`` (True = counted). ``G_b = Σ_t g_t a_tᵀ`` is sequence b's gradient, ``[d_out, d_in]``. Inputs
are bfloat16, float16, float32 or float64; results and accumulators are float32, or float64 when an input is float64.
Costs count a multiply-add as two operations. ``ConfigError`` (a ``ValueError``) is raised for shapes that do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.errors import ConfigError
from pyinf.ops.packing import accumulator_dtype, pack, unpack_tokens

__all__ = [
    "accumulate_covariance",
    "accumulate_squared_gradients",
    "dense_scores",
    "gradient_dot",
    "gradient_norm",
    "low_rank_scores",
    "need_accumulator",
    "precondition",
    "precondition_low_rank",
    "symmetrize_",
]

_ACCUMULATORS = (torch.float32, torch.float64)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def need_accumulator(name: str, tensor: Tensor, shape: tuple[int, ...], *inputs: Tensor) -> None:
    """Raise ``ConfigError`` unless ``tensor`` can take sums over ``inputs``: its shape, a dtype that sums are kept in,
    and their device. ``name`` is what the message calls it.
    """
    dtype = accumulator_dtype(*inputs)
    _need(tuple(tensor.shape) == shape, f"{name} must have the shape {shape}; got {tuple(tensor.shape)}")
    _need(
        tensor.dtype in _ACCUMULATORS and not (dtype == torch.float64 and tensor.dtype != dtype),
        f"{name} must be {dtype}: sums are never kept in {tensor.dtype} for these inputs",
    )
    _need(tensor.device == inputs[0].device, f"{name} is on {tensor.device}, the inputs are on {inputs[0].device}")


def accumulate_covariance(C: Tensor, x: Tensor, bias: bool = False, mask: Tensor | None = None) -> Tensor:
    """``C += Σ_t x_t x_tᵀ`` in place, over counted rows; returns C.

    Only the **lower triangle** of C is defined afterwards: call :func:`symmetrize_` once at the end. With ``bias``
    every row has a last element of one (C is then ``[d+1, d+1]``) that is never written out.

    C: ``[d, d]`` or ``[d+1, d+1]``, float32 or float64. x: ``[N, d]`` or ``[B, T, d]``. mask: bool, ``[N]`` or ``[B,
    T]``. Units: a sum over tokens; divide by the number of counted tokens for the factors of K-FAC (Martens and Grosse
    2015). Cost: ``N·d²`` operations (half of the full product), one read of x.
    """
    d = x.shape[-1]
    _need(x.dim() in (2, 3), f"x must be [N, d] or [B, T, d]; got {tuple(x.shape)}")
    _need(mask is None or mask.shape == x.shape[:-1], "mask must have the shape of x without its last dimension")
    need_accumulator("C", C, (d + bias, d + bias), x)
    if x.dim() == 3:
        x = x.reshape(-1, d)
        mask = None if mask is None else mask.reshape(-1)
    torch.ops.pyinf.accumulate_covariance(C, x, bias, None if mask is None else mask.bool())
    return C


def symmetrize_(C: Tensor) -> Tensor:
    """Copy the lower triangle of ``C [d, d]`` over the upper one, in place; returns C. Cost: one pass over C."""
    _need(C.dim() == 2 and C.shape[0] == C.shape[1], f"C must be square; got {tuple(C.shape)}")
    step = 1024
    for i in range(0, C.shape[0], step):
        rows = slice(i, i + step)
        diagonal = C[rows, rows]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        C[: rows.start, rows] = C[rows, : rows.start].T
    return C


def accumulate_squared_gradients(
    Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """``Lam += Σ_b (Σ_t g_t a_tᵀ)²`` in place, elementwise square; returns Lam.

    With ``g`` and ``a`` already in the eigenbases (``g U_S``, ``a U_A``) this is the corrected eigenvalue of EK-FAC
    (George et al. 2018) as a sum over sequences; divide by the number of sequences for the mean.

    Lam: ``[d_out, d_in]``, float32 or float64. No ``[B, d_out, d_in]`` tensor is made. Cost: ``2·N·d_out·d_in``
    operations, one read and write of Lam, one read of g and a per cache block.
    """
    packed = pack(g, a, offsets, mask)
    need_accumulator("Lam", Lam, (packed.g.shape[1], packed.a.shape[1]), packed.g, packed.a)
    torch.ops.pyinf.accumulate_squared_gradients(Lam, packed.g, packed.a, packed.offsets)
    return Lam


def _need_bases(U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> None:
    d_out, d_in = Lam.shape
    _need(U_S is None or tuple(U_S.shape) == (d_out, d_out), f"U_S must be [{d_out}, {d_out}]")
    _need(U_A is None or tuple(U_A.shape) == (d_in, d_in), f"U_A must be [{d_in}, {d_in}]")
    _need(damping >= 0, f"damping must not be negative; got {damping}")


def precondition(V: Tensor, U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> Tensor:
    """``U_S[(U_Sᵀ V U_A) / (Lam + damping)]U_Aᵀ``: EK-FAC's inverse-Hessian-vector product (Grosse et al. 2023).

    V: ``[Q, d_out, d_in]`` or ``[d_out, d_in]``; U_S ``[d_out, d_out]`` and U_A ``[d_in, d_in]`` hold eigenvectors in
    their columns, None is the identity; Lam ``[d_out, d_in]``; damping is absolute, in the units of Lam. Returns V's
    shape in float32 or float64. Cost: ``4·Q·d_out·d_in(d_out + d_in)`` operations.
    """
    _need(V.shape[-2:] == Lam.shape and V.dim() in (2, 3), f"V must be [Q, {Lam.shape[0]}, {Lam.shape[1]}]")
    _need_bases(U_S, U_A, Lam, damping)
    out = torch.ops.pyinf.precondition(V if V.dim() == 3 else V[None], U_S, U_A, Lam, float(damping))
    return out if V.dim() == 3 else out[0]


def precondition_low_rank(
    g: Tensor,
    a: Tensor,
    U_S: Tensor | None,
    U_A: Tensor | None,
    Lam: Tensor,
    damping: float,
    rank: int,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    power_iterations: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``L_q R_q ≈ U_S[(U_Sᵀ G_q U_A) / (Lam + damping)]U_Aᵀ`` for every query q, without the dense sandwich.

    The factors are rotated first, the gradient is divided and sketched with a Gaussian test matrix (Halko, Martinsson
    and Tropp 2011) and the r × d factors are rotated back.

    Returns L ``[Q, d_out, r]``, R ``[Q, r, d_in]`` and energy ``[Q]`` = ``‖LR‖² / ‖X‖²`` with ``r = min(rank, d_out,
    d_in)``. Columns are ordered by singular value and split evenly, ``‖L_q[:, j]‖² = s_j``, so a prefix of them is the
    best approximation of that rank. A query without tokens has zero factors and energy 1.
    Cost: see ``costs.sketch_flops``. Same seed, same result.
    """
    packed = pack(g, a, offsets, mask)
    _need(rank >= 1, f"rank must be at least 1; got {rank}")
    _need(tuple(Lam.shape) == (packed.g.shape[1], packed.a.shape[1]), "Lam must be [d_out, d_in] of g and a")
    _need_bases(U_S, U_A, Lam, damping)
    return torch.ops.pyinf.precondition_low_rank(
        packed.g, packed.a, packed.offsets, U_S, U_A, Lam, float(damping), rank, power_iterations, seed
    )


def _scores_buffer(out: Tensor | None, queries: int, columns: int, *inputs: Tensor) -> Tensor:
    if out is None:
        return torch.zeros(queries, columns, dtype=accumulator_dtype(*inputs), device=inputs[0].device)
    need_accumulator("out", out, (queries, columns), *inputs)
    return out


def dense_scores(
    g: Tensor,
    a: Tensor,
    V: Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """``⟨V_q, Σ_t g_t a_tᵀ⟩`` for every query q and sequence b: ``[Q, B]``.

    With ``per_token`` the sum over t is left out: ``g_tᵀ V_q a_t``, ``[Q, N]`` for packed inputs, ``[Q, B, T]``
    otherwise (0 at masked positions). V: ``[Q, d_out, d_in]``. ``out`` (``[Q, B]``, or ``[Q, N]`` per token) is added
    to and returned. No per-sequence gradient is kept. Cost: ``2(N + BQ)·d_out·d_in``, per token ``2NQ·d_out·d_in``.
    """
    packed = pack(g, a, offsets, mask)
    shape = (packed.g.shape[1], packed.a.shape[1])
    _need(V.dim() == 3 and tuple(V.shape[1:]) == shape, f"V must be [Q, {shape[0]}, {shape[1]}]; got {tuple(V.shape)}")
    columns = packed.g.shape[0] if per_token else packed.offsets.shape[0] - 1
    scores = _scores_buffer(out, V.shape[0], columns, packed.g, packed.a, V)
    torch.ops.pyinf.dense_scores(scores, packed.g, packed.a, packed.offsets, V, per_token)
    return unpack_tokens(scores, packed) if per_token and out is None else scores


def low_rank_scores(
    g: Tensor,
    a: Tensor,
    L: Tensor,
    R: Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """``Σ_t Σ_r (g_t·L_qr)(R_qr·a_t)``: :func:`dense_scores` of ``V_q = L_q R_q``, ``[Q, B]`` (or per token).

    L: ``[Q, d_out, r]``, R: ``[Q, r, d_in]`` (Grosse et al. 2023, section 3.2.2). Cost: the cheaper of ``2N(d_out +
    d_in)Qr`` and rebuilding the queries (``2Qr·d_out·d_in``) for dense scoring.
    """
    packed = pack(g, a, offsets, mask)
    d_out, d_in = packed.g.shape[1], packed.a.shape[1]
    fits = L.dim() == 3 and R.dim() == 3 and L.shape[0] == R.shape[0] and L.shape[2] == R.shape[1]
    _need(
        fits and L.shape[1] == d_out and R.shape[2] == d_in,
        f"L must be [Q, {d_out}, r] and R [Q, r, {d_in}]; got {tuple(L.shape)} and {tuple(R.shape)}",
    )
    columns = packed.g.shape[0] if per_token else packed.offsets.shape[0] - 1
    scores = _scores_buffer(out, L.shape[0], columns, packed.g, packed.a, L, R)
    torch.ops.pyinf.low_rank_scores(scores, packed.g, packed.a, packed.offsets, L, R, per_token)
    return unpack_tokens(scores, packed) if per_token and out is None else scores


def gradient_dot(
    g1: Tensor,
    a1: Tensor,
    g2: Tensor,
    a2: Tensor,
    offsets1: Tensor | None = None,
    offsets2: Tensor | None = None,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
) -> Tensor:
    """``⟨G1_b, G2_c⟩ = Σ_{t,s} (a1_t·a2_s)(g1_t·g2_s)`` for every pair of sequences: ``[B1, B2]``.

    Cost: the cheaper of ``2·N1·N2(d_in + d_out)`` (the "ghost" product of Bu et al. 2022, Wang et al. 2024) and
    ``2(N1 + N2 + B1·B2)·d_in·d_out``, in bounded memory either way.
    """
    first, second = pack(g1, a1, offsets1, mask1), pack(g2, a2, offsets2, mask2)
    fits = first.g.shape[1] == second.g.shape[1] and first.a.shape[1] == second.a.shape[1]
    _need(fits, "both sides must come from the same layer: their d_out and d_in differ")
    return torch.ops.pyinf.gradient_dot(first.g, first.a, first.offsets, second.g, second.a, second.offsets)


def gradient_norm(g: Tensor, a: Tensor, offsets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Frobenius norm ``‖Σ_t g_t a_tᵀ‖`` (not squared) of every sequence's gradient: ``[B]``.

    Cost per sequence: the cheaper of ``2T²(d_in + d_out)`` (Goodfellow 2015; Li et al. 2022) and ``2T·d_in·d_out``.
    """
    packed = pack(g, a, offsets, mask)
    return torch.ops.pyinf.gradient_norm(packed.g, packed.a, packed.offsets)
