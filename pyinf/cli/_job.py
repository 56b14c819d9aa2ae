"""What fit, score and attribute have in common: load, check, plan, claim the output folder, work, save, show."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

import pyinf
from pyinf import artifacts, ops, progress
from pyinf import methods as _methods
from pyinf.cli._options import effective
from pyinf.cli._terminal import InnerSink, Screen
from pyinf.curvature import EIGENSOLVERS, check_damping
from pyinf.data import Examples, load_examples, load_model, load_tokenizer, model_limits
from pyinf.data.models import resolve_device
from pyinf.errors import ConfigError
from pyinf.methods.options import settle
from pyinf.plan import parse_bytes
from pyinf.score import Scores, check_basis, parse_rank

__all__ = ["Job"]

_LABELS = ("label", "labels", "class", "category", "source", "id")


@dataclass
class Job:
    """One run of the command line: its options, its model and data, and the folder it writes."""

    command: str
    options: dict[str, Any]
    screen: Screen
    model: Any
    train: Examples
    queries: Examples | None
    attributor: pyinf.Attributor
    out: Path
    started: float
    page: Path | None = None

    # ------------------------------------------------------------------------------------------ before the work

    @classmethod
    def prepare(cls, ctx: typer.Context, screen: Screen) -> Job:
        """Check the options, load model and data, print the plan, and claim the output folder."""
        started = time.perf_counter()
        options = effective(ctx)
        _check_options(options)
        name = options["model"]
        trust = {"trust_remote_code": options.get("trust_remote_code", False)}
        revision = {"revision": options.get("revision")}
        tokenizer_name = options.get("tokenizer")
        tokenizer = load_tokenizer(tokenizer_name or name, required=tokenizer_name is not None, **trust)
        method = _methods.get(options["method"])
        place = {"dtype": options["dtype"], "device": options["device"]}
        screen.say(f"loading {name}")
        model = load_model(name, adapter=options.get("adapter"), **place, **trust, **revision)
        train = _examples(options, "train", tokenizer, model)
        queries = _examples(options, "queries", tokenizer, model) if options.get("queries") else None
        for note in [*train.notes, *(queries.notes if queries is not None else ())]:
            screen.say(note)
        out = Path(options["out"])
        extra = {k: options[k] for k in ("eigensolver", "cache") if k in options} if method.kind == "gradient" else {}
        for key in ("memory_budget", "token_budget", "query_rank", "query_basis"):
            if options.get(key) is not None:
                extra[key] = options[key]
        if method.kind == "gradient":
            extra |= _method_options(options)
            if options.get("certify") is not None:
                extra["certify"] = options["certify"]
        attributor = pyinf.Attributor(
            model,
            method=options["method"],
            modules=options.get("modules") or None,
            damping=options["damping"],
            damping_mode=options["damping_mode"],
            fisher=options["fisher"],
            backend=options.get("backend"),
            seed=options["seed"],
            run_dir=out,
            **extra,
        )
        job = cls(ctx.info_name or "", options, screen, model, train, queries, attributor, out, started)
        if method.kind == "gradient":
            if options.get("fit_dir") is not None and method.factors is not None:
                job.load_factors()
            plan = attributor.plan(train, queries, options.get("batch_size"))
            screen.plan([("method", f"{method.name}: {method.summary}"), *plan.rows()], plan.notes)
        else:
            size = f"{len(train)} training examples, {len(queries or ())} queries"
            screen.plan([("method", f"{method.name}: {method.summary}"), ("data", size)], [])
        job._claim()
        return job

    def _claim(self) -> None:
        """Refuse a folder that holds another run; write the configuration beside the output."""
        names = ["method", "modules", "damping", "damping_mode", "fisher", "seed", "query_rank", "eigensolver"]
        names += [
            "query_basis",
            "granularity",
            "per_module",
            "only_top",
            "fit_dir",
            "batch_size",
            "token_budget",
            "tol",
            "method_option",
            "certify",
        ]
        run: dict[str, Any] = {
            "command": self.command,
            "options": {k: self.options[k] for k in names if k in self.options},
        }
        run["model"] = artifacts.fingerprint_model(self.model)[:16]
        run["train"] = self.train.fingerprint()[:16]
        if self.queries is not None:
            run["queries"] = self.queries.fingerprint()[:16]
        started = {p.name for p in self.out.iterdir()} if self.out.is_dir() else set()
        if started and started <= {artifacts.RUN_NAME, "config.yaml"}:
            (self.out / artifacts.RUN_NAME).unlink(missing_ok=True)  # a start that came to nothing binds nobody
            (self.out / "config.yaml").unlink(missing_ok=True)
        if artifacts.claim_directory(self.out, run):
            self.screen.say(f"going on with the run in {self.out}")
        text = f"# pyinf {pyinf.__version__}; again with: pyinf {self.command} --config config.yaml\n"
        text += yaml.safe_dump(self.options, sort_keys=True, allow_unicode=True)
        artifacts.atomic_write_bytes(self.out / "config.yaml", text.encode())

    # ------------------------------------------------------------------------------------------ after the work

    @property
    def batch_size(self) -> int | None:
        """As asked for."""
        return self.options.get("batch_size")

    def finished_scores(self) -> Scores | None:
        """The scores of this run, if an earlier start of it came that far."""
        home = self.out / "scores"
        if not (home / artifacts.MANIFEST_NAME).exists():
            return None
        self.screen.say(f"scores found in {home}; not computed again")
        return Scores.load(home)

    def save(self, scores: Scores, write_report: bool) -> None:
        """Save the scores and write the report."""
        home = self.out / "scores"
        if not (home / artifacts.MANIFEST_NAME).exists():
            scores.save(home)
        self.page = self._report(scores, self.options["topk"]) if write_report else None
        with contextlib.suppress(OSError):
            (self.out / "unfinished").rmdir()  # where half-done scores were, empty by now

    def show(self, scores: Scores) -> None:
        """Print the strongest examples of the first queries, the files written, and the summary."""
        assert self.queries is not None
        k = self.options["topk"]
        top = scores.topk(k)
        bottom = scores.bottomk(k) if scores.values is not None else None
        self._show(top, bottom, scores.certificate)
        if scores.certificate:
            self.screen.result(f"certificates  {_verdicts(scores.certificate)}")
        self.screen.result(f"scores  {self.out / 'scores'}")
        if self.page is not None:
            self.screen.result(f"report  {self.page}")
        summary = {
            "scores": str(self.out / "scores"),
            "report": None if self.page is None else str(self.page),
            "queries": len(self.queries),
            "train": len(self.train),
            "top": _listed(top),
            "bottom": None if bottom is None else _listed(bottom),
            "certificate": scores.certificate,
        }
        self.summarise(summary)

    def summarise(self, fields: dict[str, Any]) -> None:
        """Write ``summary.json``, and print it where ``--json`` asked for it."""
        summary = {
            "command": self.command,
            "pyinf": pyinf.__version__,
            "out": str(self.out),
            "method": self.options["method"],
            "seconds": round(time.perf_counter() - self.started, 3),
            "stages": {name: round(s, 3) for name, s in self.attributor.timings.items()},
            **fields,
        }
        artifacts.atomic_write_json(self.out / "summary.json", summary)
        if self.screen.json_output:
            print(json.dumps(summary, ensure_ascii=True))

    def _show(self, top: Any, bottom: Any, certificate: list[dict[str, Any]] | None) -> None:
        assert self.queries is not None
        shown = min(self.options.get("show", 3), len(self.queries))
        for q in range(shown):
            rows = [self._row("+", int(i), float(v)) for v, i in zip(top[0][q], top[1][q], strict=True)]
            if bottom is not None:
                used = {row[1] for row in rows}
                pairs = list(zip(bottom[0][q], bottom[1][q], strict=True))
                rows += [self._row("-", int(i), float(v)) for v, i in reversed(pairs) if int(i) not in used]
            self.screen.examples(f"query {q}: {self.queries.text(q)}", rows)
            if certificate:
                self.screen.result(f"  certificate: {certificate[q]['verdict']} ({certificate[q]['reason']})\n")
        if shown < len(self.queries):
            self.screen.result(f"… and {len(self.queries) - shown} more queries (--show)")

    def _row(self, side: str, index: int, score: float) -> tuple[str, int, float, str, str]:
        record = self.train.records[index]
        label = next((str(record[key]) for key in _LABELS if record.get(key) is not None), "")
        return side, index, score, label, self.train.text(index)

    def _report(self, scores: Scores, k: int) -> Path:
        assert self.queries is not None
        from pyinf import report

        with progress.stage("report", None, "passes") as stage, progress.use(InnerSink(stage)):
            if self.attributor.method.factors is not None and self.attributor.factors is None:
                self.attributor.fit(self.train, self.batch_size)  # finished before: they are read, not fitted
            facts = [("model folder", str(self.options["model"]))]
            facts += [("adapter", str(self.options["adapter"]))] if "adapter" in self.options else []
            facts += [("training data", self.train.name), ("queries", self.queries.name)]
            data = report.collect(self.attributor, scores, self.queries, self.train, k=k, bottom=k, facts=facts)
            data.save(self.out / "report.json")
            page = self.out / "report.html"
            report.write_html(data, page)
        return page

    def load_factors(self) -> None:
        """The factors of an earlier fit (``--fit``)."""
        self.attributor.load_factors(Path(self.options["fit_dir"]) / "fit" / "factors")


def _check_options(options: dict[str, Any]) -> None:
    """What can be refused before a model is loaded."""
    method = _methods.get(options["method"])
    own = _method_options(options)
    if method.kind == "gradient":
        settle(method.name, method.options, {}, own)
    elif own:
        raise ConfigError(f"method '{method.name}' has no options of its own")
    check_damping(options["damping"], options["damping_mode"])
    if options["fisher"] not in ("sampled", "empirical"):
        raise ConfigError(f"unknown fisher {options['fisher']!r}; use sampled or empirical")
    if options["eigensolver"] not in EIGENSOLVERS:
        raise ConfigError(f"unknown eigensolver {options['eigensolver']!r}; choose one of {', '.join(EIGENSOLVERS)}")
    if options.get("query_rank") is not None:
        options["query_rank"] = _rank(options["query_rank"])
    check_basis(options.get("query_basis"), options.get("query_rank"))
    parse_bytes(options.get("memory_budget"))
    resolve_device(options["device"])
    if options.get("backend") is not None:
        with ops.use_backend(options["backend"]):
            pass
    _fields(options)
    if options.get("granularity", "sequence") not in ("sequence", "token"):
        raise ConfigError(f"unknown granularity {options['granularity']!r}; use sequence or token")


def _method_options(options: dict[str, Any]) -> dict[str, Any]:
    """``--method-option name=value``; the method checks them."""
    found: dict[str, Any] = {}
    for item in options.get("method_option") or ():
        name, sign, value = item.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"--method-option {item!r} is not of the form name=value")
        found[name.strip().replace("-", "_")] = None if value.strip().lower() == "none" else value.strip()
    return found


def _verdicts(certificate: list[dict[str, Any]]) -> str:
    """How many queries have which verdict."""
    counts = Counter(entry["verdict"] for entry in certificate)
    return ", ".join(f"{n} {word}" for word, n in counts.most_common())


def _rank(text: Any) -> int | float:
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            f"query rank {text!r} is not a number; give a rank (64) or a captured energy (0.99)"
        ) from None
    value = int(number) if number.is_integer() and "." not in str(text) else number
    parse_rank(value)
    return value


def _fields(options: dict[str, Any]) -> dict[str, str]:
    pairs = {}
    for item in options.get("field") or ():
        ours, sign, theirs = item.partition("=")
        if not sign or not ours or not theirs:
            raise ConfigError(f"--field {item!r} is not of the form prompt=instruction")
        pairs[ours] = theirs
    return pairs


def _examples(options: dict[str, Any], which: str, tokenizer: Any, model: Any) -> Examples:
    vocabulary, positions = model_limits(model)
    keys = ("max_length", "truncate", "prompt_loss", "separator", "add_eos", "skip_empty")
    return load_examples(
        options[which],
        tokenizer,
        limit=options.get("limit" if which == "train" else "query_limit"),
        split=options.get("train_split" if which == "train" else "query_split"),
        fields=_fields(options),
        vocabulary=vocabulary,
        positions=positions,
        **{key: options[key] for key in keys if key in options},
    )


def _listed(found: Any) -> list[dict[str, list[Any]]]:
    return [{"train": i.tolist(), "score": v.tolist()} for v, i in zip(found[0], found[1], strict=True)]
