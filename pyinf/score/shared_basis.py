"""One two-sided basis for all queries at hand, so that the training side costs the same for one query or a thousand.

For a layer with preconditioned query gradients ``X_q`` ``[d_out, d_in(+1)]`` the bases are the leading eigenvectors of
the two second moments of the stack (its higher-order SVD, Tucker 1966; De Lathauwer et al. 2000), every query weighing
the same:

    B_S: of Σ_q X_q X_qᵀ / ‖X_q‖²        B_A: of Σ_q X_qᵀ X_q / ‖X_q‖²

The training gradient is seen only through ``B_Sᵀ G_i B_A`` ``[R, R]``; the score ``⟨B_Sᵀ X_q B_A, B_Sᵀ G_i B_A⟩`` is
that of the query ``B_S B_Sᵀ X_q B_A B_Aᵀ``. The captured energy ``‖B_Sᵀ X_q B_A‖² / ‖X_q‖²`` of every query says what
the basis loses; summed over the (equally weighing) queries, what is lost is at most the two discarded tails together.

Operations of the training side a layer: ``2NR(d_out + d_in) + 2NR²`` to project, and ``2R²`` a query and sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyinf.capture import Layer
from pyinf.curvature.eigen import eigenbasis
from pyinf.curvature.factors import Factors
from pyinf.errors import ConfigError
from pyinf.score.queries import QueryBlock, QueryConsumer

__all__ = ["CoreConsumer", "MomentConsumer", "QueryMoments", "check_basis", "fill_shared", "need_rank", "shared_block"]


def _rank(values: Tensor, rank: int | float) -> int:
    """How many leading eigenvalues (ascending ``values``): ``rank``, or so many that the rest is (1 − rank)/2."""
    if isinstance(rank, int):
        return min(rank, values.numel())
    falling = values.flip(0).double()
    share = falling.cumsum(0) / falling.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return min(values.numel(), int((share < 1 - (1 - rank) / 2).sum()) + 1)


@dataclass
class QueryMoments:
    """The two second moments of every layer's query gradients, each divided by its squared norm (zero ones add none).

    ``left[name]`` ``[d_out, d_out]``, ``right[name]`` ``[d_in(+1), d_in(+1)]``; ``squares[name]``: ``‖X_q‖²``, ``[Q]``.
    """

    count: int
    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, row: int, X: Tensor) -> None:
        """Take query ``row``'s gradient ``[d_out, d_in(+1)]``."""
        if name not in self.left:
            self.left[name] = X.new_zeros(X.shape[0], X.shape[0])
            self.right[name] = X.new_zeros(X.shape[1], X.shape[1])
            self.squares[name] = torch.zeros(self.count, dtype=torch.float64)
        norm = float(torch.linalg.vector_norm(X, dtype=torch.float64))
        self.squares[name][row] = norm * norm
        if norm > 0:
            unit = X / norm
            self.left[name].addmm_(unit, unit.T)
            self.right[name].addmm_(unit.T, unit)

    def bases(self, rank: int | float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``B_S`` ``[d_out, R_S]`` and ``B_A`` ``[d_in(+1), R_A]`` of every layer that some query reaches.

        ``rank``: an int, at most that many on each side; a float in (0, 1): the fewest that lose at most half of
        ``1 − rank`` of the energy on each side, so that the queries' mean captured energy is at least ``rank``.
        """
        outer: dict[str, Tensor] = {}
        inner: dict[str, Tensor] = {}
        for name, left in self.left.items():
            if not bool((self.squares[name] > 0).any()):
                continue
            for where, moment, side in ((outer, left, "output"), (inner, self.right[name], "input")):
                vectors, values = eigenbasis(moment, name=f"the {side} moment of the queries in layer '{name}'")
                where[name] = vectors[:, values.numel() - _rank(values, rank) :].contiguous()
        return outer, inner


class MomentConsumer(QueryConsumer):
    """Consumer of the first pass over the queries: fills ``moments`` and keeps no gradient."""

    moments: QueryMoments

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        rows = [self.position_of[i] for i in self._indices]
        self._add_norms(layer, a, g, offsets, rows)
        for row, X in self._dense(layer, a, g, offsets, rows):
            self.moments.add(layer.name, row, X)


class CoreConsumer(QueryConsumer):
    """Consumer of the second pass: ``core = B_Sᵀ X_q B_A`` of every query, and the energy it has of ``squares``."""

    outer: dict[str, Tensor]
    inner: dict[str, Tensor]
    squares: dict[str, Tensor]

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if layer.name not in self.outer:
            return
        rows = [self.position_of[i] for i in self._indices]
        for row, X in self._dense(layer, a, g, offsets, rows):
            _put_core(self.block, layer.name, row, X, self.outer[layer.name], self.inner[layer.name], self.squares)


def _put_core(
    block: QueryBlock, name: str, row: int, X: Tensor, outer: Tensor, inner: Tensor, squares: dict[str, Tensor]
) -> None:
    if name not in block.core:
        block.core[name] = X.new_zeros(block.count, outer.shape[1], inner.shape[1])
        block.energy[name] = torch.ones(block.count, dtype=X.dtype)  # a query without a gradient loses nothing
    late = outer.shape[0] * inner.shape[1] > inner.shape[0] * outer.shape[1]
    core = (outer.T @ X) @ inner if late else outer.T @ (X @ inner)
    block.core[name][row] = core
    square = float(squares[name][row])
    if square > 0:
        kept = float(torch.linalg.vector_norm(core, dtype=torch.float64))
        block.energy[name][row] = min(1.0, kept * kept / square)


def _to_parameters(
    block: QueryBlock, outer: dict[str, Tensor], inner: dict[str, Tensor], factors: Factors | None
) -> None:
    """Set the block's bases; with factors, bases found in the eigenbases are turned into the layers' coordinates."""
    for name in block.core:
        U_S = U_A = None
        if factors is not None:
            layer = factors.layers[name]
            U_S, U_A = layer.basis, factors.inputs[layer.group].basis
        block.basis_out[name] = outer[name] if U_S is None else U_S @ outer[name]
        block.basis_in[name] = inner[name] if U_A is None else U_A @ inner[name]


def fill_shared(
    block: QueryBlock, settings: tuple[Any, ...], rank: int | float, run: Callable[[QueryConsumer, str], None]
) -> None:
    """Two passes over the queries fill the block: one for the moments and the bases, one for the cores.

    ``settings`` are the further arguments of :class:`QueryConsumer`; ``run(consumer, stage)`` makes a pass. Nothing of
    the size of a gradient is kept for any query.
    """
    factors = settings[1]
    block.factors = factors  # as long as they are worked on, gradients are in the eigenbases: no rotation back
    first = MomentConsumer(block, *settings)
    first.moments = QueryMoments(block.count)
    run(first, "query moments")
    outer, inner = first.moments.bases(rank)
    second = CoreConsumer(block, *settings)
    second.outer, second.inner, second.squares = outer, inner, first.moments.squares
    run(second, "query gradients")
    block.factors = None
    _to_parameters(block, outer, inner, factors)


def shared_block(vectors: dict[str, Tensor], count: int, rank: int | float | None) -> QueryBlock:
    """A block of queries in its shared basis from dense vectors: layer → ``[Q, d_out, d_in(+1)]``.

    Raises:
        ConfigError: no rank.
    """
    rank = need_rank(rank)
    moments = QueryMoments(count)
    for name, V in vectors.items():
        for row in range(count):
            moments.add(name, row, V[row])
    outer, inner = moments.bases(rank)
    block = QueryBlock(count)
    for name in outer:
        for row in range(count):
            _put_core(block, name, row, vectors[name][row], outer[name], inner[name], moments.squares)
    _to_parameters(block, outer, inner, None)
    return block


def check_basis(basis: str | None, rank: int | float | None) -> None:
    """Refuse an unknown basis, and a shared one without a rank.

    Raises:
        ConfigError: either.
    """
    if basis not in (None, "shared"):
        raise ConfigError(f"query_basis is {basis!r}; use 'shared', or None for queries on their own")
    if basis == "shared":
        need_rank(rank)


def need_rank(rank: int | float | None) -> int | float:
    """The rank of a shared basis.

    Raises:
        ConfigError: there is none.
    """
    if rank is None:
        raise ConfigError(
            "query_basis='shared' needs query_rank: a rank such as 256, or a captured energy such as 0.99"
        )
    return rank
