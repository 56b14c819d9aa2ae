"""``pyinf score``: scores of new queries with factors fitted before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyinf import artifacts, methods
from pyinf.cli import _options as o
from pyinf.cli._job import Job
from pyinf.cli._terminal import Screen, guarded
from pyinf.errors import ConfigError

_FROM_FIT = (
    "model adapter tokenizer revision train field limit train_split max_length truncate prompt_loss separator add_eos "
    "skip_empty method modules damping damping_mode fisher eigensolver seed dtype batch_size token_budget method_option"
).split()


def _use_fit(ctx: typer.Context, value: Path | None) -> Path | None:
    """What the fit was run with is the default here."""
    if value is None or ctx.resilient_parsing:
        return value
    if not (value / "fit" / "factors" / artifacts.MANIFEST_NAME).exists():
        raise typer.BadParameter(
            f"{value} holds no finished fit; give the --out folder of pyinf fit, or run that again"
        )
    config = value / "config.yaml"
    if config.exists():
        names = {p.name: bool(getattr(p, "multiple", False)) for p in ctx.command.params if p.name}
        found = o.read_config(config, names)
        ctx.default_map = {**{k: v for k, v in found.items() if k in _FROM_FIT}, **(ctx.default_map or {})}
    return value


FitDir = Annotated[
    Path | None,
    typer.Option(
        "--fit",
        help="Folder of a pyinf fit (or attribute) run; its options are the defaults here.",
        rich_help_panel="Method",
        callback=_use_fit,
        is_eager=True,
    ),
]
Granularity = Annotated[
    str, typer.Option("--granularity", help="sequence, or token: a score a training token.", rich_help_panel="Method")
]
PerModule = Annotated[bool, typer.Option("--per-module", help="Keep layers apart.", rich_help_panel="Method")]
OnlyTop = Annotated[
    bool,
    typer.Option("--only-top", help="Keep the --topk best only, never the whole matrix.", rich_help_panel="Output"),
]


@guarded
def score(
    ctx: typer.Context,
    model: o.Model,
    train: o.Train,
    queries: o.Queries,
    out: o.Out,
    fit_dir: FitDir = None,
    adapter: o.Adapter = None,
    tokenizer: o.Tokenizer = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    field: o.Field = None,
    limit: o.Limit = None,
    query_limit: o.QueryLimit = None,
    train_split: o.TrainSplit = None,
    query_split: o.QuerySplit = None,
    max_length: o.MaxLength = None,
    truncate: o.Truncate = False,
    prompt_loss: o.PromptLoss = False,
    separator: o.Separator = None,
    add_eos: o.AddEos = False,
    skip_empty: o.SkipEmpty = False,
    method: o.MethodName = "ekfac",
    modules: o.Modules = None,
    damping: o.Damping = 0.1,
    damping_mode: o.DampingMode = "relative",
    fisher: o.Fisher = "sampled",
    query_rank: o.QueryRank = None,
    query_basis: o.QueryBasis = None,
    eigensolver: o.Eigensolver = "auto",
    method_option: o.MethodOption = None,
    tol: o.Tol = None,
    certify: o.Certify = None,
    seed: o.Seed = 0,
    granularity: Granularity = "sequence",
    per_module: PerModule = False,
    batch_size: o.BatchSize = None,
    token_budget: o.TokenBudget = None,
    memory_budget: o.MemoryBudget = None,
    cache: o.Cache = "auto",
    backend: o.Backend = None,
    topk: o.Topk = 10,
    only_top: OnlyTop = False,
    show: o.Show = 3,
    report: o.Report = True,
    config: o.Config = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Score queries against a training set, with the factors of an earlier fit where the method has any."""
    screen = Screen(quiet, json_output)
    with screen.session():
        if methods.get(method).factors is not None and fit_dir is None:
            raise ConfigError(f"method {method!r} needs factors; give --fit DIR of a pyinf fit, or use pyinf attribute")
        job = Job.prepare(ctx, screen)
        scores = job.finished_scores()
        if scores is None:
            kind = {
                "granularity": granularity,
                "per_module": per_module,
                "topk": topk if only_top else None,
                "tol": tol,
            }
            scores = job.attributor.score(job.queries, job.train, job.batch_size, **kind)
        job.save(scores, report)
    job.show(scores)
