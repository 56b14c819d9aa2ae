"""``pyinf fit``: the factors of a training set, for any number of later queries."""

from __future__ import annotations

import typer

from pyinf import methods
from pyinf.cli import _options as o
from pyinf.cli._job import Job
from pyinf.cli._terminal import Screen, guarded
from pyinf.errors import ConfigError


@guarded
def fit(
    ctx: typer.Context,
    model: o.Model,
    train: o.Train,
    out: o.Out,
    adapter: o.Adapter = None,
    tokenizer: o.Tokenizer = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    field: o.Field = None,
    limit: o.Limit = None,
    train_split: o.TrainSplit = None,
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
    eigensolver: o.Eigensolver = "auto",
    method_option: o.MethodOption = None,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = None,
    token_budget: o.TokenBudget = None,
    memory_budget: o.MemoryBudget = None,
    cache: o.Cache = "auto",
    backend: o.Backend = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Fit the factors of a training set; pyinf score uses them for any number of queries."""
    screen = Screen(quiet, json_output)
    with screen.session():
        if methods.get(method).factors is None:
            raise ConfigError(f"method {method!r} has nothing to fit; use pyinf score or pyinf attribute")
        job = Job.prepare(ctx, screen)
        job.attributor.fit(job.train, job.batch_size)
    factors = job.out / "fit" / "factors"
    screen.result(f"factors  {factors}")
    job.summarise({"factors": str(factors), "train": len(job.train)})
