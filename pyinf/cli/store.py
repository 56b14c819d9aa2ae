"""``pyinf store``: stores of compressed gradients, from building them to asking them."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

import pyinf
from pyinf import artifacts
from pyinf.cli import _options as o
from pyinf.cli._job import _check_options, _method_options
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
    check_prefilter,
    count_or_share,
    exact_attributor,
    examples_of,
    load,
    make_prefilter,
)
from pyinf.cli._terminal import Screen, guarded
from pyinf.cli.store_plan import plan
from pyinf.data import Examples
from pyinf.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    name="store",
    help="Stores of compressed gradients: build, look at, check, ask, merge, tidy up.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_STORE, _FIND = "Store", "Search"
_LABELS = ("label", "labels", "class", "category", "source", "id", "url", "title")

ShardRows = Annotated[
    int | None, o.option("--shard-rows", min=1, help="Rows of a file (default: 256 MiB of rows).", panel=_STORE)
]
Verify = Annotated[
    bool, o.option("--verify/--no-verify", help="Check what is read against its checksums.", panel=_STORE)
]


@app.command("build")
@guarded
def build(
    ctx: typer.Context,
    model: o.Model,
    train: o.Train,
    out: Annotated[Path, o.option("--out", help="Folder of the store; the same command goes on there.", panel=_STORE)],
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
    method: Annotated[str, o.option("--method", help="Which rows: logra, trak, onebit, …", panel="Method")] = "logra",
    modules: o.Modules = None,
    damping: o.Damping = 0.1,
    damping_mode: o.DampingMode = "relative",
    fisher: o.Fisher = "sampled",
    method_option: o.MethodOption = None,
    seed: o.Seed = 0,
    format: Annotated[
        str, o.option("--format", help="float32, bfloat16, float16, int8, int4 or 1bit.", panel=_STORE)
    ] = "bfloat16",
    granularity: Annotated[
        str, o.option("--granularity", help="A row a sequence, or a row a token.", panel=_STORE)
    ] = "sequence",
    documents: Annotated[
        bool, o.option("--documents/--no-documents", help="Keep the text of every example beside.", panel=_STORE)
    ] = True,
    shard_rows: ShardRows = None,
    fit_dir: Fit = None,
    batch_size: o.BatchSize = None,
    token_budget: o.TokenBudget = None,
    memory_budget: o.MemoryBudget = None,
    backend: o.Backend = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Make one row of every training example; killed, the same command goes on where it stopped."""
    from pyinf.store import build_store

    screen = Screen(quiet, json_output)
    started = time.perf_counter()
    with screen.session():
        options = {**effective(ctx), "eigensolver": "auto"}
        _check_options(options)
        loaded = load(options, screen)
        train_data = examples_of(options, loaded, "train", screen)
        extra = {key: options[key] for key in ("token_budget", "memory_budget") if options.get(key) is not None}
        attributor = pyinf.Attributor(
            loaded,
            method=method,
            modules=options.get("modules") or None,
            damping=damping,
            damping_mode=damping_mode,
            fisher=fisher,
            backend=backend,
            seed=seed,
            run_dir=out.with_name(f"{out.name}.fit"),  # where factors are fitted that a store needs
            **extra,
            **_method_options(options),
        )
        if fit_dir is not None:
            attributor.load_factors(fit_dir / "fit" / "factors")
        texts = (lambda i: _document(train_data, i)) if documents else None
        store = build_store(attributor, train_data, out, format, texts, shard_rows, granularity, batch_size=batch_size)
    screen.result(f"store  {out}: {store.count} rows of {store.spec.row_bytes} bytes")
    if json_output:
        print(
            json.dumps({"command": "store build", "seconds": round(time.perf_counter() - started, 3), **_facts(store)})
        )


@app.command("info")
@guarded
def info(store: Directory, json_output: o.Json = False) -> None:
    """What a store holds; reads no rows. Also of a store that is not finished."""
    from pyinf.store import Store
    from pyinf.store.faiss_index import indexes

    found = Store.open(store, unfinished=True)
    facts = {**_facts(found), "indexes": [entry["name"] for entry in indexes(store)]}
    if json_output:
        print(json.dumps({"command": "store info", **facts}))
        return
    screen = Screen()
    for key, value in facts.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        screen.result(f"{key:14} {shown}")


