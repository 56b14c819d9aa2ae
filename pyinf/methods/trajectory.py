"""Methods that follow the training run: TracIn and SOURCE over checkpoints, and dot products under the optimiser's
second moments. Composition only: the model takes the weights of each checkpoint in turn and its scores are added up.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf import artifacts
from pyinf.capture import Consumer, PassSource, TracingSession
from pyinf.checkpoint import Checkpoint
from pyinf.curvature import Factors, fit_factors
from pyinf.curvature.unroll import PreconditionedSquares, Segment, adam_roots, segment_queries
from pyinf.data.batching import PreparedExamples
from pyinf.data.checkpoints import (
    TensorSource,
    checkpoint_weights,
    layer_matrices,
    load_named_tensors,
    source_identity,
)
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

    def run(
        self,
        consumer_of: Callable[[int, list[int]], Consumer],
        loss: str,
        stage: str,
        start: int = 0,
        done: Callable[[int], None] | None = None,
        keep: bool = False,
    ) -> None:
        """As :meth:`PassSource.run`, once a checkpoint; batches are numbered through all of them."""
        count = len(self.batches)
        for place, checkpoint in enumerate(self.checkpoints):
            before = place * count
            if start >= before + count:
                continue
            finished = None if done is None else (lambda batch, before=before: done(before + batch))
            with contextlib.nullcontext() if checkpoint is None else checkpoint_weights(self.session.model, checkpoint):
                super().run(consumer_of, loss, stage, max(0, start - before), finished, keep)


@dataclass
class TrajectoryRun(SolvedRun):
    """A run whose scores are a sum over checkpoints. SOURCE's segments are fitted on the training set that is scored,
    once, and kept.

    With a state directory a killed run goes on: ``total/`` holds the sum over the checkpoints that are done,
    ``checkpoint-NNN/`` the scores under the one in work, ``segment-NNN/`` each fitted segment or its unfinished fit.
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
        plain.query_rank, plain.query_basis = request.query_rank, request.query_basis
        finished, total, facts = 0, None, {}
        kept = None if state is None else Checkpoint(state / "total", interval)
        found = None if kept is None else kept.load()
        if found is not None:
            finished, facts = int(found[0]["checkpoints"]), dict(found[0]["facts"])
            total = found[1]["total"] if request.per_module else found[1]["total"]["scores"]
        try:
            if self.method.name == "source" and finished < len(self.checkpoints):
                self._fit_segments(train, plan, state, interval)
            for place in range(finished, len(self.checkpoints)):
                self._number = place
                home = None if state is None else state / f"checkpoint-{place:03d}"
                with self._weights(place):
                    values, facts = GradientRun.score(self, queries, train, None, plain, plan, home, interval)
                total = values if total is None else _add(total, values)
                if kept is not None and home is not None:
                    tensors = total if request.per_module else {"scores": total}
                    kept.save({"checkpoints": place + 1, "facts": facts}, total=tensors)
                    shutil.rmtree(home, ignore_errors=True)
        finally:
            self._train = None
        if kept is not None and state is not None:  # the sum goes last: a run killed here has lost nothing
            for left in [*state.glob("segment-*"), *state.glob("checkpoint-*")]:
                shutil.rmtree(left)
            kept.clear()
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
        return query_block(layout.pack(vectors), layout, self.selection.layers, request)

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

    def _fit_segments(self, train: PreparedExamples, plan: Plan, state: Path | None, interval: float) -> None:
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
        for number, first in enumerate(range(0, count, each)):
            members = list(range(first, first + each))
            x = scale * sum(rates[i] * steps[i] for i in members)
            home = None if state is None else state / f"segment-{number:03d}"
            factors, roots = self._fit_segment(train, plan, members, home, interval)
            segments.append(Segment(factors, x, roots))
        self._segments = content, segments

    def _fit_segment(
        self, train: PreparedExamples, plan: Plan, members: list[int], home: Path | None, interval: float
    ) -> tuple[Factors, dict[str, Tensor] | None]:
        roots = self._mean_roots(members)
        ready = None if home is None else self._read_factors(home / "factors")
        if ready is not None:
            return ready, roots
        with TracingSession(self.model, self.selection, self.task, self.groups) as session:
            source = _AllCheckpoints(session, train, self.batches(train, plan, False))
            source.checkpoints = [self.checkpoints[i] for i in members]
            sequences = len(train) * len(members)
            if roots is None:
                factors = self._fit_bases(source, self.options["curvature"], sequences, home, "factors", interval)
                return factors, None
            factors = self._fit_bases(source, "kfac", sequences, home, "bases", interval)
            squares = PreconditionedSquares(factors, roots)
            kept = None if home is None else Checkpoint(home / "squares", interval)
            found, start = None if kept is None else kept.load(), 0
            if found is not None:
                start = int(found[0]["batch"])
                squares.Lam = {name: Lam.to(session.device) for name, Lam in found[1]["squares"].items()}

            def done(batch: int) -> None:
                if kept is not None and kept.due():
                    kept.save({"batch": batch}, squares=squares.Lam)

            source.run(lambda *_: squares, self.fit_loss, "corrected eigenvalues (preconditioned)", start, done)
        for name, layer in factors.layers.items():
            layer.corrected = squares.Lam[name] / sequences
        if home is not None:
            factors.save(home / "factors")
            for left in ("bases", "squares"):
                shutil.rmtree(home / left)
        return factors, roots

    def _fit_bases(
        self, source: PassSource, kind: str, sequences: int, home: Path | None, name: str, interval: float
    ) -> Factors:
        """Factors over the checkpoints of ``source``; with ``home`` kept in ``home/name``, and read from there."""
        ready = None if home is None else self._read_factors(home / name)
        if ready is not None:
            return ready
        kept = None if home is None else Checkpoint(home / "state", interval)
        factors = fit_factors(source, kind, self.fit_loss, sequences, self.eigensolver, kept, timings=self.timings)
        if kept is not None and home is not None:
            artifacts.check_free_disk(home, factors.nbytes, "the factors")
            factors.save(home / name)
            kept.clear()
        return factors

    def _read_factors(self, directory: Path) -> Factors | None:
        if not (directory / artifacts.MANIFEST_NAME).exists():
            return None
        factors = Factors.load(directory, next(self.model.parameters()).device)
        # clone: a memory map is not aligned as an allocation is, and alignment may change the last bit
        for factor in [*factors.inputs.values(), *factors.layers.values()]:
            for field_name in ("basis", "eigenvalues", "corrected"):
                value = getattr(factor, field_name, None)
                if value is not None:
                    setattr(factor, field_name, value.clone())
        self.groups.of_layer = {name: layer.group for name, layer in factors.layers.items()}
        return factors

    def _mean_roots(self, members: list[int]) -> dict[str, Tensor] | None:
        """``P^½`` of the mean second moments of some checkpoints; None where the optimiser has none."""
        moments = self._per_checkpoint("second_moments", None)
        if moments[0] is None:
            return None
        total: dict[str, Tensor] = {}
        for i in members:
            own = self._moments(moments[i])
            total = {name: v if name not in total else total[name].add_(v) for name, v in own.items()}
        return adam_roots({name: v / len(members) for name, v in total.items()}, self.options["epsilon"])

    def identity_of(self, names: Sequence[str]) -> dict[str, Any]:
        """Checkpoints and second moments by what they hold: a path or a callable may give another tensor tomorrow."""
        sources = ("checkpoints", "second_moments")
        held = {name: source_identity(self.options[name]) for name in names if name in sources}
        return {**super().identity_of([name for name in names if name not in sources]), **held}

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
