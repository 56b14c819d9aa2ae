"""What each way of computing an op costs, in floating-point operations (a multiply-add counts two).

The choices below are formulas so that they can be tested and printed in a plan; no shape is special.
Symbols: N counted tokens, T tokens of one sequence, B sequences, Q queries, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "dense_scores_by_token",
    "dense_scores_flops",
    "dot_is_ghost",
    "ghost_dot_flops",
    "ghost_norm_flops",
    "low_rank_is_cheaper",
    "low_rank_scores_flops",
    "materialised_dot_flops",
    "materialised_norm_flops",
    "norm_is_ghost",
    "rotate_first_flops",
    "rotate_first_is_cheaper",
    "sandwich_flops",
    "shared_input_is_cheaper",
    "sketch_flops",
    "sketch_is_cheaper",
    "token_scores_flops",
]


def rotate_first_flops(tokens: int, d_out: int, d_in: int) -> int:
    """Rotate ``a`` and ``g`` (N tokens), then form the gradients: ``2N(d_in² + d_out² + d_in·d_out)``."""
    return 2 * tokens * (d_in * d_in + d_out * d_out + d_in * d_out)


def sandwich_flops(tokens: int, d_out: int, d_in: int, sequences: int) -> int:
    """Form each gradient, then rotate it: ``2N·d_in·d_out + 2B·d_in·d_out(d_in + d_out)``."""
    return 2 * tokens * d_in * d_out + 2 * sequences * d_in * d_out * (d_in + d_out)


def rotate_first_is_cheaper(tokens: int, d_out: int, d_in: int, sequences: int) -> bool:
    """True below the crossover ``N/B < d_in·d_out(d_in + d_out) / (d_in² + d_out²)``."""
    return rotate_first_flops(tokens, d_out, d_in) <= sandwich_flops(tokens, d_out, d_in, sequences)


def sketch_flops(tokens: int, d_out: int, d_in: int, rank: int, power_iterations: int = 1) -> int:
    """One query's low-rank iHVP: rotations of the factors, ``2 + 2·power_iterations`` products with the divided tile
    (each re-forms the tile from T tokens) and the rotation back of the rank-r factors."""
    rotations = 2 * tokens * (d_in * d_in + d_out * d_out)
    passes = 2 + 2 * power_iterations
    return rotations + passes * 2 * d_in * d_out * (tokens + rank) + 2 * rank * (d_in * d_in + d_out * d_out)


def low_rank_scores_flops(tokens: int, d_out: int, d_in: int, queries: int, rank: int) -> int:
    """Project every token on every query's factors, multiply, reduce: ``2N(d_in + d_out + 1)Qr``."""
    return 2 * tokens * (d_in + d_out + 1) * queries * rank


def dense_scores_flops(tokens: int, d_out: int, d_in: int, queries: int, sequences: int) -> int:
    """Form each sequence's gradient and multiply it with every query: ``2N·d_in·d_out + 2BQ·d_in·d_out``."""
    return 2 * (tokens + sequences * queries) * d_in * d_out


def low_rank_is_cheaper(tokens: int, d_out: int, d_in: int, queries: int, rank: int, sequences: int) -> bool:
    """Whether the factored path needs fewer operations than rebuilding ``L_q R_q`` once and scoring densely."""
    rebuild = 2 * queries * rank * d_in * d_out
    dense = dense_scores_flops(tokens, d_out, d_in, queries, sequences) + rebuild
    return low_rank_scores_flops(tokens, d_out, d_in, queries, rank) <= dense


def ghost_norm_flops(lengths: Sequence[int], d_out: int, d_in: int) -> int:
    """Norms through two T×T Gram matrices per sequence: ``2T²(d_in + d_out + 1)``."""
    return sum(2 * t * t * (d_in + d_out + 1) for t in lengths)


