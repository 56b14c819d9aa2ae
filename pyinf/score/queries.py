"""Query gradients: captured, preconditioned and kept dense or low rank, ready to meet the training set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer
from pyinf.curvature.factors import Factors, InputFactor, LayerFactor
from pyinf.curvature.rotate import input_rows, rotated_gradients, working
from pyinf.errors import ConfigError

__all__ = ["QueryBlock", "QueryConsumer", "parse_rank"]


def parse_rank(rank: int | float | str | None) -> int | float | None:
    """``None`` (dense), a rank ≥ 1, or a captured energy in (0, 1) given as a float or a string."""
    if rank is None:
        return None
    if isinstance(rank, str):
        try:
            rank = int(rank) if rank.strip().isdigit() else float(rank)
        except ValueError:
            raise ConfigError(
                f"query_rank is {rank!r}; give a rank such as 64, or a captured energy such as 0.99"
            ) from None
    if isinstance(rank, bool) or (isinstance(rank, int) and rank < 1) or (isinstance(rank, float) and not 0 < rank < 1):
        raise ConfigError(f"query_rank is {rank}; give a rank ≥ 1, or a captured energy between 0 and 1")
    return rank


@dataclass
class QueryBlock:
    """Preconditioned gradients of a block of queries, by layer.

    ``dense[name]`` is ``[Q, d_out, d_in]`` and ``bias[name]`` ``[Q, d_out]`` its bias column, apart so that no column
    of ones
    is ever joined to the training inputs; in low rank ``left[name]`` ``[Q, d_out, r]`` and ``right[name]``
    ``[Q, r, d_in(+1)]`` take its place. ``energy[name]`` ``[Q]`` is the share ``‖LR‖²/‖X‖²`` that the rank keeps, and
    ``norms`` ``[Q]`` the squared norm of the query's own gradient over all layers. In a basis that all queries share
    (:mod:`pyinf.score.shared_basis`) ``core[name]`` is ``[Q, R_S, R_A]``, between ``basis_out[name]`` ``[d_out, R_S]``
    and ``basis_in[name]`` ``[d_in(+1), R_A]``.
    """

    count: int
    dense: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)
    norms: Tensor | None = None
    factors: Factors | None = (
        None  # given: ``dense`` is in the eigenbases, ``(U_Sᵀ V U_A) ⊘ (Λ + λ)``, bias column included
    )
    core: dict[str, Tensor] = field(default_factory=dict)
    basis_out: dict[str, Tensor] = field(default_factory=dict)
    basis_in: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reaches(self) -> bool:
        """Whether any query's gradient reaches any layer."""
        return bool(self.dense or self.left or self.core)

    def captured_energy(self) -> Tensor | None:
        """Smallest captured energy over layers, per query; None for dense queries."""
        return torch.stack(list(self.energy.values())).amin(dim=0) if self.energy else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (self.dense, self.bias, self.left, self.right, self.core, self.basis_out, self.basis_in)
        return sum(t.numel() * t.element_size() for part in parts for t in part.values())


