"""The one call: which training data made the model say this?"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyinf import artifacts, ops, progress
from pyinf import methods as _methods
from pyinf._version import __version__
from pyinf.capture import Modules, select_layers
from pyinf.curvature import EIGENSOLVERS, MOMENT_CURVATURES, Factors, check_block, check_damping, planned_kind
from pyinf.data.batching import PreparedExamples, make_batches, prepare
from pyinf.data.models import placed
from pyinf.errors import ArtifactError, ConfigError, ModelError
from pyinf.methods.bm25 import bm25_scores
from pyinf.methods.gradient import ScoreRequest, check_request
from pyinf.methods.identity import data_fingerprint, fit_identity, score_home
from pyinf.methods.options import settle
from pyinf.methods.runs import run_of, with_factors
from pyinf.plan import Plan, default_token_budget, make_plan, parse_bytes
from pyinf.score import Scores, check_basis, parse_rank
from pyinf.tasks import CausalLM, Task

__all__ = ["Attributor", "attribute"]

_OPTIONS = {
    "query_rank": None,
    "query_basis": None,
    "eigensolver": "auto",
    "factor_block": None,
    "memory_budget": None,
    "cache": "auto",
    "token_budget": None,
    "checkpoint_seconds": 60.0,
    "certify": "auto",
}


_SOLVER_ROWS = 8  # dense rows a query that a solver holds at once


_F = TypeVar("_F", bound=Callable[..., Any])


def _at_home(method: _F) -> _F:
    """Run a method with the model on the attributor's device and dtype, and put it back afterwards."""

    @functools.wraps(method)
    def run(self: Attributor, *args: Any, **kwargs: Any) -> Any:
        with self._placed():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class Attributor:
    """Traces what a model says to its training data.

    Args:
        model: any ``nn.Module`` that the task can run; nothing of it is changed after a call.
        method: a key of ``pyinf.methods()``.
        task: the training loss and the measurement; :class:`pyinf.CausalLM` by default.
        modules: which layers (None: every supported layer in the blocks; a glob, a list, or a predicate on (name,
            module)).
        damping: ``λ = damping · mean(Λ)`` per layer, or λ itself with ``damping_mode="absolute"``.
        fisher: ``"sampled"`` (labels drawn from the model, the true Fisher) or ``"empirical"`` (the data's labels).
        device, dtype: move the model there for the time of each call; None: as it is.
        backend: which implementation of the ops; None: as set by :func:`pyinf.set_backend`.
        run_dir: keep unfinished and finished work there; the same call again goes on where it stopped.
        **method_options: ``query_rank`` (None: dense; a rank; a captured energy such as 0.99), ``query_basis``
            (None: each query by itself; "shared": all in one two-sided basis of that rank), ``eigensolver``,
            ``factor_block`` (the widest factor decomposed in one piece), ``memory_budget`` (bytes or "2GiB"), ``cache``
            (auto, memory, disk, none), ``token_budget``,
            ``checkpoint_seconds``, ``certify`` (True, False, or "auto": where it costs no more than a tenth of the
            run's operations; solvers measure themselves); and the method's own, ``pyinf.methods.get(name).options``.

    Raises:
        ConfigError: unknown method or option, or damping ≤ 0.
        ModuleSelectionError: no layer matched.

    Source: Grosse et al. 2023, arXiv 2308.03296.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "ekfac",
        task: Task | None = None,
        modules: Modules = None,
        damping: float = 0.1,
        damping_mode: str = "relative",
        fisher: str = "sampled",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        seed: int = 0,
        run_dir: str | os.PathLike[str] | None = None,
        **method_options: Any,
    ) -> None:
        self.method = _methods.get(method)
        check_damping(damping, damping_mode)
        if fisher not in ("sampled", "empirical"):
            raise ConfigError(
                f"unknown fisher '{fisher}'; use 'sampled' (true Fisher) or 'empirical' (the data's labels)"
            )
        self.options = settle(method, self.method.options, _OPTIONS, method_options)
        self.method = with_factors(self.method, self.options)
        if self.options["eigensolver"] not in EIGENSOLVERS:
            raise ConfigError(
                f"unknown eigensolver '{self.options['eigensolver']}'; choose one of {', '.join(EIGENSOLVERS)}"
            )
        if self.options["certify"] not in (True, False, "auto"):
            raise ConfigError(f"certify is {self.options['certify']!r}; it must be True, False or 'auto'")
        check_block(self.options["factor_block"])
        self.query_rank = parse_rank(self.options["query_rank"])
        check_basis(self.options["query_basis"], self.query_rank)
        if backend is not None:
            with ops.use_backend(backend):
                pass  # an unknown or unavailable backend is an error now, not after an hour
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise ModelError(f"a {kind} is no model; load it first, for instance with AutoModelForCausalLM")
        model = getattr(model, "_orig_mod", model)  # a compiled wrapper: hooks need the module itself
        self.model, self.damping, self.damping_mode, self.fisher = model, float(damping), damping_mode, fisher
        self.task = copy.copy(task) if task is not None else CausalLM()
        self.task.seed = seed  # of a copy: one task may serve two attributors
        self.device, self.dtype, self.backend, self.seed = device, dtype, backend, seed
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.factors: Factors | None = None
        self.modules = modules
        self._prepared: dict[int, tuple[Any, PreparedExamples]] = {}
        self._depth = 0
        self._plan: Plan | None = None
        self._keep_captured = False
        if self.method.kind == "gradient":
            if not any(True for _ in model.parameters()):
                raise ModelError(
                    "the model has no parameters; give a transformers model or an nn.Module with nn.Linear layers"
                )
            with self._placed():
                pass  # an impossible device is an error now
            self.selection = select_layers(model, modules)
            self._run = run_of(self.method, self.options)(
                model, self.selection, self.task, self.method, fisher, self.options["eigensolver"], seed,
                options=self.options,
            )  # fmt: skip
            self._run.damping = (self.damping, damping_mode)
            self._run.factor_block = self.options["factor_block"]

    # -- plan ----------------------------------------------------------------------------------------------------------

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by stage so far."""
        return self._run.timings if self.method.kind == "gradient" else {}

    @_at_home
    def plan(self, train: Any, queries: Any = None, batch_size: int | None = None, dampings: int = 1) -> Plan:
        """What a run over these data will do, and about how long it takes; checks the data against the model.

        Raises:
            DataError: something is wrong with the data; names the example.
            ResourceError: it does not fit.
        """
        if self.method.kind != "gradient":
            raise ConfigError(f"method '{self.method.name}' runs no model, so there is nothing to plan")
        train_data = self._prepare(train, "train")
        query_data = self._prepare(queries, "queries") if queries is not None else None
        return self._make_plan(train_data, query_data, batch_size, dampings)

    def _make_plan(
        self, train: PreparedExamples, queries: PreparedExamples | None, batch_size: int | None, dampings: int = 1
    ) -> Plan:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        device = next(self.model.parameters()).device
        token_budget = self.options["token_budget"]
        if token_budget is not None and (not isinstance(token_budget, int) or token_budget < 1):
            raise ConfigError(f"token_budget is {token_budget}; it must be at least 1")
        if token_budget is None and batch_size is None:
            token_budget = default_token_budget(device)
        vocabulary = int(getattr(getattr(self.model, "config", None), "vocab_size", 0) or 0)
        plan = make_plan(
            self.selection,
            device=device,
            element_size=next(self.model.parameters()).element_size(),
            vocabulary=vocabulary,
            train_lengths=train.lengths,
            query_lengths=queries.lengths if queries is not None else [],
            batches=len(make_batches(train.lengths, None, batch_size, token_budget)),
            token_budget=token_budget,
            batch_size=batch_size,
            factors=planned_kind(self.method.factors),
            fisher=self.fisher,
            fitted=self.factors is not None,
            query_rank=self.query_rank,
            query_basis=self.options["query_basis"],
            dampings=dampings,
            solver_rows=_SOLVER_ROWS if self._run.solver is not None else 0,
            memory_budget=parse_bytes(self.options["memory_budget"]),
            cache=self.options["cache"],
            keep_for_scores=self._keep_captured,
            disk_free=artifacts.free_disk(self.run_dir or Path.cwd()),
            to_disk=self.run_dir is not None,
            own_inputs=self.method.factors in MOMENT_CURVATURES,
        )
        if self._run.solver is not None:
            plan.score_rotated = False  # what the solver returns is in the layers' own coordinates
        self._plan = plan
        return plan

    # -- fit -----------------------------------------------------------------------------------------------------------

    @_at_home
    def fit(self, train: Any, batch_size: int | None = None) -> Attributor:
        """Fit the method's factors on ``train``; resumable when ``run_dir`` is set. Methods without factors: no work.

        Returns:
            Itself; ``attributor.factors`` holds the result.

        Raises:
            DataError, ResourceError: before any work.
            NonFiniteError: names the layer and the example.
            ArtifactError: ``run_dir`` holds a fit of another model, dataset or setting.
        """
        if self.method.factors is None and self.method.compressor is None:
            return self
        data = self._prepare(train, "train")
        plan = self._make_plan(data, None, batch_size)
        if self.method.factors is not None:
            self._fit(data, plan)
        if self.method.compressor is not None:
            self._run.fit_data = data
            with self._backend():
                self._run.fit_rows(data, self.factors, plan)
        return self

    @_at_home
    def run(self, train: Any, queries: Any, batch_size: int | None = None, tol: float | None = None) -> Scores:
        """:meth:`fit` and :meth:`score` planned together, so that what the layers see may be captured once for both."""
        if tol is not None and self.method.kind == "gradient":
            with self._run.refined(tol):
                return self.run(train, queries, batch_size)
        if self.method.kind != "gradient":
            return self.score(queries, train, batch_size)
        self._keep_captured = self.fisher == "empirical"
        try:
            train_data, query_data = self._prepare(train, "train"), self._prepare(queries, "queries")
            plan = self._make_plan(train_data, query_data, batch_size)
            if self.method.factors is not None and self.factors is None:
                self._fit(train_data, plan)
            if self.method.compressor is not None and self._run.fit_data is None:
                self._run.fit_data = train_data  # what the rows' curvature comes from, also in later calls
            scores = self.score(queries, train, batch_size)
            scores.meta["plan"] = plan.to_dict()  # of the whole run, not of its second half
            return scores
        finally:
            self._keep_captured = False
            self._run.release()

    def _fit(self, data: PreparedExamples, plan: Plan) -> Attributor:
        home = self.run_dir / "fit" if self.run_dir is not None else None
        if home is not None:
            artifacts.claim_directory(home, fit_identity(self._run, data, plan))
            if (home / "factors" / artifacts.MANIFEST_NAME).exists():
                self.load_factors(home / "factors")
                progress.note(f"factors found in {home / 'factors'}; not fitted again")
                shutil.rmtree(home / "state", ignore_errors=True)
                self._run.fit_data = data
                return self
        self._run.fit_data = data
        with self._backend():
            factors = self._run.fit(
                data,
                plan,
                home / "state" if home is not None else None,
                self._keep_captured,
                float(self.options["checkpoint_seconds"]),
            )
        factors.meta = {
            "model": self._model_fingerprint(),
            "data": self._data_fingerprint(data),
            "fisher": self.fisher,
            "eigensolver": self.options["eigensolver"],
            "seed": self.seed,
            "task": self.task.fingerprint(),
        }
        self.factors = factors
        if home is not None:
            artifacts.check_free_disk(home, factors.nbytes, "the factors")
            if (home / "factors").exists():
                artifacts.remove_stale_temporaries(home / "factors")
            factors.save(home / "factors")
            shutil.rmtree(home / "state", ignore_errors=True)
        return self

    @_at_home
    def load_factors(self, directory: str | os.PathLike[str]) -> Attributor:
        """Use factors fitted earlier.

        Raises:
            ArtifactError: damaged, or fitted for another method, other layers or another model.
        """
        device = next(self.model.parameters()).device
        factors = Factors.load(directory, device)
        if factors.kind != self.method.factors:
            raise ArtifactError(
                f"{directory} holds {factors.kind} factors, method '{self.method.name}' needs {self.method.factors}"
            )
        expected = {layer.name: [layer.d_out, layer.columns] for layer in self.selection.layers}
        found = {name: list(layer.corrected.shape) for name, layer in factors.layers.items()}
        if expected != found:
            odd = next(name for name in [*expected, *found] if expected.get(name) != found.get(name))
            raise ArtifactError(
                f"{directory} was fitted on other layers: '{odd}' is {found.get(odd, 'absent')} there and "
                f"{expected.get(odd, 'not selected')} here; fit again or pass the same modules="
            )
        if factors.meta.get("model") not in (None, self._model_fingerprint()):
            raise ArtifactError(f"{directory} was fitted on another model (its weights differ); fit again for this one")
        self._run.fit_data = None
        self._run.groups.of_layer = {name: layer.group for name, layer in factors.layers.items()}
        self.factors = factors
        return self

    # -- scores --------------------------------------------------------------------------------------------------------

    @_at_home
    def score(
        self,
        queries: Any,
        train: Any,
        batch_size: int | None = None,
        granularity: str = "sequence",
        per_module: bool = False,
        topk: int | None = None,
        dampings: Sequence[float] | None = None,
        tol: float | None = None,
    ) -> Any:
        """Influence of every training example on every query.

        Args:
            granularity: ``"sequence"`` → ``[Q, N]``; ``"token"`` → ``[Q, N, T]``, the share of each training position.
            per_module: ``{layer: …}`` instead of the sum over layers.
            topk: keep only the ``k`` largest of each query; ``[Q, N]`` is then never held.
            dampings: several values from the one fit; the result is then ``{damping: Scores}``.
            tol: refine until every query's relative residual and error bound are at most this, or say in the
                certificate that it could not: a method that solves takes it for its own ``tol``, one with factors is
                refined by block conjugate gradients under them (``ekfac`` becomes ``ekfac_cg``).

        Returns:
            :class:`pyinf.Scores`, or a dict of them.

        Raises:
            ConfigError: not fitted yet, or a combination without meaning.
            DataError, ResourceError: before any work.
            SolverError: a solver diverged or met an operator that is not positive definite; says what to change.
        """
        if self.method.kind == "tokens":
            return self._score_tokens(queries, train, topk)
        if tol is not None:
            with self._run.refined(tol):
                return self.score(queries, train, batch_size, granularity, per_module, topk, dampings)
        values = list(dampings) if dampings is not None else [self.damping]
        if not values:
            raise ConfigError("dampings is empty; give at least one value")
        for value in values:
            check_damping(value, self.damping_mode)
        basis = self.options["query_basis"]
        request = ScoreRequest(granularity, per_module, topk, values, self.damping_mode, self.query_rank, basis)
        check_request(request, self.method)
        if self.method.factors is not None and self.factors is None:
            raise ConfigError(
                f"method '{self.method.name}' needs factors; call fit(train) first, or load_factors(directory)"
            )
        train_data, query_data = self._prepare(train, "train"), self._prepare(queries, "queries")
        if not self._run.damped:  # no curvature, no damping
            request.dampings = values[:1]
        plan = self._make_plan(train_data, query_data, batch_size, len(request.dampings))
        home = score_home(self._run, self.run_dir, query_data, train_data, self.factors, request, plan)
        with self._backend():
            result, facts = self._run.score(
                query_data, train_data, self.factors, request, plan, home, float(self.options["checkpoint_seconds"])
            )
        if home is not None and not any(p.name != "run.json" for p in home.iterdir()):
            for path in home.iterdir():
                path.unlink()
            home.rmdir()
        return self._wrap(result, facts, request, dampings, query_data, train_data, plan)

    def _wrap(
        self,
        result: Any,
        facts: dict[str, Any],
        request: ScoreRequest,
        asked: Sequence[float] | None,
        queries: PreparedExamples,
        train: PreparedExamples,
        plan: Plan,
    ) -> Any:
        out = {}
        certificates = facts.pop("certificate", None)
        for number, damping in enumerate(request.dampings):
            rows = slice(number * len(queries), (number + 1) * len(queries))
            own, certificate = dict(facts), None if certificates is None else certificates[rows]
            if "captured_energy" in facts and len(request.dampings) > 1:
                own.pop("captured_energy")
            meta = self._meta(own, damping, queries, train, plan)
            if request.topk is not None:
                out[damping] = Scores(None, certificate, meta, (result[0][rows], result[1][rows]))
            elif request.per_module:
                out[damping] = Scores({name: values[rows] for name, values in result.items()}, certificate, meta)
            else:
                out[damping] = Scores(result[rows], certificate, meta)
        if asked is None:
            return next(iter(out.values()))
        if not self._run.damped:  # no curvature, no damping: the same scores under every name
            only = next(iter(out.values()))
            return dict.fromkeys(asked, only)
        return out

    def _meta(
        self, facts: dict[str, Any], damping: float, queries: PreparedExamples, train: PreparedExamples, plan: Plan
    ) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "damping": damping if self._run.damped else None,
            "damping_mode": self.damping_mode if self._run.damped else None,
            "fisher": self.fisher if self.method.factors else None,
            "query_rank": self.query_rank,
            "query_basis": self.options["query_basis"],
            "solver": self._run.solver,
            "modules": self.selection.names,
            "queries": len(queries),
            "train": len(train),
            "train_tokens": sum(train.counted),
            "timings": {k: round(v, 4) for k, v in self.timings.items()},
            "plan": plan.to_dict(),
            "seed": self.seed,
            "versions": {"pyinf": __version__, "torch": torch.__version__},
            **facts,
        }

    def _score_tokens(self, queries: Any, train: Any, topk: int | None) -> Scores:
        values = bm25_scores(queries, train, query_texts=_texts(queries), train_texts=_texts(train))
        meta = {"method": self.method.name, "queries": len(queries), "train": len(train), "timings": {}}
        scores = Scores(values.float(), None, meta)
        if topk is not None:
            scores = Scores(None, None, meta, scores.topk(topk))
        return scores

    @_at_home
    def self_score(self, train: Any, batch_size: int | None = None) -> Tensor:
        """Self-influence ``⟨H⁻¹G_i, G_i⟩`` of every training example: float32 ``[N]``, never negative.

        Raises:
            ConfigError: the method has no gradients, or was not fitted.
        """
        if self.method.kind != "gradient":
            raise ConfigError(f"method '{self.method.name}' has no self-influence; use a gradient method")
        if self.method.factors is not None and self.factors is None:
            raise ConfigError(f"method '{self.method.name}' needs factors; call fit(train) first")
        data = self._prepare(train, "train")
        plan = self._make_plan(data, None, batch_size)
        dampings = self.factors.dampings(self.damping, self.damping_mode) if self.factors is not None else {}
        with self._backend():
            return self._run.self_score(data, self.factors, dampings, plan)

    # -- helpers -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def uncertified(self) -> Iterator[None]:
        """Inside, scores are made without certificates: for parts of scores that have theirs."""
        kept = self.options["certify"]
        self.options["certify"] = False
        try:
            yield
        finally:
            self.options["certify"] = kept

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """The model where and how it was asked for; its own tensors are put back untouched, also after an error."""
        if self._depth == 0:
            self._prepared = {}  # the caller may have changed the data since the last call
        self._depth += 1
        try:
            with placed(self.model, self.device, self.dtype) if self._depth == 1 else contextlib.nullcontext():
                yield
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def _backend(self) -> Iterator[None]:
        # An ambient autocast would turn the fp32 products of the factors into half precision; the model runs as it is.
        kind = next(self.model.parameters()).device.type
        with ops.use_backend(self.backend) if self.backend is not None else contextlib.nullcontext():
            with torch.autocast(kind, enabled=False), torch.inference_mode(False):
                yield

    def _prepare(self, examples: Any, name: str) -> PreparedExamples:
        held = self._prepared.get(id(examples))
        if held is not None and held[0] is examples and len(held[1]) == len(examples):
            return held[1]
        data = prepare(examples, name, self.model, fields=self.task.fields, shifted=self.task.shifted)
        if name == "train":
            self._run.release()
        self._prepared = {k: v for k, v in self._prepared.items() if v[1].name != name}
        self._prepared[id(examples)] = (examples, data)
        return data

    def _model_fingerprint(self) -> str:
        return artifacts.fingerprint_model(self.model)

    def _data_fingerprint(self, data: PreparedExamples) -> str:
        return data_fingerprint(data)


def _texts(examples: Any) -> list[str] | None:
    text = getattr(examples, "text", None)
    return [text(i) for i in range(len(examples))] if callable(text) else None


def attribute(
    model: nn.Module,
    train: Any,
    queries: Any,
    method: str = "ekfac",
    task: Task | None = None,
    modules: Modules = None,
    damping: float = 0.1,
    damping_mode: str = "relative",
    fisher: str = "sampled",
    batch_size: int | None = None,
    seed: int = 0,
    **method_options: Any,
) -> Scores:
    """Fit and score in one call; see :class:`Attributor`. What the layers see is captured once where the plan allows
    it.

    Returns:
        :class:`pyinf.Scores` with ``values`` ``[Q, N]``; positive = a proponent.
    """
    attributor = Attributor(
        model, method, task, modules, damping, damping_mode, fisher, seed=seed, **method_options
    )  # fmt: skip
    return attributor.run(train, queries, batch_size)
