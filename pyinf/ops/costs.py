"""What each way of computing an op costs, in floating-point operations (a multiply-add counts two).

The choices below are formulas so that they can be tested and printed in a plan; no shape is special.
Symbols: N counted tokens, T tokens of one sequence, B sequences, Q queries, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
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
    "sketch_flops",
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
