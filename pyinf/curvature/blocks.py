"""Very wide factors: split into diagonal blocks, so that the eigendecomposition stays bounded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from pyinf.curvature.eigen import eigenbasis, solved_together
from pyinf.curvature.eigen_gpu import batched_eigh
from pyinf.errors import ConfigError

__all__ = ["block_bounds", "block_eigenbases", "block_eigenbasis", "check_block", "factor_label"]


def check_block(limit: int | None) -> int | None:
    """``None`` (never split) or a width ≥ 1.

    Raises:
        ConfigError: neither.
    """
    if limit is None or (isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1):
        return limit
    raise ConfigError(f"factor_block is {limit!r}; give the widest block to decompose, or None to split none")


def factor_label(kind: str, name: str) -> str:
    """What errors call the factor of a layer: ``kind`` is "A" (its input) or "S" (its output gradient)."""
    return f"the input of layer '{name}'" if kind == "A" else f"the output gradient of layer '{name}'"


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


def block_eigenbases(
    matrices: Mapping[str, Tensor], solver: str = "auto", limit: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The decompositions of those of ``matrices`` (by a name for errors) that are best done together, in batches; the
    others are left to :func:`block_eigenbasis`. In float64, as there for factors this small.

    Raises:
        NonFiniteError: as :func:`pyinf.curvature.eigenbasis`.
    """
    chosen = {
        name: matrix
        for name, matrix in matrices.items()
        if solved_together(matrix, solver) and len(block_bounds(matrix.shape[0], limit)) == 2
    }
    if len(chosen) < 2:
        return {}
    return dict(zip(chosen, batched_eigh(list(chosen.values()), names=list(chosen)), strict=True))