@app.command("verify")
@guarded
def verify(store: Directory, quiet: o.Quiet = False, json_output: o.Json = False) -> None:
    """Read everything once and compare it with its checksums; the exit code is 6 where something is not as written."""
    from pyinf.store import Store

    screen = Screen(quiet, json_output)
    with screen.session():
        found = Store.open(store).verify()
    screen.result(f"{store} is whole: {found['rows']} rows in {found['shards']} shards, {found['files']} files")
    if json_output:
        print(json.dumps({"command": "store verify", "store": str(store), **found}))


@app.command("query")
@guarded
def query(
    ctx: typer.Context,
    store: Directory,
    model: o.Model,
    queries: o.Queries,
    k: Annotated[int, o.option("--topk", "-k", min=1, help="Examples a query.", panel=_FIND)] = 10,
    train: TrainOfStore = None,
    rescore: Rescore = None,
    recall: Recall = None,
    rescore_method: RescoreMethod = "ekfac",
    sample: Sample = None,
    recall_by: RecallBy = "low",
    most: Most = 0.1,
    coarse: Coarse = False,
    prefilter: Annotated[
        str | None,
        o.option("--prefilter", help="Leave out most rows first: bm25 or embedding; its recall is shown.", panel=_FIND),
    ] = None,
    keep: Annotated[
        float, o.option("--keep", help="What the prefilter keeps: a share of the store, or a number.", panel=_FIND)
    ] = 0.1,
    fit_dir: Fit = None,
    adapter: o.Adapter = None,
    tokenizer: o.Tokenizer = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    field: o.Field = None,
    query_limit: o.QueryLimit = None,
    limit: o.Limit = None,
    train_split: o.TrainSplit = None,
    query_split: o.QuerySplit = None,
    max_length: o.MaxLength = None,
    truncate: o.Truncate = False,
    prompt_loss: o.PromptLoss = False,
    separator: o.Separator = None,
    add_eos: o.AddEos = False,
    skip_empty: o.SkipEmpty = False,
    damping: ExactDamping = None,
    tol: o.Tol = None,
    batch_size: o.BatchSize = None,
    backend: o.Backend = None,
    out: Annotated[Path | None, o.option("--out", help="A JSON file for the whole answer.", panel="Output")] = None,
    show: o.Show = 3,
    config: o.Config = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """The strongest training examples of every query, by the store alone or computed again with a stated recall."""
    from pyinf.methods.rescoring import Rescoring
    from pyinf.store import Store, query_rows, query_store

    screen = Screen(quiet, json_output)
    exact = rescore is not None or recall is not None
    if (exact or prefilter is not None) and train is None:
        raise ConfigError("scores are computed again from the training data; give --train")
    if prefilter is not None and not exact:
        raise ConfigError("a prefilter is used with its measured recall only, which needs exact scores; give --rescore")
    check_prefilter(prefilter)
    with screen.session():
        options = effective(ctx)
        opened = Store.open(store)
        loaded = load(options, screen)
        asked = examples_of(options, loaded, "queries", screen)
        rows = query_rows(attributor_for(opened, loaded, backend=backend), asked, opened)
        settings: dict[str, Any] = {"normalise": opened.normalise, "coarse": "sign" if coarse else None}
        if exact:
            data = examples_of(options, loaded, "train", screen)
            exactly = exact_attributor(
                opened, loaded, data, rescore_method, damping, fit_dir, batch_size, backend=backend
            )
            settings |= {
                "rescorer": Rescoring(exactly, asked, data, opened.ids, batch_size, tol),
                "sample": sample,
                "rescore": count_or_share(rescore),
                "recall": recall,
                "recall_by": recall_by,
                "most": count_or_share(most),
                "prefilter": make_prefilter(prefilter, loaded, asked, data, opened),
                "keep": count_or_share(keep),
            }
        found = query_store(opened, rows, min(k, opened.count), **settings)
    answer = {"command": "store query", "store": str(store), "queries": len(asked), **found.to_dict()}
    if out is not None:
        artifacts.atomic_write_json(out, answer)
    _show(screen, asked, found, show)
    if out is not None:
        screen.result(f"answer  {out}")
    if json_output:
        print(json.dumps(answer))


@app.command("merge")
@guarded
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Folders of stores with the same method, model and options.")],
    out: Annotated[Path, o.option("--out", help="Folder of the merged store.", panel=_STORE)],
    shard_rows: ShardRows = None,
    drop_duplicates: Annotated[
        bool, o.option("--drop-duplicates", help="Keep the first of equal ids instead of refusing them.", panel=_STORE)
    ] = False,
    check: Verify = True,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """One store out of several, such as the parts that several processes or machines built."""
    from pyinf.store import merge_stores

    screen = Screen(quiet, json_output)
    with screen.session():
        found = merge_stores(stores, out, shard_rows, "drop" if drop_duplicates else "error", check)
    screen.result(f"store  {out}: {found.count} rows")
    if json_output:
        print(json.dumps({"command": "store merge", **_facts(found)}))


@app.command("compact")
@guarded
def compact(
    store: Directory,
    shard_rows: ShardRows = None,
    check: Verify = True,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Write a store again in place: full shards, the first of equal ids only."""
    from pyinf.store import compact_store

    screen = Screen(quiet, json_output)
    with screen.session():
        found = compact_store(store, shard_rows, check)
    screen.result(f"store  {store}: {found.count} rows in {len(found.manifest.shards)} shards")
    if json_output:
        print(json.dumps({"command": "store compact", **_facts(found)}))


# ------------------------------------------------------------------------------------------ shared


def _document(data: Examples, index: int) -> dict[str, Any]:
    record = data.records[index]
    kept = {key: record[key] for key in _LABELS if isinstance(record.get(key), (str, int, float, bool))}
    return {"text": data.text(index), **kept}


def _facts(store: Any) -> dict[str, Any]:
    spec = store.spec
    kinds = Counter(section.kind for section in spec.sections)
    return {
        "store": str(store.directory),
        "finished": store.manifest.finished,
        "rows": store.count,
        "granularity": spec.granularity,
        "method": spec.meta.get("method", spec.compressor),
        "compressor": spec.compressor,
        "format": spec.format,
        "row_bytes": spec.row_bytes,
        "columns": store.width,
        "sections": dict(kinds),
        "shards": len(store.manifest.shards),
        "bytes": store.nbytes,
        "norms": spec.norms,
        "documents": spec.documents,
        "damping": spec.damping,
        "model": spec.model,
        "data": spec.data,
        "pyinf": spec.pyinf,
    }


def _show(screen: Screen, asked: Examples, found: Any, show: int) -> None:
    shown = min(show, len(asked))
    for q in range(shown):
        rows = []
        for j, value in enumerate(found.values[q].tolist()):
            document = found.documents[q][j] if found.documents[q] else {}
            label = next((str(document[key]) for key in _LABELS if key in document), "")
            number = found.ids[q, j]
            rows.append(("+", int(number.reshape(-1)[0]), value, label, str(document.get("text", ""))))
        screen.examples(f"query {q}: {asked.text(q)}", rows)
    if shown < len(asked):
        screen.result(f"… and {len(asked) - shown} more queries (--show)")
    for name, estimate in (("prefilter", found.prefilter), ("candidates", found.recall)):
        if estimate is not None:
            screen.result(f"{name}: {estimate}, {100 * estimate.level:g} %, measured on {estimate.sample} sequences")
    if "candidates" in found.cost:
        cost = found.cost
        unknown = "" if found.recall is not None else "; their recall was not measured (--sample 0)"
        screen.result(
            f"{cost['candidates']} candidates a query ({100 * cost['share']:.2g} %), {cost['sequences_run']} sequences "
            f"run again{unknown}"
        )


app.command("plan")(plan)