class QueryConsumer(Consumer):
    """Consumer that turns each query's captured factors into its preconditioned gradient.

    With ``factors`` the product is ``U_S[(U_Sᵀ V U_A) ⊘ (Λ + λ)]U_Aᵀ``; without, the gradient itself. ``dampings`` may
    hold
    several λ per layer: the block then has ``len(dampings) · Q`` rows, damping by damping.
    """

    def __init__(
        self,
        block: QueryBlock,
        position_of: dict[int, int],
        factors: Factors | None,
        dampings: list[dict[str, float]],
        rank: int | float | None,
        want_norms: bool,
        seed: int = 0,
        silent: list[int] | None = None,
    ) -> None:
        self.block, self.position_of, self.factors = block, position_of, factors
        self.dampings, self.rank, self.want_norms, self.seed = dampings, rank, want_norms, seed
        self._queries = block.count // max(1, len(dampings))
        # Rows of queries without a label: never written, so they must be zeroed. The rest need not be touched twice.
        self._silent = [d * self._queries + row for d in range(max(1, len(dampings))) for row in silent or ()]
        self._indices: list[int] = []

    def for_batch(self, indices: list[int]) -> QueryConsumer:
        """The consumer of the next batch."""
        self._indices = indices
        return self

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        rows = [self.position_of[i] for i in self._indices]
        self._add_norms(layer, a, g, offsets, rows)
        fixed = isinstance(self.rank, int) and self.factors is not None
        if fixed and self.rank < min(layer.d_out, layer.columns):
            self._low_rank(layer, a, g, offsets, rows)
            return
        for position, X in self._dense(layer, a, g, offsets, rows):
            self._put(layer, position, X)

    def _add_norms(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor, rows: list[int]) -> None:
        if not self.want_norms:
            return
        if self.block.norms is None:
            self.block.norms = torch.zeros(self._queries, dtype=torch.float64)
        norms = ops.gradient_norm(working(g), input_rows(a, layer.bias), offsets).double().square()
        self.block.norms[rows] += norms.cpu()

    def _factor(self, layer: Layer) -> tuple[LayerFactor, InputFactor]:
        assert self.factors is not None
        factor = self.factors.layers[layer.name]
        return factor, self.factors.inputs[factor.group]

    def _dense(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor, rows: list[int]):
        """Yields (row of the block, X); one gradient at a time, rotated before or after the contraction by cost."""
        if self.factors is None:
            for row, V in zip(rows, rotated_gradients(g, a, offsets, None, None, layer.bias), strict=True):
                yield row, V
            return
        factor, shared = self._factor(layer)
        spare = torch.empty_like(factor.corrected)
        inverses = [(factor.corrected + damping[layer.name]).reciprocal_() for damping in self.dampings]
        for row, V in zip(rows, rotated_gradients(g, a, offsets, factor.basis, shared.basis, layer.bias), strict=True):
            for number, inverse in enumerate(inverses):
                X = torch.mul(V, inverse, out=spare)
                if self.block.factors is not None:
                    yield number * self._queries + row, X
                    continue
                if shared.basis is not None:
                    X = X @ shared.basis.T
                if factor.basis is not None:
                    X = factor.basis @ X
                yield number * self._queries + row, X

    def _low_rank(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor, rows: list[int]) -> None:
        factor, shared = self._factor(layer)
        assert isinstance(self.rank, int)
        inputs = input_rows(a, layer.bias)
        for number, damping in enumerate(self.dampings):
            L, R, energy = ops.precondition_low_rank(
                working(g), inputs, factor.basis, shared.basis, factor.corrected, damping[layer.name],
                self.rank, offsets=offsets, power_iterations=2, seed=self.seed,
            )  # fmt: skip
            target = [number * self._queries + row for row in rows]
            self._store(self.block.left, layer.name, target, L)
            self._store(self.block.right, layer.name, target, R)
            self._store(self.block.energy, layer.name, target, energy.to(L.dtype))

    def _put(self, layer: Layer, position: int, X: Tensor) -> None:
        if self.rank is None or (isinstance(self.rank, int) and self.rank >= min(X.shape)):
            if layer.bias and self.block.factors is None:
                self._store(self.block.bias, layer.name, [position], X[:, -1].unsqueeze(0))
                X = X[:, :-1]
            self._store(self.block.dense, layer.name, [position], X.unsqueeze(0))
            return
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        energy = s.double().square()
        share = energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
        r = self.rank if isinstance(self.rank, int) else int((share < self.rank).sum()) + 1
        r = min(r, s.numel())
        self._store(self.block.left, layer.name, [position], (U[:, :r] * s[:r]).unsqueeze(0))
        self._store(self.block.right, layer.name, [position], Vh[:r].unsqueeze(0))
        self._store(self.block.energy, layer.name, [position], share[r - 1 : r].to(X.dtype))

    def _store(self, where: dict[str, Tensor], name: str, rows: list[int], value: Tensor) -> None:
        held = where.get(name)
        if held is None:
            held = where[name] = value.new_empty(self.block.count, *value.shape[1:])
            if self._silent:
                held[self._silent] = 0
        axis = {id(self.block.left): 2, id(self.block.right): 1}.get(id(where))
        if axis is not None and held.shape[axis] != value.shape[axis]:  # ranks chosen by energy differ: pad with zeros
            width = max(held.shape[axis], value.shape[axis])
            held = where[name] = _widen(held, axis, width)
            value = _widen(value, axis, width)
        if len(rows) == 1:
            held[rows[0]].copy_(value[0])
        else:
            held[rows] = value


def _widen(x: Tensor, axis: int, width: int) -> Tensor:
    if x.shape[axis] == width:
        return x
    shape = list(x.shape)
    shape[axis] = width - x.shape[axis]
    return torch.cat([x, x.new_zeros(shape)], dim=axis).contiguous()
