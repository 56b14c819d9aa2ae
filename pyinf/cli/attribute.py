"""``pyinf attribute``: fit, score and report in one go."""

from __future__ import annotations

import typer

from pyinf.cli import _options as o
from pyinf.cli._job import Job
from pyinf.cli._terminal import Screen, guarded


@guarded
def attribute(
    ctx: typer.Context,
    model: o.Model,
    train: o.Train,
    queries: o.Queries,
    out: o.Out,
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
    batch_size: o.BatchSize = None,
    token_budget: o.TokenBudget = None,
    memory_budget: o.MemoryBudget = None,
    cache: o.Cache = "auto",
    backend: o.Backend = None,
    topk: o.Topk = 10,
    show: o.Show = 3,
    report: o.Report = True,
    config: o.Config = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Which training examples made the model say this? Fits, scores and writes the report."""
    screen = Screen(quiet, json_output)
    with screen.session():
        job = Job.prepare(ctx, screen)
        scores = job.finished_scores()
        if scores is None:
            scores = job.attributor.run(job.train, job.queries, job.batch_size, tol=tol)
        job.save(scores, report)
    job.show(scores)
