"""The table of solvers that methods name: each takes a :class:`Problem` and composes what ``pyinf.solve`` offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyinf.data.batching import PreparedExamples, make_batches
from pyinf.errors import ConfigError, ResourceError
from pyinf.plan import available_memory
from pyinf.solve import Damped, GradientRows, Layout, Operator, Outcome, Solution, block_cg, cg
from pyinf.solve.closed import datainf, dense_matrix, hyperinf, woodbury
from pyinf.solve.iterative import Schedule, lissa_settings, power_iteration, richardson
from pyinf.solve.krylov import arnoldi
from pyinf.solve.operators import error_bound, relative_residuals

__all__ = ["SOLVERS", "Problem"]


@dataclass
class Problem:
    """``(C + λ)x = v`` for a block of queries.

    ``V`` is ``[Q, D]`` in the order of ``layout``; ``curvature`` the operator C of the system, over ``batches`` of
    ``train``; ``damping`` λ ``[D]``; ``precondition`` the factors' own inverse ``[q, D] → [q, D]`` at that damping, and
    ``has_preconditioner`` says whether the method means it to be used; ``rows`` makes the gradients of single
    sequences. ``smoothed`` is the factors' inverse at the damping of ``preconditioner_damping``, ``start`` what is
    known of the solutions.
    """

    V: Tensor
    layout: Layout
    curvature: Operator
    damping: Tensor
    precondition: Callable[[Tensor], Tensor]
    has_preconditioner: bool
    options: dict[str, Any]
    train: PreparedExamples
    batches: list[list[int]]
    rows: GradientRows
    sequences: int
    token_budget: int | None = None
    seed: int = 0
    start: tuple[Tensor, Tensor] | None = None
    smoothed: Callable[[Tensor], Tensor] | None = None

    def warm(self) -> Tensor | None:
        """Where to start: earlier solutions of the same right-hand sides, or the factors' own inverse, or nothing."""
        if self.start is None and not self.has_preconditioner:
            return None
        X = self.precondition(self.V) if self.has_preconditioner else torch.zeros_like(self.V)
        if self.start is not None:
            X[self.start[0]] = self.start[1]
        return X

    @property
    def indices(self) -> list[int]:
        """The training sequences of the system."""
        return [i for batch in self.batches for i in batch]

    def sample(self, size: int) -> Callable[[int], Operator]:
        """``t ↦ C_t`` on ``size`` sequences drawn without replacement, anew every time; a function of seed and t."""
        indices = self.indices

        def draw(t: int) -> Operator:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + t) % (1 << 62))
            chosen = [indices[i] for i in torch.randperm(len(indices), generator=generator)[:size].tolist()]
            batches = make_batches(self.train.lengths, chosen, None, self.token_budget)
            return self.curvature.on(batches, len(chosen))  # type: ignore[attr-defined]

        return draw


def _cg(problem: Problem) -> Solution:
    options, A = problem.options, Damped(problem.curvature, problem.damping)
    use = problem.has_preconditioner
    solve = block_cg if options.get("block", True) else cg
    return solve(
        A,
        problem.V,
        (problem.smoothed or problem.precondition) if use else None,
        problem.warm(),
        options["tol"],
        options["max_iterations"],
        final=options.get("certify", "auto") is not False or options.get("tol_asked", False),
    )


def _neumann(problem: Problem) -> Solution:
    scale = problem.options["scale"]
    if scale is None:
        like = problem.damping.unsqueeze(0)
        largest = power_iteration(problem.curvature, problem.layout.size, like, seed=problem.seed)
        scale = 1.1 * (largest + float(problem.damping.max()))
    solution = richardson(
        problem.curvature,
        problem.V,
        problem.damping,
        Schedule(1 / scale),
        problem.options["max_iterations"],
        problem.options["tol"],
    )
    solution.facts["scale"] = scale
    return solution


def _lissa(problem: Problem) -> Solution:
    options = problem.options
    most = options["max_iterations"]
    found = lissa_settings(problem.curvature, problem.damping, len(problem.indices), options["tol"], most, problem.seed)
    scale = options["scale"] if options["scale"] is not None else found.scale
    size = options["batch"] if options["batch"] is not None else found.batch
    fixed = size >= len(problem.indices)
    solution = richardson(
        problem.curvature if fixed else problem.sample(size),
        problem.V,
        problem.damping,
        Schedule(1 / scale, average=not fixed),
        found.depth,
        options["tol"],
        system=problem.curvature,
    )
    solution.facts |= {"scale": scale, "batch": min(size, len(problem.indices)), "depth": found.depth}
    return solution


