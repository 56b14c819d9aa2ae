"""The proximal Bregman response function: what influence functions with a Gauss–Newton curvature predict exactly.

``θ*(ε) = argmin_θ  (1/N) Σ_i D_i(θ, θ_s) + Σ_l λ_l/2 ‖θ_l − θ_s,l‖² + ε L_m(θ)``, where ``D_i`` is the Bregman
divergence of the outputs (softmax cross-entropy: ``Σ_t KL(p_s ‖ p)``; squared error: ``½‖y − y_s‖²``), ``L_m`` the
summed loss of example m, and ``θ_s`` the parameters at hand, a minimum at ``ε = 0`` by construction. Its derivative is

    d f_q(θ*(ε)) / dε |_{ε=0} = −∇f_qᵀ (C + λ)⁻¹ ∇L_m = −τ(q, m),

so the response isolates errors of the curvature and of the solver from everything about training. Removing m is
``ε = −1/N``.

Source: Bae et al. 2022, arXiv 2209.05364; Grosse et al. 2023, arXiv 2308.03296, section 2.1.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pyinf import progress
from pyinf.errors import ConfigError, DataError, ModelError

__all__ = ["FiveTerms", "ProximalBregman", "five_terms", "language_model_outputs"]

Parameters = dict[str, Tensor]


def language_model_outputs(run: Callable[[Tensor], Any], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits that predict a next token, and those tokens: ``[B, T − 1, V]`` and ``[B, T − 1]`` from ``input_ids``."""
    ids = batch["input_ids"]
    return run(ids).logits[:, :-1], ids[:, 1:]


