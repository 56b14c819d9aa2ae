"""Methods that follow the training run: TracIn and SOURCE over checkpoints, and dot products under the optimiser's
second moments. Composition only: the model takes the weights of each checkpoint in turn and its scores are added up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf.capture import PassSource, TracingSession
from pyinf.curvature import Factors, fit_factors
from pyinf.curvature.unroll import PreconditionedSquares, Segment, adam_roots, segment_queries
from pyinf.data.batching import PreparedExamples
from pyinf.data.checkpoints import TensorSource, checkpoint_weights, layer_matrices, load_named_tensors
from pyinf.errors import ConfigError
from pyinf.methods.gradient import GradientRun, ScoreRequest
from pyinf.methods.solved import SolvedRun, query_block
from pyinf.methods.subspace import content_of
from pyinf.plan import Plan
from pyinf.score import QueryBlock, TopKSink
from pyinf.score.weighted import WeightedNorms
from pyinf.solve import Layout

__all__ = ["TrajectoryRun", "follows_training"]


def follows_training(method: str, options: Mapping[str, Any]) -> bool:
    """Whether the method needs a :class:`TrajectoryRun`."""
    return method in ("tracin", "source") or options.get("second_moments") is not None


class _AllCheckpoints(PassSource):
    """Every pass goes over the data once under each of some checkpoints: sums come out as sums over all of them."""

    checkpoints: Sequence[TensorSource | None] = ()

    def run(self, *args: Any, **kwargs: Any) -> None:
        """As :meth:`PassSource.run`, once a checkpoint."""
        for checkpoint in self.checkpoints:
            if checkpoint is None:
                super().run(*args, **kwargs)
                continue
            with checkpoint_weights(self.session.model, checkpoint):
                super().run(*args, **kwargs)


@dataclass
class TrajectoryRun(SolvedRun):
    """A run whose scores are a sum over checkpoints. SOURCE's segments are fitted on the training set that is scored,
    once, and kept. Not resumable: a killed run starts again.
    """

    certifies = False
    _number: int = 0
    _segments: tuple[str, list[Segment]] | None = None

    @property
    def checkpoints(self) -> list[TensorSource | None]:
        """The checkpoints; ``[None]``, the model as it is, where none were given."""
        return self.options.get("checkpoints") or [None]

    def _per_checkpoint(self, name: str, default: Any) -> list[Any]:
        values, wanted = self.options.get(name), len(self.checkpoints)
        if values is None:
            return [default] * wanted
        if len(values) not in (1, wanted):
            raise ConfigError(f"{name} has {len(values)} entries for {wanted} checkpoints; give one, or one for each")
        return list(values) if len(values) == wanted else list(values) * wanted

    def _weights(self, number: int) -> Any:
        source = self.checkpoints[number]
        return contextlib.nullcontext() if source is None else checkpoint_weights(self.model, source)

    # -- scores --------------------------------------------------------------------------------------------------------

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
        """As :meth:`GradientRun.score`, summed over checkpoints."""
        self._check()
        self.release()
        self._train = train
        plain = ScoreRequest(request.granularity, request.per_module, None, request.dampings)
        plain.query_rank = request.query_rank
        total: Any = None
        facts: dict[str, Any] = {}
        try:
            if self.method.name == "source":
                self._fit_segments(train, plan)
            for place in range(len(self.checkpoints)):
                self._number = place
                with self._weights(place):
                    values, facts = GradientRun.score(self, queries, train, None, plain, plan, None, interval)
                total = values if total is None else _add(total, values)
        finally:
            self._train = None
        facts["checkpoints"] = len(self.checkpoints)
        if request.topk is None:
            return total, facts
        sink = TopKSink(total.shape[0], min(request.topk, total.shape[1]), total.dtype)
        sink.put(list(range(total.shape[0])), list(range(total.shape[1])), total)
        return (sink.values, sink.indices), facts

    def _check(self) -> None:
        count = len(self.checkpoints)
        for name in ("learning_rates", "second_moments", *(("steps",) if self.method.name == "source" else ())):
            self._per_checkpoint(name, None)
        if self.method.name != "source":
            return
        missing = [n for n in ("checkpoints", "learning_rates", "steps") if self.options.get(n) is None]
        if missing:
            raise ConfigError(
                f"method 'source' needs {missing[0]}; give checkpoints= in the order of training, learning_rates= and "
                "steps="
            )
        segments = self.options["segments"] or count
        if count % segments:
            raise ConfigError(f"{count} checkpoints do not make {segments} equal segments; change segments")

    def _query_block(
        self, queries: PreparedExamples, indices: list[int], factors: Factors | None, request: ScoreRequest, plan: Plan
    ) -> QueryBlock:
        layout = Layout.of(self.selection.layers)
        if self.method.name == "source":
            assert self._segments is not None
            with self._weights(len(self.checkpoints) - 1):
                vectors = layout.unpack(self.raw_gradients(queries, indices, plan))
            segments = self._segments[1]
            each = len(self.checkpoints) // len(segments)
            vectors = segment_queries(vectors, segments, self._number // each)
            vectors = {name: v.div_(each) for name, v in vectors.items()}
        else:
            vectors = layout.unpack(self.raw_gradients(queries, indices, plan).mul_(self._rate()))
            inverse = self._inverse_scale()
            if inverse is not None:
                vectors = {name: v * inverse[name] for name, v in vectors.items()}
        return query_block(layout.pack(vectors), layout, self.selection.layers, request.query_rank)

    def _rate(self) -> float:
        return self._per_checkpoint("learning_rates", 1.0)[self._number]

    def _inverse_scale(self) -> dict[str, Tensor] | None:
        """``(√v + ε)^{−1}``, squared with ``normalise="both"``."""
        source = self._per_checkpoint("second_moments", None)[self._number]
        if source is None:
            return None
        power = 4 if self.options.get("normalise", "update") == "both" else 2
        roots = adam_roots(self._moments(source), self.options["epsilon"])
        return {name: root.pow(power) for name, root in roots.items()}

    def _moments(self, source: TensorSource) -> dict[str, Tensor]:
        return layer_matrices(self.model, self.selection.layers, load_named_tensors(source, "second moments"))

    # -- segments ------------------------------------------------------------------------------------------------------

    def _fit_segments(self, train: PreparedExamples, plan: Plan) -> None:
        content = content_of(train)
        if self._segments is not None and self._segments[0] == content:
            return
        count = len(self.checkpoints)
        each = count // (self.options["segments"] or count)
        rates, steps = self._per_checkpoint("learning_rates", None), self._per_checkpoint("steps", None)
        scale = 1 / (1 - self.options["momentum"])
        if self.options["loss_unit"] == "token":
            scale *= len(train) / max(1, sum(train.label_counts))
        segments = []
        for first in range(0, count, each):
            members = range(first, first + each)
            x = scale * sum(rates[i] * steps[i] for i in members)
            segments.append(self._fit_segment(train, plan, list(members), x))
        self._segments = content, segments

    def _fit_segment(self, train: PreparedExamples, plan: Plan, members: list[int], x: float) -> Segment:
        moments = self._per_checkpoint("second_moments", None)
        adam = moments[0] is not None
        with TracingSession(self.model, self.selection, self.task, self.groups) as session:
            source = _AllCheckpoints(session, train, self.batches(train, plan, False))
            source.checkpoints = [self.checkpoints[i] for i in members]
            kind = "kfac" if adam else self.options["curvature"]
            sequences = len(train) * len(members)
            factors = fit_factors(source, kind, self.fit_loss, sequences, self.eigensolver, timings=self.timings)
            if not adam:
                return Segment(factors, x)
            total: dict[str, Tensor] = {}
            for i in members:
                own = self._moments(moments[i])
                total = {name: v if name not in total else total[name].add_(v) for name, v in own.items()}
            roots = adam_roots({name: v / len(members) for name, v in total.items()}, self.options["epsilon"])
            squares = PreconditionedSquares(factors, roots)
            source.run(lambda *_: squares, self.fit_loss, "corrected eigenvalues (preconditioned)")
        for name, layer in factors.layers.items():
            layer.corrected = squares.Lam[name] / sequences
        return Segment(factors, x, roots)

    # -- self-influence ------------------------------------------------------------------------------------------------

    def self_score(
        self, train: PreparedExamples, factors: Factors | None, dampings: dict[str, float], plan: Plan
    ) -> Tensor:
        """TracIn's ``Σ_c η_c ⟨G_i/(√v + ε), G_i⟩`` of every training example, ``[N]``.

        Raises:
            ConfigError: SOURCE, whose form is not symmetric in query and example.
        """
        if self.method.name == "source":
            raise ConfigError("SOURCE has no self-influence of its own; score(train, train) has it on the diagonal")
        self._check()
        out = torch.zeros(len(train), dtype=torch.float64)
        batches = self.batches(train, plan, scored_only=True)
        for place in range(len(self.checkpoints)):
            self._number = place
            consumer = WeightedNorms(self._inverse_scale())
            rate = self._rate()

            def done(batch: int, consumer: Any = consumer, rate: float = rate) -> None:
                if consumer.scores is not None:
                    out[batches[batch - 1]] += rate * consumer.scores.cpu()

            session = TracingSession(self.model, self.selection, self.task, self.groups)
            with self._weights(place), session:
                source = PassSource(session, train, batches)
                source.run(lambda *_, c=consumer: c.start_batch(), "train", "self-influence", done=done)
        return out.to(self._score_dtype())


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {name: value + right[name] for name, value in left.items()}
    return left + right
