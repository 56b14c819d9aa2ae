"""EK-FAC with a Newton step in the span of sampled gradients: composition of ``pyinf.curvature.subspace``."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyinf.capture import Consumer, PassSource, TracingSession
from pyinf.curvature import Factors
from pyinf.curvature.gradients import GradientSet
from pyinf.curvature.subspace import SubspaceInverse, fit_subspace
from pyinf.data.batching import PreparedExamples, make_batches
from pyinf.errors import ConfigError
from pyinf.methods.gradient import ScoreRequest
from pyinf.methods.solved import SolvedRun, query_block
from pyinf.plan import Plan
from pyinf.score import QueryBlock
from pyinf.solve import GGNOperator, Layout
from pyinf.tasks import Task

__all__ = ["SubspaceRun", "content_of", "draw_sets"]


def content_of(data: PreparedExamples) -> str:
    """A digest of what a dataset holds, the same for every preparation of it."""
    digest = hashlib.blake2b(digest_size=16)
    for ids, labels, mask in zip(data.input_ids, data.labels, data.masks, strict=True):
        for part in (ids, labels, mask):
            digest.update(b"-" if part is None else part.numpy().tobytes() + b"|")
    return digest.hexdigest()


def draw_sets(
    eligible: list[int], wanted: int, moments: int | None, seed: int, redraw: bool
) -> tuple[list[int], list[int] | None]:
    """Indices of the sequences of the span and of the moments (None: the very gradients of the span).

    The moments must not be gradients that the span was made from. Where labels can be drawn again (``redraw``), a
    sequence may serve both; else the two sets have no sequence in common.

    Raises:
        ConfigError: no gradient is left for the moments.
    """
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed)).tolist()
    span = sorted(eligible[i] for i in order[:wanted])
    if moments == 0:
        return span, None
    rest = order[wanted:] + order[:wanted] if redraw else order[wanted:]
    rest = rest if moments is None else rest[:moments]
    if not rest:
        raise ConfigError(
            f"subspace_gradients is {wanted} of {len(eligible)} training examples, which leaves none for the moments; "
            "lower it, or set subspace_moments=0 to take the same gradients for both"
        )
    return span, sorted(eligible[i] for i in rest)


@dataclass
class SubspaceRun(SolvedRun):
    """A run whose query gradients go through EK-FAC and a Newton step in the span of sampled training gradients.

    The gradients are those of the training set that was fitted on (of the one that is scored, where factors were
    loaded), with the fit's labels (sampled or the data's); the step is fitted once a damping and kept.
    """

    _fitted: dict[Any, SubspaceInverse] = field(default_factory=dict)
    _fitted_under: Factors | None = None

    def inverse(
        self, train: PreparedExamples, factors: Factors, dampings: dict[str, float], plan: Plan
    ) -> SubspaceInverse:
        """The inverse at some damping, fitted when first asked for."""
        if self._fitted_under is not factors:
            self._fitted, self._fitted_under = {}, factors
        content = content_of(train)
        key = (content, tuple(dampings.values()))
        if key in self._fitted:
            return self._fitted[key]
        started = time.perf_counter()
        counted, options = train.counted, self.options
        live = [i for i in train.scored if counted[i] > 0]
        redraw = self.fit_loss == "sampled"
        span, others = draw_sets(live, options["subspace_gradients"], options["subspace_moments"], self.seed, redraw)
        free = max(0, plan.memory_budget - sum(plan.memory.values())) // 2
        gradients = self._gradients(train, span, factors, plan, free)
        moments = None
        if others is not None:
            task = copy.copy(self.task)
            task.seed = self.seed + 1 if redraw else self.seed
            moments = self._gradients(train, others, factors, plan, free, task=task)
        with self._product(train, plan) as product:
            found = fit_subspace(
                factors,
                dampings,
                gradients,
                moments,
                options["subspace_rank"],
                options["subspace_shrinkage"],
                options["subspace_complement"],
                product,
            )
        self._fitted = {k: v for k, v in self._fitted.items() if k[0] == content} | {key: found}
        self._add_time("subspace", started)
        return found

    @contextlib.contextmanager
    def _product(self, train: PreparedExamples, plan: Plan) -> Iterator[Any]:
        """Products with the exact Gauss–Newton matrix, where they are wanted."""
        if self.options["subspace_curvature"] == "gradients":
            yield None
            return
        layout = Layout.of(self.selection.layers)
        batches = self.batches(train, plan, scored_only=False)
        with GGNOperator(self.model, self.selection, self.task, train, batches, len(train)) as curvature:
            yield lambda vectors: layout.unpack(curvature(layout.pack(vectors)))

    def _gradients(
        self,
        train: PreparedExamples,
        indices: list[int],
        factors: Factors,
        plan: Plan,
        budget: int,
        loss: str | None = None,
        task: Task | None = None,
    ) -> GradientSet:
        batches = make_batches(train.lengths, indices, plan.batch_size, plan.token_budget)

        def run(consumer_of: Callable[[], Consumer]) -> None:
            with TracingSession(self.model, self.selection, task or self.task, self.groups) as session:
                PassSource(session, train, batches).run(
                    lambda *_: consumer_of(), loss or self.fit_loss, "subspace gradients"
                )

        counted = train.counted
        return GradientSet(run, factors, sum(counted[i] for i in indices), budget, batches)

    def _query_block(
        self, queries: PreparedExamples, indices: list[int], factors: Factors | None, request: ScoreRequest, plan: Plan
    ) -> QueryBlock:
        assert factors is not None and self._train is not None
        if self.refine is not None:
            return super()._query_block(queries, indices, factors, request, plan)
        layout = Layout.of(self.selection.layers)
        vectors = layout.unpack(self.raw_gradients(queries, indices, plan))
        parts = []
        for damping in request.dampings:
            inverse = self.inverse(self._train, factors, factors.dampings(damping, request.damping_mode), plan)
            parts.append(layout.pack(inverse.ihvp(vectors)))
        block = query_block(torch.cat(parts), layout, self.selection.layers, request)
        return self.certified(block, queries, indices, factors, request, plan)

    def self_score(
        self, train: PreparedExamples, factors: Factors | None, dampings: dict[str, float], plan: Plan
    ) -> Tensor:
        """Self-influence ``⟨H⁻¹G_i, G_i⟩`` of every training example, ``[N]``."""
        assert factors is not None
        fitted_on = getattr(self, "fit_data", None)
        inverse = self.inverse(train if fitted_on is None else fitted_on, factors, dampings, plan)
        out = torch.zeros(len(train), dtype=torch.float64)
        free = max(0, plan.memory_budget - sum(plan.memory.values()))
        for part in self.batches(train, plan, scored_only=True):
            gradients = self._gradients(train, part, factors, plan, free // 2, "train")
            out[[i for batch in gradients.batches for i in batch]] = inverse.self_scores(gradients).cpu()
        return out.to(self._score_dtype())