class ProximalBregman:
    """Responses of a trained model to up- or down-weighting training examples, by optimisation, not by linear algebra.

    Args:
        model: trained; it is not changed. Use float64 for tight tolerances.
        train: the whole training set as one batch, a mapping of tensors whose first axis is the example.
        damping: λ, one for all parameters or ``{parameter name: λ}``.
        parameters: names of the parameters that respond (default: all that require a gradient).
        outputs: ``(run, batch) -> (outputs [B, …], targets)``; ``run(x)`` is the model at the parameters in question.
            Default: a causal language model on ``input_ids``.
        loss: ``"cross_entropy"`` (outputs are logits ``[B, …, V]``, targets class numbers) or ``"squared"``
            (``½‖y − target‖²``).

    Raises:
        ConfigError: damping ≤ 0, unknown loss or parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Mapping[str, Tensor],
        damping: float | Mapping[str, float],
        parameters: Sequence[str] | None = None,
        outputs: Callable[[Callable[..., Any], Mapping[str, Tensor]], tuple[Tensor, Tensor]] = language_model_outputs,
        loss: str = "cross_entropy",
    ) -> None:
        if loss not in ("cross_entropy", "squared"):
            raise ConfigError(f"unknown loss '{loss}'; use 'cross_entropy' or 'squared'")
        own = dict(model.named_parameters())
        names = [n for n, p in own.items() if p.requires_grad] if parameters is None else list(parameters)
        for name in names:
            if name not in own:
                raise ConfigError(f"the model has no parameter '{name}'; it has {', '.join(list(own)[:8])}, …")
        if not names:
            raise ModelError("no parameter requires a gradient; name those that may respond with parameters=…")
        each = {n: float(damping[n] if isinstance(damping, Mapping) else damping) for n in names}
        if min(each.values()) <= 0:
            raise ConfigError("damping must be above 0: the proximal term is what makes the response unique")
        self.model, self.train, self.loss, self._outputs, self.damping = model, dict(train), loss, outputs, each
        self.start: Parameters = {n: own[n].detach().clone() for n in names}
        self._rest = {n: p.detach() for n, p in own.items() if n not in self.start} | dict(model.named_buffers())
        self.size = len(next(iter(self.train.values())))
        with torch.no_grad():
            self._y_start = self.outputs(self.start, self.train)[0].detach()

    # -- losses --------------------------------------------------------------------------------------------------------

    def outputs(self, theta: Parameters, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs and targets at ``theta``."""
        return self._outputs(lambda *a, **k: functional_call(self.model, {**self._rest, **theta}, a, k), batch)

    def losses(self, theta: Parameters, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed loss of each example, ``[B]``."""
        y, target = self.outputs(theta, batch)
        if self.loss == "squared":
            return 0.5 * (y - target).square().flatten(1).sum(1)
        flat = functional.cross_entropy(y.reshape(-1, y.shape[-1]), target.reshape(-1), reduction="none")
        return flat.reshape(len(y), -1).sum(1)

    def divergence(self, theta: Parameters) -> Tensor:
        """``(1/N) Σ_i D_i(θ, θ_s)``, a scalar; 0 with gradient 0 at θ_s."""
        y, _ = self.outputs(theta, self.train)
        if self.loss == "squared":
            return 0.5 * (y - self._y_start).square().sum() / self.size
        log_p, log_s = y.log_softmax(-1), self._y_start.log_softmax(-1)
        return (log_s.exp() * (log_s - log_p)).sum() / self.size

    def proximity(self, theta: Parameters) -> Tensor:
        """``Σ_l λ_l/2 ‖θ_l − θ_s,l‖²``."""
        return torch.stack([self.damping[n] / 2 * (theta[n] - self.start[n]).square().sum() for n in self.start]).sum()

    def objective(self, theta: Parameters, weights: Tensor) -> Tensor:
        """The proximal Bregman objective; ``weights`` ``[N]`` holds ε of every example (0 = untouched)."""
        value = self.divergence(theta) + self.proximity(theta)
        touched = torch.nonzero(weights).flatten()
        if len(touched):
            some = {k: v[touched] for k, v in self.train.items()}
            value = value + (weights[touched] * self.losses(theta, some)).sum()
        return value

    # -- optimisation --------------------------------------------------------------------------------------------------

    def minimise(
        self,
        objective: Callable[[Parameters], Tensor],
        start: Parameters | None = None,
        optimizer: str = "lbfgs",
        steps: int = 500,
        tolerance: float = 1e-8,
        rate: float = 1e-3,
    ) -> tuple[Parameters, float]:
        """Minimise any ``objective`` of the parameters from ``start`` (default θ_s).

        Args:
            optimizer: ``"lbfgs"`` (strong Wolfe line search) or ``"adam"`` (``rate``, cosine to 0).
            tolerance: stop at this norm of the gradient.

        Returns:
            The parameters, and the norm of the gradient there.
        """
        theta = {n: p.clone().requires_grad_(True) for n, p in (start or self.start).items()}
        leaves = list(theta.values())

        def evaluate() -> Tensor:
            for p in leaves:
                p.grad = None
            value = objective(theta)
            value.backward()
            return value

        if optimizer == "lbfgs":
            solver = torch.optim.LBFGS(
                leaves,
                lr=1,
                max_iter=steps,
                max_eval=2 * steps,
                tolerance_grad=tolerance / max(1, sum(p.numel() for p in leaves)) ** 0.5,
                tolerance_change=0,
                history_size=30,
                line_search_fn="strong_wolfe",
            )
            solver.step(evaluate)  # type: ignore[arg-type]
        elif optimizer == "adam":
            adam = torch.optim.Adam(leaves, lr=rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
            for _ in range(steps):
                evaluate()
                if _norm(leaves) <= tolerance:
                    break
                adam.step()
                schedule.step()
        else:
            raise ConfigError(f"unknown optimizer '{optimizer}'; use 'lbfgs' or 'adam'")
        evaluate()
        return {n: p.detach() for n, p in theta.items()}, _norm(leaves)

    def response(
        self, example: int | Sequence[int], epsilon: float | None = None, tolerance: float = 1e-8, **options: Any
    ) -> tuple[Parameters, float]:
        """``θ*(ε)`` for one example or a group, and the gradient norm reached; ``epsilon`` is −1/N (removal) if None.

        Raises:
            DataError: an example that is not in the training set.
        """
        index = [example] if isinstance(example, int) else list(example)
        if not index or min(index) < 0 or max(index) >= self.size:
            raise DataError(f"example {example} is not in the training set of {self.size}")
        weights = torch.zeros(self.size, dtype=next(iter(self.start.values())).dtype)
        weights[index] = -1 / self.size if epsilon is None else epsilon
        return self.minimise(lambda theta: self.objective(theta, weights), tolerance=tolerance, **options)

    def response_scores(
        self,
        queries: Mapping[str, Tensor],
        examples: Sequence[int],
        epsilon: float | None = None,
        tolerance: float = 1e-8,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """What a score should be: ``−(f_q(θ*(ε)) − f_q(θ_s)) / ε`` for every query and example.

        Returns:
            ``[Q, len(examples)]``, and the gradient norm at which each optimisation ended, ``[len(examples)]``. A norm
            far above ``tolerance`` means that the column is not converged: more steps, or more damping.
        """
        step = -1 / self.size if epsilon is None else epsilon
        columns, norms = [], []
        with torch.no_grad():
            base = self.losses(self.start, queries)
        with progress.stage("proximal responses", len(examples), "examples") as stage:
            for m in examples:
                theta, norm = self.response(int(m), step, tolerance, **options)
                with torch.no_grad():
                    columns.append(-(self.losses(theta, queries) - base) / step)
                norms.append(norm)
                stage.advance(1)
        return torch.stack(columns, dim=1), torch.tensor(norms)


def _norm(leaves: Sequence[Tensor]) -> float:
    return float(torch.stack([p.grad.square().sum() for p in leaves if p.grad is not None]).sum().sqrt())


@dataclass(frozen=True)
class FiveTerms:
    """Influence minus leave-one-out, split into what each approximation adds. All are changes of the query loss on
    removal, ``f_q(without m) − f_q(with m)``, ``[Q, M]``; each term is a difference of two neighbours in the chain

    ``cold → warm → proximal → bregman → exact → approximate``:

    - ``cold``: retrained from the initialisation; ``warm``: from θ_s; ``proximal``: from θ_s with the proximal term;
    - ``bregman``: the PBRF; ``exact``: ``τ/N`` with the exact damped Gauss–Newton solve; ``approximate``: the scores at
      hand, ``τ̂/N``.

    The five terms add up to ``approximate − cold``.
    """

    cold: Tensor
    warm: Tensor
    proximal: Tensor
    bregman: Tensor
    exact: Tensor
    approximate: Tensor

    @property
    def warm_start(self) -> Tensor:
        """Warm-start gap: ``warm − cold``."""
        return self.warm - self.cold

    @property
    def proximity(self) -> Tensor:
        """Proximity gap: ``proximal − warm``."""
        return self.proximal - self.warm

    @property
    def non_convergence(self) -> Tensor:
        """Non-convergence gap: ``bregman − proximal`` (θ_s was no minimum of the training loss)."""
        return self.bregman - self.proximal

    @property
    def linearisation(self) -> Tensor:
        """Linearisation error: ``exact − bregman``."""
        return self.exact - self.bregman

    @property
    def solver(self) -> Tensor:
        """Solver error: ``approximate − exact``."""
        return self.approximate - self.exact

    def to_dict(self) -> dict[str, float]:
        """Mean absolute value of each term and of the whole."""
        names = ("warm_start", "proximity", "non_convergence", "linearisation", "solver")
        found = {name: float(getattr(self, name).abs().mean()) for name in names}
        return {**found, "total": float((self.approximate - self.cold).abs().mean())}


def five_terms(
    problem: ProximalBregman,
    queries: Mapping[str, Tensor],
    examples: Sequence[int],
    exact: Tensor,
    approximate: Tensor,
    initial: Parameters,
    cold_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> FiveTerms:
    """The split of influence minus leave-one-out of Bae et al. 2022, by running every stage.

    Args:
        queries: a batch; f is the loss of each.
        exact, approximate: scores ``τ`` ``[Q, M]`` of the same pairs, from the exact and from an approximate solve.
        initial: the parameters before training, from which the cold retraining starts.
        cold_options: of :meth:`ProximalBregman.minimise` for the cold retraining, which must be the training that
            gave θ_s; e.g. ``{"optimizer": "adam", "steps": 400}``.
        options: of ``minimise`` for the others.
    """
    n = problem.size
    shape = (len(next(iter(queries.values()))), len(examples))
    for name, values in (("exact", exact), ("approximate", approximate)):
        if tuple(values.shape) != shape:
            raise DataError(
                f"{name} scores have shape {tuple(values.shape)}; one a query and example is needed: {shape}"
            )
    with torch.no_grad():
        trained = problem.losses(problem.start, queries)
    cold_settings = dict(cold_options or options)
    everything, _ = problem.minimise(lambda t: problem.losses(t, problem.train).sum() / n, initial, **cold_settings)
    with torch.no_grad():
        cold_base = problem.losses(everything, queries)
    stages: dict[str, list[Tensor]] = {"cold": [], "warm": [], "proximal": [], "bregman": []}
    for m in examples:
        kept = torch.ones(n, dtype=torch.bool)
        kept[int(m)] = False
        rest = {k: v[kept] for k, v in problem.train.items()}

        def without(t: Parameters, rest: Mapping[str, Tensor] = rest) -> Tensor:
            return problem.losses(t, rest).sum() / n

        def near(t: Parameters, without: Callable[[Parameters], Tensor] = without) -> Tensor:
            return without(t) + problem.proximity(t)

        found = {
            "cold": problem.minimise(without, initial, **cold_settings)[0],
            "warm": problem.minimise(without, **options)[0],
            "proximal": problem.minimise(near, **options)[0],
            "bregman": problem.response(int(m), **options)[0],
        }
        with torch.no_grad():
            for name, theta in found.items():
                base = cold_base if name == "cold" else trained
                stages[name].append(problem.losses(theta, queries) - base)
    columns = {name: torch.stack(values, dim=1) for name, values in stages.items()}
    return FiveTerms(**columns, exact=exact / n, approximate=approximate / n)
