"""Very wide factors: split into diagonal blocks, so that the eigendecomposition stays bounded."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pyinf.curvature.eigen import eigenbasis
from pyinf.errors import ConfigError

__all__ = ["block_bounds", "block_eigenbasis", "check_block"]


def check_block(limit: int | None) -> int | None:
    """``None`` (never split) or a width ≥ 1.

    Raises:
        ConfigError: neither.
    """
    if limit is None or (isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1):
        return limit
    raise ConfigError(f"factor_block is {limit!r}; give the widest block to decompose, or None to split none")


def block_bounds(width: int, limit: int | None) -> list[int]:
    """Bounds of the fewest blocks of at most ``limit`` columns, as equal as can be: 10 by 4 → 0, 4, 7, 10."""
    count = 1 if limit is None else -(-width // limit)
    small, extra = divmod(width, count)
    bounds = [0]
    for block in range(count):
        bounds.append(bounds[-1] + small + (block < extra))
    return bounds


def block_eigenbasis(
    matrix: Tensor, solver: str = "auto", name: str = "factor", limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Block-diagonal orthogonal ``Q [n, n]`` and eigenvalues ``d [n]``, a block after another.

    Off-diagonal blocks of the factor are set to zero (Grosse et al. 2023, section 2.2, do so for the widest MLP
    layers): ``Q`` diagonalises what is left. Corrected eigenvalues in that basis are exact second moments all the
    same, since they are exact in every orthogonal basis. Cost: ``k`` decompositions of width ``n/k``, ``k²`` times
    less than one of width ``n``; ``Q`` is stored dense.

    Args:
        matrix: ``[n, n]``; only the lower triangle is read.
        limit: the widest block, or None for a single one.

    Raises:
        NonFiniteError: as :func:`pyinf.curvature.eigenbasis`.
    """
    bounds = block_bounds(matrix.shape[0], limit)
    if len(bounds) == 2:
        return eigenbasis(matrix, solver, name)
    basis = torch.zeros_like(matrix)
    values = matrix.new_empty(matrix.shape[0])
    for start, stop in pairwise(bounds):
        block = slice(start, stop)
        basis[block, block], values[block] = eigenbasis(matrix[block, block].contiguous(), solver, name)
    return basis, values
