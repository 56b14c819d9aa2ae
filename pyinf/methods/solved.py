"""Methods that solve ``(C + λ)x = v``: from raw query gradients to preconditioned ones, through one table of solvers.

To add a solver: write it in ``pyinf/solve`` on abstract operators, enter it in :data:`pyinf.methods.solvers.SOLVERS`,
and name it in a ``Method(solver=…, options=…)``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyinf import progress
from pyinf.capture import PassSource, TracingSession
from pyinf.curvature import Factors
from pyinf.data.batching import PreparedExamples
from pyinf.errors import ConfigError, SolverError
from pyinf.methods.certified import CertifiedRun
from pyinf.methods.gradient import ScoreRequest
from pyinf.methods.options import number
from pyinf.methods.solvers import SOLVERS, Problem
from pyinf.plan import Plan
from pyinf.score import QueryBlock, shared_block
from pyinf.solve import FisherOperator, GGNOperator, GradientRows, Layout, Operator, Solution

__all__ = ["SOLVERS", "Problem", "SolvedRun", "query_block"]

_KEEP_ROWS = 1 << 28
_REMEMBER = 1 << 30
_PRECONDITIONER_DAMPING = 10.0


@dataclass
class SolvedRun(CertifiedRun):
    """A :class:`CertifiedRun` whose query gradients may go through a solver.

    ``refine`` names a solver that takes the place of the method's own for one call (``score(…, tol=…)``).
    """

    refine: str | None = None
    damping: tuple[float, str] = (0.1, "relative")
    _known: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def solver(self) -> str | None:
        """The solver in force."""
        return self.refine or self.method.solver

    @contextmanager
    def refined(self, tol: float) -> Iterator[None]:
        """Solve to ``tol`` inside: by the method's own solver where it takes a tolerance, else by block conjugate
        gradients preconditioned by the method's factors.

        Raises:
            ConfigError: tol is not between 0 and 1, or the method has neither.
        """
        tol = number(0, 1)("tol", tol)
        own = self.method.solver is not None
        if (own and "tol" not in self.options) or (not own and self.method.factors is None):
            raise ConfigError(f"method '{self.method.name}' solves no system to a tolerance; use ekfac_cg, or no tol=")
        kept = self.options, self.refine
        extra = {} if own else {"max_iterations": 200, "block": True, "fit_batches": None, "curvature": "ggn"}
        asked = {"tol": tol, "tol_asked": True}  # whether tol holds is measured, also without certificates
        self.options, self.refine = {**extra, **self.options, **asked}, None if own else "cg"
        try:
            yield
        finally:
            self.options, self.refine = kept

    def _query_block(
        self, queries: PreparedExamples, indices: list[int], factors: Factors | None, request: ScoreRequest, plan: Plan
    ) -> QueryBlock:
        if self.solver is None:
            return super()._query_block(queries, indices, factors, request, plan)
        assert factors is not None and self._train is not None
        V, layout = self.raw_gradients(queries, indices, plan), Layout.of(self.selection.layers)
        started = time.perf_counter()
        solutions = self.solutions(V, factors, request.dampings, request.damping_mode, plan)
        self._add_time("solve", started)
        X = torch.cat([s.X for s in solutions])
        block = query_block(X, layout, self.selection.layers, request)
        found = [
            self._certify_solution(solution, V, factors, damping, request, plan, block, number)
            for number, (solution, damping) in enumerate(zip(solutions, request.dampings, strict=True))
        ]
        self._keep(indices, found)
        return block

    def gradient_rows(
        self, train: PreparedExamples, batches: list[list[int]], loss: str, keep: int = 0
    ) -> GradientRows:
        """Gradients of single training sequences."""

        def source(some: Any) -> PassSource:
            session = TracingSession(self.model, self.selection, self.task, self.groups)
            return PassSource(session, train, [list(b) for b in some])

        element = 8 if self._score_dtype() == torch.float64 else 4
        return GradientRows(source, batches, Layout.of(self.selection.layers), loss, keep, element)

    @contextmanager
    def system(self, train: PreparedExamples, plan: Plan) -> Iterator[tuple[Operator, GradientRows, int]]:
        """The method's curvature operator, the gradients behind it, and its number of sequences."""
        batches, sequences = self.system_batches(train, plan)
        rows = self.gradient_rows(train, batches, self.fit_loss, _KEEP_ROWS)
        if self.options.get("curvature", "ggn") == "fisher" or self.solver in ("datainf", "hyperinf"):
            yield FisherOperator(rows, sequences), rows, sequences
            return
        with GGNOperator(self.model, self.selection, self.task, train, batches, sequences) as curvature:
            yield curvature, rows, sequences

    def solutions(self, V: Tensor, factors: Factors, dampings: Any, damping_mode: str, plan: Plan) -> list[Solution]:
        """Run the solver on right-hand sides ``[Q, D]``, once a damping.

        Raises:
            SolverError: a query has no usable solution; says why and what to change.
        """
        assert self._train is not None and self.solver is not None
        layout, train, out = Layout.of(self.selection.layers), self._train, []
        with self.system(train, plan) as (curvature, rows, sequences):
            for damping in dampings:

                def precondition(X: Tensor, damping: float = damping) -> Tensor:
                    return layout.pack(factors.ihvp(layout.unpack(X), damping, damping_mode))

                heavy = self.options.get("preconditioner_damping", _PRECONDITIONER_DAMPING)
                heavy = max(heavy, damping) if damping_mode == "relative" else heavy

                def smoothed(X: Tensor, heavy: float = heavy) -> Tensor:
                    return layout.pack(factors.ihvp(layout.unpack(X), heavy, "relative"))

                problem = Problem(
                    V=V,
                    layout=layout,
                    curvature=curvature,
                    damping=layout.spread(factors.dampings(damping, damping_mode), V),
                    precondition=precondition,
                    has_preconditioner=self.refine is not None or self.method.factors != "diagonal",
                    options=self.options,
                    train=train,
                    batches=rows.batches,
                    rows=rows,
                    sequences=sequences,
                    token_budget=plan.token_budget,
                    seed=self.seed,
                    smoothed=smoothed,
                    start=self._start(V, (self.solver, id(factors), id(train), damping, damping_mode)),
                )
                with progress.stage(f"solving ({self.solver})", V.shape[0], "queries") as running:
                    solution = SOLVERS[self.solver](problem)
                    running.advance(V.shape[0])
                for row, outcome in enumerate(solution.outcomes):
                    if outcome.failed:
                        raise SolverError(f"method '{self.method.name}', query {row}: {outcome.reason}")
                if not bool(torch.isfinite(solution.X).all()):
                    raise SolverError(
                        f"method '{self.method.name}' gave numbers that are not finite; raise the damping"
                    )
                self._remember(V, solution, (self.solver, id(factors), id(train), damping, damping_mode))
                out.append(solution)
        return out

    def _remember(self, V: Tensor, solution: Solution, key: Any) -> None:
        """Keep the last solutions: the same queries come again for token and module scores and for the report."""
        if V.numel() * V.element_size() <= _REMEMBER and key not in self._known:
            self._known = {k: v for k, v in self._known.items() if k[:3] == key[:3]} | {key: (V, solution.X)}

    def _start(self, V: Tensor, key: Any) -> tuple[Tensor, Tensor] | None:
        """``(which rows, their solutions)`` for the right-hand sides that were solved before, up to rounding."""
        if key not in self._known or self.refine is not None:
            return None
        old, X = self._known[key]
        distance = torch.cdist(V.unsqueeze(0), old.unsqueeze(0))[0]
        nearest = distance.min(dim=1)
        same = nearest.values <= 1e-3 * V.norm(dim=1)
        return (same, X[nearest.indices[same]]) if bool(same.any()) else None

    def self_score(
        self, train: PreparedExamples, factors: Factors | None, dampings: dict[str, float], plan: Plan
    ) -> Tensor:
        """Self-influence ``⟨H⁻¹G_i, G_i⟩`` of every training example, ``[N]``; every example is solved for."""
        if self.method.solver is None:
            return super().self_score(train, factors, dampings, plan)
        assert factors is not None and self.method.solver in SOLVERS
        out = torch.zeros(len(train), dtype=self._score_dtype())
        self._train = self.fit_data if self.fit_data is not None else train
        started = time.perf_counter()

        def take(indices: list[int], G: Tensor) -> None:
            step = max(1, plan.query_block or len(indices))
            for first in range(0, len(indices), step):
                V = G[first : first + step]
                X = self.solutions(V, factors, [self.damping[0]], self.damping[1], plan)[0].X
                out[indices[first : first + step]] = (X * V).sum(dim=1).cpu()

        try:
            self.gradient_rows(train, self.batches(train, plan, scored_only=True), "train").each(take)
        finally:
            self._train = None
        self._add_time("self-influence", started)
        return out


def query_block(X: Tensor, layout: Layout, layers: list[Any], request: ScoreRequest) -> QueryBlock:
    """Solutions ``[Q, D]`` as a block of queries; of low rank, or in a shared basis, where that was asked for."""
    rank = request.query_rank
    if request.query_basis == "shared":
        return shared_block(layout.unpack(X), X.shape[0], rank)
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
