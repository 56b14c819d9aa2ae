"""Methods that solve ``(C + λ)x = v``: from raw query gradients to preconditioned ones, through one table of solvers.

To add a solver: write it in ``pyinf/solve`` against :class:`Problem`'s operators, enter it in :data:`SOLVERS`, and name
it in a ``Method(solver=…, options=…)``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf import progress
from pyinf.curvature import Factors
from pyinf.data.batching import PreparedExamples
from pyinf.errors import SolverError
from pyinf.methods.gradient import GradientRun, ScoreRequest
from pyinf.plan import Plan
from pyinf.score import QueryBlock
from pyinf.solve import Damped, GGNOperator, Layout, Operator, Solution, block_cg, cg

__all__ = ["SOLVERS", "Problem", "SolvedRun"]


@dataclass
class Problem:
    """``(C + λ)x = v`` for a block of queries.

    ``V`` is ``[Q, D]`` in the order of ``layout``, ``curvature`` the operator C of the system, ``damping`` λ ``[D]``,
    ``precondition`` the factors' own inverse ``[q, D] → [q, D]`` at the same damping.
    """

    V: Tensor
    layout: Layout
    curvature: Operator
    damping: Tensor
    precondition: Callable[[Tensor], Tensor]
    options: dict[str, Any]
    run: SolvedRun
    train: PreparedExamples
    plan: Plan
    seed: int = 0


def _cg(problem: Problem) -> Solution:
    options, A = problem.options, Damped(problem.curvature, problem.damping)
    preconditioned = problem.run.method.factors != "diagonal"
    solve = block_cg if options["block"] else cg
    return solve(
        A,
        problem.V,
        problem.precondition if preconditioned else None,
        problem.precondition(problem.V) if preconditioned else None,
        options["tol"],
        options["max_iterations"],
    )


SOLVERS: dict[str, Callable[[Problem], Solution]] = {"cg": _cg}


@dataclass
class SolvedRun(GradientRun):
    """A :class:`GradientRun` whose query gradients go through the method's solver."""

    options: dict[str, Any] = field(default_factory=dict)
    _train: PreparedExamples | None = None

    def score(
        self,
        queries: PreparedExamples,
        train: PreparedExamples,
        factors: Factors | None,
        request: ScoreRequest,
        plan: Plan,
        state: Path | None,
        interval: float = 60.0,
    ) -> tuple[Any, dict[str, Any]]:
        """As :meth:`GradientRun.score`."""
        self._train = train
        try:
            return super().score(queries, train, factors, request, plan, state, interval)
        finally:
            self._train = None

    def _query_block(
        self, queries: PreparedExamples, indices: list[int], factors: Factors | None, request: ScoreRequest, plan: Plan
    ) -> QueryBlock:
        if self.method.solver is None:
            return super()._query_block(queries, indices, factors, request, plan)
        assert factors is not None and self._train is not None
        V, layout = self.raw_gradients(queries, indices, plan), Layout.of(self.selection.layers)
        started = time.perf_counter()
        parts = []
        with self.system(self._train, plan) as curvature:
            for damping in request.dampings:
                solution = self.solve(V, factors, curvature, damping, request.damping_mode, plan)
                parts.append(solution.X)
        self._add_time("solve", started)
        return _block(torch.cat(parts), layout, self.selection.layers, request.query_rank)

    def raw_gradients(self, data: PreparedExamples, indices: list[int], plan: Plan) -> Tensor:
        """``[Q, D]``: the measurement's gradient of some examples; zero rows for those that measure nothing."""
        plain = dataclasses.replace(plan, score_rotated=False)
        block = super()._query_block(data, indices, None, ScoreRequest(), plain)
        dtype, device = self._score_dtype(), next(self.model.parameters()).device
        vectors = {}
        for layer in self.selection.layers:
            dense = block.dense.get(layer.name)
            if dense is None:
                dense = torch.zeros(len(indices), layer.d_out, layer.d_in, dtype=dtype, device=device)
            if layer.bias:
                column = block.bias.get(layer.name)
                column = dense.new_zeros(*dense.shape[:2]) if column is None else column
                dense = torch.cat([dense, column.unsqueeze(2)], dim=2)
            vectors[layer.name] = dense
        return Layout.of(self.selection.layers).pack(vectors)

    @contextmanager
    def system(self, train: PreparedExamples, plan: Plan) -> Iterator[Operator]:
        """The curvature operator of the method: all training data, or ``fit_batches`` of it."""
        batches = self.batches(train, plan, scored_only=False)
        wanted, sequences = self.options.get("fit_batches"), len(train)
        if wanted is not None and wanted < len(batches):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(self.seed)).tolist()
            batches = [batches[i] for i in sorted(order[:wanted])]
            sequences = sum(len(b) for b in batches)
        with GGNOperator(self.model, self.selection, self.task, train, batches, sequences) as curvature:
            yield curvature

    def solve(
        self, V: Tensor, factors: Factors, curvature: Operator, damping: float, damping_mode: str, plan: Plan
    ) -> Solution:
        """Run the method's solver on some right-hand sides ``[Q, D]``.

        Raises:
            SolverError: a query has no usable solution; says why and what to change.
        """
        assert self._train is not None and self.method.solver is not None
        layout = Layout.of(self.selection.layers)

        def precondition(X: Tensor) -> Tensor:
            return layout.pack(factors.ihvp(layout.unpack(X), damping, damping_mode))

        lam = layout.spread(factors.dampings(damping, damping_mode), V)
        problem = Problem(V, layout, curvature, lam, precondition, self.options, self, self._train, plan, self.seed)
        with progress.stage(f"solving ({self.method.name})", V.shape[0], "queries") as running:
            solution = SOLVERS[self.method.solver](problem)
            running.advance(V.shape[0])
        for row, outcome in enumerate(solution.outcomes):
            if outcome.failed:
                raise SolverError(f"method '{self.method.name}' has no solution for query {row}: {outcome.reason}")
        return solution


def _block(X: Tensor, layout: Layout, layers: list[Any], rank: int | float | None) -> QueryBlock:
    """Solutions as a block of queries; of low rank where one was asked for."""
    block = QueryBlock(X.shape[0])
    for layer in layers:
        value = layout.unpack(X)[layer.name]
        if rank is None:
            if layer.bias:
                block.bias[layer.name] = value[:, :, -1].contiguous()
                value = value[:, :, :-1]
            block.dense[layer.name] = value.contiguous()
            continue
        U, s, Vh = torch.linalg.svd(value, full_matrices=False)
        energy = s.double().square()
        share = energy.cumsum(1) / energy.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        r = rank if isinstance(rank, int) else int((share < rank).sum(dim=1).max()) + 1
        r = min(r, s.shape[1])
        block.left[layer.name] = (U[:, :, :r] * s[:, None, :r]).contiguous()
        block.right[layer.name] = Vh[:, :r].contiguous()
        block.energy[layer.name] = share[:, r - 1].to(X.dtype)
    return block