def _astra(problem: Problem) -> Solution:
    options = problem.options
    size = options["batch"]
    fixed = size >= len(problem.indices)
    draw = problem.sample(size)
    first = problem.curvature if fixed else draw(0)
    step = options["step"]
    if step is None:

        def preconditioned(x: Tensor) -> Tensor:
            return problem.precondition(torch.addcmul(first(x), x, problem.damping))

        step = 1 / power_iteration(preconditioned, problem.layout.size, problem.damping.unsqueeze(0), seed=problem.seed)
    solution = richardson(
        problem.curvature if fixed else draw,
        problem.V,
        problem.damping,
        Schedule(step, options["momentum"], options["decay"], options["decay_every"]),
        options["max_iterations"],
        options["tol"],
        problem.precondition,
        problem.precondition(problem.V),
        problem.curvature,
    )
    solution.facts |= {"step": step, "batch": min(size, len(problem.indices))}
    return solution


def _arnoldi(problem: Problem) -> Solution:
    options = problem.options
    return arnoldi(
        problem.curvature,
        problem.V,
        problem.damping,
        options["steps"],
        options["rank"],
        options["complement"],
        options["tol"],
        problem.seed,
    )


def _unmeasured(X: Tensor, why: str, iterations: int = 0) -> Solution:
    count = X.shape[0]
    return Solution(X, [Outcome("approximate", why) for _ in range(count)], [iterations] * count)


def _datainf(problem: Problem) -> Solution:
    X = datainf(problem.rows, problem.V, problem.damping, problem.sequences)
    return _unmeasured(X, "the mean of inverses in place of the inverse of the mean, layer by layer")


def _hyperinf(problem: Problem) -> Solution:
    X, iterations = hyperinf(problem.rows, problem.V, problem.damping, problem.sequences, problem.options["side"])
    return _unmeasured(X, "one side of each layer's gradients, layer by layer", iterations)


def _exact(problem: Problem) -> Solution:
    A, V, tol = Damped(problem.curvature, problem.damping), problem.V, problem.options["tol"]
    if problem.options["curvature"] == "fisher":
        element, indices = V.element_size(), problem.indices
        need = 2 * len(indices) * problem.layout.size * element + 16 * len(indices) ** 2
        _must_fit(need, f"the gradients of {len(indices)} sequences of {problem.layout.size:,} numbers", V.device)
        G = problem.rows.matrix()

        def inverse(R: Tensor) -> Tensor:
            return woodbury(G, R, problem.damping, problem.sequences)
    else:
        most = problem.options["limit"]
        if problem.layout.size > most:
            raise ConfigError(
                f"the Gauss-Newton matrix of {problem.layout.size:,} parameters is formed whole, limit is {most:,}; "
                "trace fewer layers (modules=), raise limit, use curvature='fisher' (Woodbury), or method 'ekfac_cg'"
            )
        _must_fit(3 * 8 * problem.layout.size**2, f"the matrix of {problem.layout.size:,}² numbers", V.device)
        matrix = dense_matrix(problem.curvature, V).double()
        matrix.diagonal().add_(problem.damping.double())
        factor = torch.linalg.cholesky(matrix)

        def inverse(R: Tensor) -> Tensor:
            return torch.cholesky_solve(R.double().T, factor).T.to(R.dtype)

    X = inverse(V)
    for _ in range(3):  # refinement: what rounding left in the first solve
        R = V - A(X)
        if float(torch.maximum(relative_residuals(R, V), error_bound(X, R, V, problem.damping)).max()) <= 0.1 * tol:
            break
        X = X + inverse(R)
    R = V - A(X)
    residuals = relative_residuals(R, V).tolist()
    bounds = error_bound(X, R, V, problem.damping).tolist()
    outcomes = [
        Outcome("solved")
        if max(r, b) <= tol
        else Outcome("approximate", f"rounding leaves a relative residual of {r:.2g}")
        for r, b in zip(residuals, bounds, strict=True)
    ]
    return Solution(X, outcomes, [1] * V.shape[0], residuals, bounds, problem.curvature.products)


def _must_fit(need: int, what: str, device: torch.device) -> None:
    free = available_memory(device)
    if need > free:
        raise ResourceError(
            f"{what} take {need / (1 << 30):.1f} GiB, {free / (1 << 30):.1f} GiB are free; use method 'ekfac_cg'"
        )


SOLVERS: dict[str, Callable[[Problem], Solution]] = {
    "cg": _cg,
    "astra": _astra,
    "lissa": _lissa,
    "neumann": _neumann,
    "arnoldi": _arnoldi,
    "datainf": _datainf,
    "hyperinf": _hyperinf,
    "exact": _exact,
}
