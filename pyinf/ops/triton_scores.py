"""``low_rank_scores`` and ``dense_scores`` by the Triton kernels of the same names.

Queries take the dtype of g and a, which must be one: a kernel multiplies what it reads. Only ``dense_scores`` by
sequence keeps them as they are, since it does not multiply them on the tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyinf.errors import BackendUnavailableError
from pyinf.ops import costs
from pyinf.ops.precision import float32_precision
from pyinf.ops.triton_backend import check_tensors, register_triton, run
from pyinf.ops.triton_layout import device_offsets, near, one_device, padded, rounded

__all__ = ["dense_scores", "low_rank_scores", "low_rank_scores_shared", "prefers_low_rank"]


def _check(scores: Tensor, g: Tensor, a: Tensor, *queries: Tensor) -> str | None:
    reason = check_tensors(scores, dtypes=(torch.float32,)) or check_tensors(g, a) or check_tensors(*queries)
    if reason is None and g.dtype != a.dtype:
        reason = f"the Triton kernel takes g and a of one dtype; got {g.dtype} and {a.dtype}"
    return reason or one_device(scores, g, a, *queries)


def check_low_rank(
    scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, L: Tensor, R: Tensor, per_token: bool = False
) -> str | None:
    """float32 scores; g and a of one dtype, float32 or half precision, in any layout; L and R of any of these."""
    return _check(scores, g, a, L, R)


def prefers_low_rank(scores, g, a, offsets, L, R, per_token=False) -> bool:
    """Whether the factored way costs less than rebuilding the queries, which plain torch then does."""
    queries, d_out, rank = L.shape
    return per_token or costs.low_rank_is_cheaper(
        g.shape[0], d_out, a.shape[1], queries, rank, offsets.numel() - 1
    )  # fmt: skip


def _left(L: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """L ``[Q, width, r]``: itself where its rows can be read in pieces, else with the outputs next to each other."""
    fits = L.dtype == dtype and L.is_contiguous() and L.shape[1] == width and L.data_ptr() % 16 == 0
    if fits and L.shape[2] % 8 == 0:
        return L
    return padded(L.transpose(1, 2), L.shape[2], width, dtype).contiguous().transpose(1, 2)


def low_rank_scores_shared(
    scores: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor]], a: Tensor, offsets: Tensor, per_token: bool = False
) -> None:
    """``scores += Σ_layers Σ_t Σ_r (g_t·L_qr)(R_qr·a_t)`` of layers that share their input a.

    layers: (g ``[N, d_out]``, L ``[Q, d_out, r]``, R ``[Q, r, d_in]``) each; d_out and r may differ. In half precision
    up to three layers of one rank, at most 64, are one launch that reads a once, where
    ``costs.shared_input_is_cheaper`` says so; otherwise one launch a layer. scores ``[Q, B]``, or ``[Q, N]`` per token:
    sums over tokens, float32. Raises ``BackendUnavailableError`` for arguments that the kernel does not take.
    """
    from pyinf.triton_kernels import low_rank_scores as kernels
    from pyinf.triton_kernels.configs import family_of

    for g, L, R in layers:
        reason = _check(scores, g, a, L, R)
        if reason is not None:
            raise BackendUnavailableError(f"backend 'triton' cannot serve low_rank_scores: {reason}")
    marks = device_offsets(offsets, a.shape[0], scores.device)
    d_in, dtype = a.shape[1], a.dtype
    layers = [x for x in layers if x[1].numel() and x[2].numel()]
    if not layers or a.shape[0] == 0 or scores.numel() == 0:
        return
    precision, family = float32_precision(), family_of(scores.device)
    inputs = padded(a, a.shape[0], rounded(d_in), dtype)
    waiting = list(layers)
    while waiting:
        queries, _, rank = waiting[0][1].shape
        group = [waiting.pop(0)]
        while waiting and len(group) < kernels.MAX_LAYERS and waiting[0][1].shape[2] == rank:
            outputs = [x[0].shape[1] for x in (*group, waiting[0])]
            if not kernels.can_share(rank, dtype, family) or not costs.shared_input_is_cheaper(
                outputs, d_in, queries * rank
            ):
                break
            group.append(waiting.pop(0))
        operands = []
        for g, L, R in group:
            width = rounded(g.shape[1])
            right = padded(R, rank, inputs.shape[1], dtype).contiguous()
            operands.append((padded(g, g.shape[0], width, dtype), _left(L, width, dtype), right))
        config, block = kernels.choose(a.shape[0], queries, rank, len(group), dtype, precision, family)
        partial = None
        if not per_token:
            shape = kernels.partial_shape(a.shape[0], marks.numel() - 1, queries, config)
            partial = torch.empty(shape, dtype=torch.float32, device=scores.device)
        found = kernels.launches(scores, operands, inputs, marks, partial, precision, config, block)
        run(found, scores.device)


def low_rank_scores(
    scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, L: Tensor, R: Tensor, per_token: bool = False
) -> None:
    """Both skinny products of a tile of tokens and queries in registers, multiplied and summed there."""
    low_rank_scores_shared(scores, [(g, L, R)], a, offsets, per_token)


def check_dense(
    scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, V: Tensor, per_token: bool = False
) -> str | None:
    """float32 scores; g and a of one dtype, float32 or half precision, in any layout; V of any of these."""
    return _check(scores, g, a, V)


def dense_scores(scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, V: Tensor, per_token: bool = False) -> None:
    """By token (``V_q a_t``, then times ``g_t``) or by sequence (tiles of ``G_b`` against every ``V_q``): whichever
    costs less, see ``costs.dense_scores_by_token``."""
    from pyinf.triton_kernels import dense_scores as kernels
    from pyinf.triton_kernels.configs import family_of

    marks = device_offsets(offsets, g.shape[0], scores.device)
    (tokens, d_out), d_in = g.shape, a.shape[1]
    queries, sequences, dtype = V.shape[0], marks.numel() - 1, g.dtype
    if scores.numel() == 0 or tokens == 0 or V.numel() == 0:
        return
    precision, family, device = float32_precision(), family_of(scores.device), scores.device
    a = padded(a, tokens, rounded(d_in), dtype)
    if per_token or costs.dense_scores_by_token(tokens, queries, sequences):
        config, splits = kernels.token_plan(tokens, queries, d_out, dtype, precision, family)
        V = padded(V, d_out, a.shape[1], dtype)
        partial = None
        if not per_token:
            tiles = -(-tokens // config.constants["BM"])
            partial = torch.empty(splits, tiles + sequences, queries, dtype=torch.float32, device=device)
        elif splits > 1:
            partial = torch.empty(splits, queries, tokens, dtype=torch.float32, device=device)
        run(kernels.by_token(scores, near(g), a, marks, V, partial, per_token, precision, config), device)
        return
    g = padded(g, tokens, rounded(d_out), dtype)
    V = near(V)
    aligned = kernels.rows_aligned(V)
    config, tiles = kernels.sequence_plan(sequences, d_out, d_in, dtype, precision, family, aligned)
    partial = torch.empty(sequences, queries, tiles, dtype=torch.float32, device=device)
    run(kernels.by_sequence(scores, g, a, marks, V, partial, precision, config), device)


register_triton("low_rank_scores", low_rank_scores, check_low_rank, prefers_low_rank)
register_triton("dense_scores", dense_scores, check_dense)
