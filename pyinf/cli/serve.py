"""``pyinf serve``: queries to a store over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyinf.cli import _options as o
from pyinf.cli._options import effective
from pyinf.cli._stores import (
    Coarse,
    Directory,
    ExactDamping,
    Fit,
    Most,
    Recall,
    RecallBy,
    Rescore,
    RescoreMethod,
    Sample,
    TrainOfStore,
    attributor_for,
    count_or_share,
    exact_attributor,
    examples_of,
    load,
    tokenizer_of,
)
from pyinf.cli._terminal import Screen, guarded
from pyinf.errors import ConfigError
from pyinf.serve.limits import Limits
from pyinf.serve.security import check_address, load_token

_SERVICE, _LIMITS = "Service", "Limits"


@guarded
def serve(
    ctx: typer.Context,
    store: Directory,
    model: o.Model,
    host: Annotated[str, o.option("--host", help="Address to listen on.", panel=_SERVICE)] = "127.0.0.1",
    port: Annotated[
        int, o.option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.", panel=_SERVICE)
    ] = 8000,
    token_file: Annotated[
        Path | None,
        o.option(
            "--token-file",
            help="File with the token that clients must send (or PYINF_SERVE_TOKEN); needed unless on the loopback.",
            panel=_SERVICE,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        o.option("--allow-host", help="A host name that the service answers to; several times.", panel=_SERVICE),
    ] = None,
    title: Annotated[
        str | None, o.option("--title", help="What the search page calls the data.", panel=_SERVICE)
    ] = None,
    train: TrainOfStore = None,
    rescore: Rescore = None,
    recall: Recall = None,
    rescore_method: RescoreMethod = "ekfac",
    sample: Sample = None,
    recall_by: RecallBy = "low",
    most: Most = 0.1,
    coarse: Coarse = False,
    damping: ExactDamping = None,
    tol: o.Tol = None,
    fit_dir: Fit = None,
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
    batch_size: o.BatchSize = None,
    backend: o.Backend = None,
    max_tokens: Annotated[int, o.option("--max-tokens", help="Tokens of a query.", panel=_LIMITS)] = Limits.tokens,
    max_k: Annotated[int, o.option("--max-k", help="Documents in an answer.", panel=_LIMITS)] = Limits.k,
    max_body: Annotated[int, o.option("--max-body", help="Bytes of a request.", panel=_LIMITS)] = Limits.body_bytes,
    concurrency: Annotated[
        int, o.option("--concurrency", help="Requests at a time.", panel=_LIMITS)
    ] = Limits.concurrency,
    queue: Annotated[int, o.option("--queue", help="Searches that wait.", panel=_LIMITS)] = Limits.queue,
    batch: Annotated[int, o.option("--batch", help="Queries that share a search.", panel=_LIMITS)] = Limits.batch,
    timeout: Annotated[float, o.option("--timeout", help="Seconds for an answer.", panel=_LIMITS)] = Limits.seconds,
    config: o.Config = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Answer queries to a store over HTTP, with a search page; Ctrl-C ends it when what runs is finished."""
    # Whatever is wrong with the service is said before a model is loaded.
    from pyinf.serve.app import create_app
    from pyinf.serve.searcher import StoreSearcher
    from pyinf.serve.server import bind, run
    from pyinf.store import Store

    limits = Limits(
        body_bytes=max_body,
        tokens=max_tokens,
        k=max_k,
        concurrency=concurrency,
        queue=queue,
        batch=batch,
        seconds=timeout,
    )
    secret = load_token(token_file)
    check_address(host, secret)
    exact = rescore is not None or recall is not None
    if exact and train is None:
        raise ConfigError("scores are computed again from the training data; give --train")
    if train is not None and not exact:
        raise ConfigError("--train is for exact scores; say how many: --rescore 0.01, or --recall 0.95")
    screen = Screen(quiet, json_output)
    with screen.session():
        options = effective(ctx)
        opened = Store.open(store)
        words = tokenizer_of(options)
        loaded = load(options, screen)
        exactly = data = None
        if exact:
            data = examples_of(options, loaded, "train", screen)
            exactly = exact_attributor(
                opened, loaded, data, rescore_method, damping, fit_dir, batch_size, backend=backend
            )
        searcher = StoreSearcher(
            opened,
            attributor_for(opened, loaded, backend=backend),
            words,
            {"separator": separator, "add_eos": add_eos, "prompt_loss": prompt_loss},
            exactly,
            data,
            count_or_share(rescore),
            recall,
            sample,
            recall_by,
            count_or_share(most),
            coarse="sign" if coarse else None,
            batch_size=batch_size,
            tol=tol,
        )
    app = create_app(searcher, limits, secret, allow_host or (), title or store.resolve().name)
    sock = bind(host, port, secret)

    def ready(address: str) -> None:
        screen.result(f"serving  {address}   {opened.count} documents, token {'needed' if secret else 'not needed'}")
        if secret is not None and not address.startswith(("http://127.", "http://[::1]")):
            screen.say("note: the token travels in the clear; put a server with TLS in front where others can listen")
        if json_output:
            facts = {"command": "serve", "address": address, "documents": opened.count, "token": secret is not None}
            print(json.dumps(facts), flush=True)

    run(app, sock, limits, ready)
    screen.say("stopped")