def materialised_norm_flops(lengths: Sequence[int], d_out: int, d_in: int) -> int:
    """Norms through the gradients: ``2(T + 1)·d_in·d_out`` per sequence."""
    return sum(2 * (t + 1) * d_in * d_out for t in lengths)


def norm_is_ghost(length: int, d_out: int, d_in: int) -> bool:
    """True where the Gram matrices are cheaper: about ``T < d_in·d_out / (d_in + d_out)``."""
    return ghost_norm_flops([length], d_out, d_in) <= materialised_norm_flops([length], d_out, d_in)


def ghost_dot_flops(tokens1: int, tokens2: int, d_out: int, d_in: int) -> int:
    """All pairs through token-by-token products: ``2·N₁·N₂(d_in + d_out + 1)``."""
    return 2 * tokens1 * tokens2 * (d_in + d_out + 1)


def materialised_dot_flops(tokens1: int, tokens2: int, d_out: int, d_in: int, count1: int, count2: int) -> int:
    """All pairs through the gradients of both sides: ``2(N₁ + N₂ + B₁B₂)·d_in·d_out``."""
    return 2 * (tokens1 + tokens2 + count1 * count2) * d_in * d_out


def dot_is_ghost(tokens1: int, tokens2: int, d_out: int, d_in: int, count1: int, count2: int) -> bool:
    """Whether token-by-token products are cheaper than the gradients of both sides."""
    ghost = ghost_dot_flops(tokens1, tokens2, d_out, d_in)
    return ghost <= materialised_dot_flops(tokens1, tokens2, d_out, d_in, count1, count2)


def token_scores_flops(tokens: int, d_out: int, d_in: int, queries: int) -> int:
    """Multiply every token's input with every query, then with its output gradient: ``2NQ(d_in + 1)·d_out``."""
    return 2 * tokens * queries * (d_in + 1) * d_out


VECTOR_WEIGHT = 16
"""How many half-precision tensor-core operations take the time of one float32 operation outside them: 312 to 19.5 on an
A100, 989 to 67 on an H100 (data sheets)."""


def dense_scores_by_token(tokens: int, queries: int, sequences: int) -> bool:
    """Whether a GPU should score dense queries token by token: ``NQ ≤ N + 16·BQ``, in units of ``2·d_out·d_in``.

    By sequence the gradients take N on the tensor cores, and their products with the queries BQ outside them. Short
    sequences and single queries go by token, whatever the layer.
    """
    return tokens * queries <= tokens + VECTOR_WEIGHT * sequences * queries


def shared_input_is_cheaper(outputs: Sequence[int], d_in: int, columns: int, wide: int = 128, narrow: int = 64) -> bool:
    """Whether layers that share an input are scored against factored queries in one launch rather than one each.

    ``outputs``: d_out of each layer; ``columns``: Q·r. Together a tile has ``narrow`` columns of each layer and reads
    the input once for all; one by one it has ``wide`` columns and reads the input for each. The elements read for a
    token are compared: ``⌈Qr/narrow⌉(d_in + Σ d_out)`` with ``⌈Qr/wide⌉ Σ (d_in + d_out)``.
    """
    together = -(-columns // narrow) * (d_in + sum(outputs))
    return together < -(-columns // wide) * sum(d_in + d for d in outputs)


RIDGE = 206
"""Operations in the time that one byte takes to come from memory: an H200 in bfloat16 (989 TFLOP/s, 4.8 TB/s)."""


def sketch_is_cheaper(tokens: int, power_iterations: int = 1, ridge: float = RIDGE) -> bool:
    """Whether the sketch of one query's divided gradient forms its tiles anew in each of its ``2 + 2·power_iterations``
    passes, or writes the gradient down once.

    For every element the former costs ``2T`` operations more in all passes but one, the latter eight bytes more (one
    write and one read in float32; in each pass it reads four bytes, as the former reads Λ): ``2T(passes − 1) ≤
    8·ridge``, whatever the layer and the rank.
    """
    return 2 * tokens * (1 + 2 * power_iterations) <= 8 * ridge
