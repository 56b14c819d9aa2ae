"""``pyinf serve``: queries to a store over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pyinf.cli import _options as o
from pyinf.cli._options import effective
from pyinf.cli._stores import attributor_for, exact_attributor
from pyinf.cli._terminal import Screen, guarded
from pyinf.cli.store import Directory, Fit, _beside, _count, _data
from pyinf.data import load_model, load_tokenizer
from pyinf.errors import ConfigError
from pyinf.serve.limits import Limits
from pyinf.serve.security import check_address, load_token

_SERVICE, _LIMITS, _EXACT = "Service", "Limits", "Exact scores"


def _option(*names: str, help: str, panel: str, **extra: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **extra)


@guarded
def serve(
    ctx: typer.Context,
    store: Directory,
    model: o.Model,
    host: Annotated[str, _option("--host", help="Address to listen on.", panel=_SERVICE)] = "127.0.0.1",
    port: Annotated[
        int, _option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.", panel=_SERVICE)
    ] = 8000,
    token_file: Annotated[
        Path | None,
        _option(
            "--token-file",
            help="File with the token that clients must send (or PYINF_SERVE_TOKEN); needed unless on the loopback.",
            panel=_SERVICE,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        _option("--allow-host", help="A host name that the service answers to; several times.", panel=_SERVICE),
    ] = None,
    title: Annotated[
        str | None, _option("--title", help="What the search page calls the data.", panel=_SERVICE)
    ] = None,
    train: Annotated[
        str | None, _option("--train", help="The training data of the store: gives exact scores.", panel=_EXACT)
    ] = None,
    rescore: Annotated[
        float | None,
        _option("--rescore", help="Compute the best again: a share of the store (0.01), or a number.", panel=_EXACT),
    ] = None,
    recall: Annotated[
        float | None, _option("--recall", help="Compute as many again as this recall at k takes: 0.95.", panel=_EXACT)
    ] = None,
    rescore_method: Annotated[
        str, _option("--rescore-method", help="Which exact scores: ekfac, ekfac_cg, …", panel=_EXACT)
    ] = "ekfac",
    sample: Annotated[
        int | None, _option("--sample", min=0, help="Examples with exact scores that measure recall.", panel=_EXACT)
    ] = None,
    recall_by: Annotated[
        str, _option("--recall-by", help="--recall holds for low, the interval's end, or value.", panel=_EXACT)
    ] = "low",
    most: Annotated[
        float, _option("--most", help="The most that --recall may compute: a share, or a number.", panel=_EXACT)
    ] = 0.1,
    damping: Annotated[
        float | None, _option("--damping", help="Of the exact scores; the store's if not given.", panel=_EXACT)
    ] = None,
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
    max_tokens: Annotated[int, _option("--max-tokens", help="Tokens of a query.", panel=_LIMITS)] = Limits.tokens,
    max_k: Annotated[int, _option("--max-k", help="Documents in an answer.", panel=_LIMITS)] = Limits.k,
    max_body: Annotated[int, _option("--max-body", help="Bytes of a request.", panel=_LIMITS)] = Limits.body_bytes,
    concurrency: Annotated[
        int, _option("--concurrency", help="Requests at a time.", panel=_LIMITS)
    ] = Limits.concurrency,
    queue: Annotated[int, _option("--queue", help="Searches that wait.", panel=_LIMITS)] = Limits.queue,
    batch: Annotated[int, _option("--batch", help="Queries that share a search.", panel=_LIMITS)] = Limits.batch,
    timeout: Annotated[float, _option("--timeout", help="Seconds for an answer.", panel=_LIMITS)] = Limits.seconds,
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
        trust = {"trust_remote_code": trust_remote_code}
        words = load_tokenizer(tokenizer or model, required=tokenizer is not None, **trust)
        screen.say(f"loading {model}")
        place = {"dtype": dtype, "device": device, "revision": revision}
        loaded = load_model(model, adapter=options.get("adapter"), **place, **trust)
        exactly = data = None
        if exact:
            data = _data(options, loaded, "train")
            home = None if fit_dir is not None else _beside(store).with_suffix(f".{rescore_method}")
            exactly = exact_attributor(
                opened, loaded, data, rescore_method, damping, fit_dir, home, batch_size, backend=backend
            )
        searcher = StoreSearcher(
            opened,
            attributor_for(opened, loaded, backend=backend),
            words,
            {"separator": separator, "add_eos": add_eos, "prompt_loss": prompt_loss},
            exactly,
            data,
            _count(rescore),
            recall,
            sample,
            recall_by,
            _count(most),
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
