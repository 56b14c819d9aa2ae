"""Gradient methods whose scores carry certificates: how well each query's system ``(C + λ)x = v`` was solved, measured
with the exact curvature, by block of queries and damping.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf import artifacts, progress
from pyinf.capture import PassSource, TracingSession
from pyinf.curvature import Factors
from pyinf.data.batching import PreparedExamples, make_batches
from pyinf.errors import ConfigError, ModelError
from pyinf.methods.gradient import GradientRun, ScoreRequest
from pyinf.plan import Plan
from pyinf.score import QueryBlock
from pyinf.solve import Convergence, GGNOperator, HeldBatch, Layout, Solution, entries, hold, measure
from pyinf.solve.ggn import check_ggn

__all__ = ["CertifiedRun"]

_SHARE = 0.1
_HELD_SEQUENCES, _HELD_TOKENS = 32, 2048


@dataclass
class CertifiedRun(GradientRun):
    """A :class:`GradientRun` whose scores carry certificates."""

    options: dict[str, Any] = field(default_factory=dict)
    fit_data: PreparedExamples | None = None  # what the factors were fitted on; None: curvature of the scored data
    certifies = True  # class attribute: whether one system (C + λ)x = v stands behind the scores
    _train: PreparedExamples | None = None
    _state: Path | None = None
    _certificates: dict[int, list[list[dict[str, Any]]]] = field(default_factory=dict)
    _held: tuple[Any, HeldBatch, Convergence] | None = None

    def identity_of(self, names: Sequence[str]) -> dict[str, Any]:
        """What an unfinished scoring run must find unchanged of these options, as JSON."""
        return {name: repr(self.options[name]) for name in names}

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
        """As :meth:`GradientRun.score`; ``facts["certificate"]`` has one entry a damping and query, or is None."""
        self._train = self.fit_data if self.fit_data is not None else train
        self._state, self._certificates, self._held = state, {}, None
        try:
            result, facts = super().score(queries, train, factors, request, plan, state, interval)
            facts["certificate"] = self._collected(len(queries), len(request.dampings))
            return result, facts
        finally:
            self._train = self._state = self._held = None
            self._certificates = {}

    # -- query blocks --------------------------------------------------------------------------------------------------

    def _query_block(
        self, queries: PreparedExamples, indices: list[int], factors: Factors | None, request: ScoreRequest, plan: Plan
    ) -> QueryBlock:
        block = super()._query_block(queries, indices, factors, request, plan)
        return self.certified(block, queries, indices, factors, request, plan)

    def certified(
        self,
        block: QueryBlock,
        queries: PreparedExamples,
        indices: list[int],
        factors: Factors | None,
        request: ScoreRequest,
        plan: Plan,
    ) -> QueryBlock:
        """The block, after its certificates were measured (where they are wanted) and remembered."""
        if self._train is not None:
            self._keep(indices, self._certify_direct(block, queries, indices, factors, request, plan))
        return block

    def raw_gradients(self, data: PreparedExamples, indices: list[int], plan: Plan) -> Tensor:
        """``[Q, D]``: the measurement's gradient of some examples; zero rows for those that measure nothing."""
        plain = dataclasses.replace(plan, score_rotated=False)
        block = super()._query_block(data, indices, None, ScoreRequest(), plain)
        return self._flat(block, len(indices))

    def _flat(self, block: QueryBlock, count: int) -> Tensor:
        """``[count, D]`` from a block in the layers' own coordinates."""
        dtype, device = self._score_dtype(), next(self.model.parameters()).device
        vectors = {}
        for layer in self.selection.layers:
            dense = block.dense.get(layer.name)
            if dense is None:
                dense = torch.zeros(count, layer.d_out, layer.d_in, dtype=dtype, device=device)
            if layer.bias:
                column = block.bias.get(layer.name)
                column = dense.new_zeros(*dense.shape[:2]) if column is None else column
                dense = torch.cat([dense, column.unsqueeze(2)], dim=2)
            vectors[layer.name] = dense
        return Layout.of(self.selection.layers).pack(vectors)

    def system_batches(self, train: PreparedExamples, plan: Plan) -> tuple[list[list[int]], int]:
        """Batches of training data that make the curvature, and how many sequences its mean is over."""
        batches = self.batches(train, plan, scored_only=False)
        wanted = self.options.get("fit_batches")
        if wanted is None or wanted >= len(batches):
            return batches, len(train)
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(self.seed)).tolist()
        chosen = [batches[i] for i in sorted(order[:wanted])]
        return chosen, sum(len(b) for b in chosen)

    # -- certificates --------------------------------------------------------------------------------------------------

    def _wants(self, plan: Plan, held: HeldBatch, queries: int) -> tuple[bool, str]:
        """Whether a certificate of direct scores is measured, and why not."""
        certify = self.options.get("certify", "auto")
        if certify is True:
            return True, ""
        cost = held.tokens * _cost(plan, queries)
        share = cost / max(1.0, sum(plan.flops.values()))
        if share <= _SHARE:
            return True, ""
        return False, (
            f"measuring it would take {100 * share:.0f} % of the run's operations, more than {100 * _SHARE:.0f} %; "
            "certify=True does it all the same"
        )

    def _hold(self, plan: Plan, queries: int) -> HeldBatch:
        assert self._train is not None
        tokens = _HELD_TOKENS
        if self.options.get("certify", "auto") == "auto" and plan.flops:
            tokens = max(1, min(tokens, int(_SHARE * sum(plan.flops.values()) / _cost(plan, queries))))
        return hold(self._train, _HELD_SEQUENCES, tokens, self.seed)

    def _convergence(self, held: HeldBatch) -> Convergence:
        """Gradient norms of the training loss on a held batch."""
        assert self._train is not None
        if self._held is not None and self._held[0] is self._train and self._held[1] == held:
            return self._held[2]
        consumer = Convergence()
        consumer.sequences = held.total if held.whole else held.sequences
        labelled = set(self._train.scored)
        wanted = [i for group in held.groups for i in group if i in labelled]
        if wanted:
            with TracingSession(self.model, self.selection, self.task, self.groups) as session:
                batches = make_batches(self._train.lengths, wanted, None, max(2048, max(self._train.lengths)))
                PassSource(session, self._train, batches).run(lambda *_: consumer, "train", "gradient of the loss")
        self._held = (self._train, held, consumer)
        return consumer

    def _certify_direct(
        self,
        block: QueryBlock,
        queries: PreparedExamples,
        indices: list[int],
        factors: Factors | None,
        request: ScoreRequest,
        plan: Plan,
    ) -> list[list[dict[str, Any]]] | None:
        if self.options.get("certify", "auto") is False or not self.certifies:
            return None
        count = len(indices)
        try:
            check_ggn(self.model, self.task)
            held = self._hold(plan, len(queries))
            wanted, why = self._wants(plan, held, len(queries))
            if not wanted:
                return [_unmeasured(why, count) for _ in request.dampings]
            started = time.perf_counter()
            with progress.stage("certificate", count, "queries") as running:
                found = self._measure_direct(block, queries, indices, factors, request, plan, held)
                running.advance(count)
            self._add_time("certificate", started)
            return found
        except (ConfigError, ModelError) as error:
            if self.options.get("certify", "auto") is True:
                raise
            return [_unmeasured(str(error), count) for _ in request.dampings]

    def _measure_direct(
        self,
        block: QueryBlock,
        queries: PreparedExamples,
        indices: list[int],
        factors: Factors | None,
        request: ScoreRequest,
        plan: Plan,
        held: HeldBatch,
    ) -> list[list[dict[str, Any]]]:
        assert self._train is not None
        layout, count = Layout.of(self.selection.layers), len(indices)
        convergence = self._convergence(held)
        energy = block.captured_energy()
        out: list[list[dict[str, Any]]] = [[] for _ in request.dampings]
        # A few queries at a time: raw gradients, solutions and products are four full-size rows each.
        step = max(1, min(count, (plan.query_block or count) // 4 or 1))
        with GGNOperator(self.model, self.selection, self.task, self._train, held.groups) as C:
            for first in range(0, count, step):
                rows = range(first, min(first + step, count))
                V = self._raw(queries, [indices[r] for r in rows], plan)
                for number, damping in enumerate(request.dampings):
                    if factors is not None:
                        lam = factors.dampings(damping, request.damping_mode)
                    else:
                        shapes = dict(zip(layout.names, layout.shapes, strict=True))
                        lam = convergence.dampings(damping, request.damping_mode, shapes)
                        if not all(value > 0 for value in lam.values()):
                            odd = next(name for name, value in lam.items() if not value > 0)
                            raise ModelError(f"the gradients of layer '{odd}' vanish, so that its damping would be 0")
                    spread = layout.spread(lam, V)
                    at = [number * count + r for r in rows] if len(request.dampings) > 1 else list(rows)
                    X = layout.pack(_dense_rows(block, at, self.selection.layers))
                    facts = self._facts(damping, request, convergence, factors)
                    part = entries(measure(C, held, X, V, spread), str(held), self._tol, facts, range(len(rows)))
                    for place, entry in zip(at, part, strict=True):
                        if energy is not None:
                            entry["captured_energy"] = round(float(energy[place]), 6)
                    out[number] += part
        return out

    def _raw(self, queries: PreparedExamples, indices: list[int], plan: Plan) -> Tensor:
        with _silent_timings(self):
            return self.raw_gradients(queries, indices, plan)

    @property
    def _tol(self) -> float:
        return float(self.options.get("tol", 1e-2))

    def _facts(
        self, damping: float, request: ScoreRequest, convergence: Convergence | None, factors: Factors | None
    ) -> dict[str, Any]:
        facts: dict[str, Any] = {"damping": damping, "damping_mode": request.damping_mode}
        if factors is None:
            facts["note"] = "the method has no curvature: the residual is that of the plain gradient as a solution"
        if convergence is not None:
            facts["gradient_norm"] = float(f"{convergence.norm:.6g}")
            facts["example_gradient_norm"] = float(f"{convergence.example_norm:.6g}")
        return facts

    def _certify_solution(
        self,
        solution: Solution,
        V: Tensor,
        factors: Factors,
        damping: float,
        request: ScoreRequest,
        plan: Plan,
        block: QueryBlock,
        number: int,
    ) -> list[dict[str, Any]] | None:
        assert self._train is not None
        certify = self.options.get("certify", "auto")
        count, layout = V.shape[0], Layout.of(self.selection.layers)
        held = hold(self._train, _HELD_SEQUENCES, _HELD_TOKENS, self.seed)
        facts: dict[str, Any] = self._facts(
            damping, request, None if certify is False else self._convergence(held), factors
        )
        own = solution.residuals is not None and self.options.get("curvature", "ggn") == "ggn"
        if not own and certify is not False:
            try:
                check_ggn(self.model, self.task)
            except ConfigError:
                own = solution.residuals is not None  # no Gauss-Newton matrix to be held to: its own system, then
        if own and solution.residuals is not None:
            batches, sequences = self.system_batches(self._train, plan)
            counted = self._train.counted
            tokens = sum(counted[i] for b in batches for i in b)
            share = "all" if sequences == len(self._train) else f"{sequences} of"
            where = f"{share} {len(self._train)} training sequences ({tokens:,} tokens), which the system is made of"
            if self.options.get("curvature", "ggn") == "fisher":
                where += (
                    f", with the Fisher matrix of {'sampled' if self.fit_loss == 'sampled' else 'their own'} labels"
                )
            found = entries(solution, where, self._tol, facts, range(count))
        elif certify is False:
            return None
        else:
            spread = layout.spread(factors.dampings(damping, request.damping_mode), V)
            try:
                with GGNOperator(self.model, self.selection, self.task, self._train, held.groups) as C:
                    measured = measure(C, held, solution.X, V, spread)
                found = entries(measured, str(held), self._tol, facts, range(count))
            except (ConfigError, ModelError) as error:
                found = _unmeasured(str(error), count)
            if solution.residuals is not None:
                for row, entry in enumerate(found):
                    entry["residual_of_its_own_system"] = float(f"{solution.residuals[row]:.6g}")
        energy = block.captured_energy()
        for row, entry in enumerate(found):
            entry["iterations"] = solution.iterations[row]
            if "captured_energy" in solution.facts:
                entry["captured_energy"] = round(float(solution.facts["captured_energy"][row]), 6)
            if energy is not None:
                entry["captured_energy"] = round(float(energy[number * count + row]), 6)
                entry["reason"] += "; of the solution before it was cut to low rank"
            for key in ("scale", "batch", "depth", "step", "steps"):
                if key in solution.facts:
                    entry[key] = solution.facts[key]
        return found

    def _keep(self, indices: list[int], found: list[Any] | None) -> None:
        """Remember a block's certificates; on disk as well where the run may be resumed."""
        if found is None or any(part is None for part in found):
            return
        self._certificates[indices[0]] = found
        if self._state is not None:
            artifacts.atomic_write_json(self._state / f"certificate-{indices[0]:06d}.json", {"dampings": found})

    def _collected(self, queries: int, dampings: int) -> list[dict[str, Any]] | None:
        """All certificates, damping by damping; those of blocks that an earlier start finished come from disk."""
        paths = sorted(self._state.glob("certificate-*.json")) if self._state is not None else []
        for path in paths:
            first = int(path.stem.rpartition("-")[2])
            if first not in self._certificates:
                self._certificates[first] = artifacts.read_json(path, "certificates")["dampings"]
            path.unlink()
        if not self._certificates:
            return None
        blocks = [self._certificates[first] for first in sorted(self._certificates)]
        out = [entry for d in range(dampings) for block in blocks for entry in block[d]]
        return out if len(out) == queries * dampings else None


def _cost(plan: Plan, queries: int) -> float:
    """FLOPs of a certificate a token: two forwards, and a tangent forward and a backward a query."""
    return max(1.0, 8.0 * queries * plan.traced_parameters + 4.0 * plan.total_parameters)


@contextmanager
def _silent_timings(run: GradientRun) -> Iterator[None]:
    """What is timed inside belongs to another stage."""
    kept = dict(run.timings)
    try:
        yield
    finally:
        run.timings.clear()
        run.timings.update(kept)


def _unmeasured(why: str, count: int) -> list[dict[str, Any]]:
    return [{"verdict": "not measured", "reason": why} for _ in range(count)]


def _dense_rows(block: QueryBlock, rows: list[int], layers: list[Any]) -> dict[str, Tensor]:
    """``{layer: [q, d_out, d_in(+1)]}`` of some rows of a block, whatever form it is kept in."""
    like = next(iter([*block.dense.values(), *block.left.values(), *block.core.values()]))
    out = {}
    for layer in layers:
        name = layer.name
        if name in block.dense:
            value = block.dense[name][rows]
            if block.factors is not None:
                factor = block.factors.layers[name]
                U_A = block.factors.inputs[factor.group].basis
                value = value if factor.basis is None else factor.basis @ value
                value = value if U_A is None else value @ U_A.T
            elif layer.bias:
                value = torch.cat([value, block.bias[name][rows].unsqueeze(2)], dim=2)
        elif name in block.left:
            value = block.left[name][rows] @ block.right[name][rows]
        elif name in block.core:
            value = block.basis_out[name] @ block.core[name][rows] @ block.basis_in[name].T
        else:
            value = like.new_zeros(len(rows), layer.d_out, layer.columns)
        out[name] = value
    return out
