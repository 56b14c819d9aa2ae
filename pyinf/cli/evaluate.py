"""``pyinf evaluate``: retraining banks, scores against them, and a board of methods."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import pyinf
from pyinf import artifacts, evaluate, methods
from pyinf.cli import _options as o
from pyinf.cli._terminal import Screen, guarded
from pyinf.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    name="evaluate",
    help="Retraining banks, metrics of any score matrix against them, and a board of methods.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_BANK, _RETRAIN, _SCORES, _OUT = "Bank", "Retrainings", "Scores", "Output"


BankDir = Annotated[Path, o.option("--bank", help="Folder of the bank.", panel=_BANK)]
ProtocolName = Annotated[
    str,
    o.option(
        "--protocol",
        help="quick, small, gpu; or module:name of a protocol of your own, or of a function that makes one.",
        panel=_BANK,
    ),
]
Own = Annotated[
    str | None, o.option("--protocol", help="module:name, for a bank of a protocol of your own.", panel=_BANK)
]
Workers = Annotated[int, o.option("--workers", min=1, help="Processes that train at once.", panel=_RETRAIN)]
Controls = Annotated[int, o.option("--controls", min=1, help="Random removals of as many, to compare.", panel=_RETRAIN)]


@app.command("bank")
@guarded
def bank(
    protocol: ProtocolName,
    out: Annotated[Path, o.option("--out", help="Folder of the bank; the same command goes on there.", panel=_BANK)],
    setting: Annotated[
        list[str] | None, o.option("--set", help="A setting of a ready protocol: epochs=3; several times.", panel=_BANK)
    ] = None,
    threads: Annotated[int, o.option("--threads", min=1, help="CPU threads of one training.", panel=_RETRAIN)] = 1,
    workers: Workers = 1,
    half: Annotated[int, o.option("--half", min=0, help="Random half subsets (LDS).", panel=_RETRAIN)] = 100,
    other_seed: Annotated[
        int, o.option("--other-seed", min=0, help="How many of them again with another seed (noise).", panel=_RETRAIN)
    ] = 20,
    removals: Annotated[int, o.option("--removals", min=0, help="Random removals of 1 %.", panel=_RETRAIN)] = 0,
    removals_other_seed: Annotated[
        int, o.option("--removals-other-seed", min=0, help="The same removals with another seed.", panel=_RETRAIN)
    ] = 0,
    leave_one_out: Annotated[
        int, o.option("--leave-one-out", min=0, help="Examples to leave out, one at a time.", panel=_RETRAIN)
    ] = 0,
    repeats: Annotated[
        int, o.option("--repeats", min=1, help="Full trainings with one seed; 2 shows the noise.", panel=_RETRAIN)
    ] = 2,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Train a protocol's model on many subsets and keep what it says after each; goes on where it was killed."""
    screen = Screen(quiet, json_output)
    with screen.session():
        built = evaluate.Bank(out, _protocol(protocol, setting), threads)
        n = built.protocol.train_size
        plan = evaluate.full(n, (0,), repeats)
        if half:
            plan += evaluate.half_subsets(n, half)
        if min(half, other_seed):
            plan += evaluate.half_subsets(n, min(half, other_seed), seed=1)
        if removals:
            plan += evaluate.random_removals(n, removals)
        if min(removals, removals_other_seed):
            plan += evaluate.random_removals(n, min(removals, removals_other_seed), seed=1)
        if leave_one_out:
            plan += evaluate.leave_one_out(n, leave_one_out)
        left = len(built.missing(plan))
        screen.say(f"{len(plan)} retrainings of protocol {built.protocol.name}, {left} of them to do")
        built.build(plan, workers)
        noise = evaluate.bank_noise(built)
    for kind, count in built.kinds().items():
        screen.result(f"{kind:16} {count} retrainings")
    if noise["repeats"]:
        largest = noise["largest_difference_of_repeats"]
        screen.result(f"the same subset twice: largest difference of a measurement {largest:.3g}")
    for kind, found in noise.items():
        if isinstance(found, dict):
            screen.result(
                f"{kind}, another seed: Spearman {found['agreement']:.3f} over {found['subsets']} subsets, so that a "
                f"perfect prediction reaches {found['ceiling']:.3f}"
            )
    if json_output:
        print(json.dumps({"command": "evaluate bank", "bank": str(out), "retrainings": built.kinds(), "noise": noise}))


@app.command("scores")
@guarded
def scores(
    matrices: Annotated[list[Path], typer.Argument(help="Matrices: .npy, .safetensors, folders of saved scores.")],
    bank: BankDir,
    protocol: Own = None,
    name: Annotated[
        list[str] | None, o.option("--name", help="A name for each; its file name if not given.", panel=_SCORES)
    ] = None,
    layout: Annotated[
        str, o.option("--layout", help="auto, queries_by_train or train_by_queries.", panel=_SCORES)
    ] = "auto",
    key: Annotated[str | None, o.option("--key", help="Which tensor of a .safetensors file.", panel=_SCORES)] = None,
    remove: Annotated[
        int | None,
        o.option("--remove", min=1, help="Retrain without the top N of each query (loss difference).", panel=_RETRAIN),
    ] = None,
    controls: Controls = 10,
    workers: Workers = 1,
    resamples: Annotated[
        int, o.option("--resamples", min=1, help="Bootstrap samples of an interval.", panel=_SCORES)
    ] = 2000,
    out: Annotated[
        Path | None, o.option("--out", help="Folder for evaluation.json and evaluation.csv.", panel=_OUT)
    ] = None,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Compare score matrices, from any library, with a bank; positive must mean that the example helps the query."""
    screen = Screen(quiet, json_output)
    names = list(name) if name else [m.stem if m.is_file() else m.name for m in matrices]
    if len(names) != len(matrices):
        raise ConfigError(f"{len(names)} names for {len(matrices)} matrices; give one --name each, or none")
    with screen.session():
        opened = evaluate.Bank.open(bank, _protocol(protocol) if protocol else None)
        sizes = opened.protocol.query_size, opened.protocol.train_size
        loaded = [evaluate.load_matrix(m, *sizes, layout=layout, key=key) for m in matrices]
        if remove is not None:
            plan = [
                r
                for n, v in zip(names, loaded, strict=True)
                for r in evaluate.plan_removals(opened, v, n, remove, controls=controls)
            ]
            opened.build(plan, workers)
        found = [
            evaluate.evaluate_scores(opened, v, n, "queries_by_train", qld_k=remove, resamples=resamples)
            for n, v in zip(names, loaded, strict=True)
        ]
        noise = evaluate.bank_noise(opened)
    rows = evaluate.to_rows(found)
    _show(screen, rows, noise)
    for evaluation in found:
        for note in evaluation.notes:
            screen.say(f"{evaluation.name}: {note}")
    content = {"command": "evaluate scores", "bank": opened.identity, "noise": noise}
    content["scores"] = [evaluation.to_dict() for evaluation in found]
    _write(screen, out, content, rows, "evaluation")
    if json_output:
        print(json.dumps(content))


@app.command("board")
@guarded
def board(
    bank: BankDir,
    out: Annotated[Path, o.option("--out", help="Folder of the board, a folder a row.", panel=_OUT)],
    method: Annotated[
        list[str] | None,
        o.option("--method", help="A method; several times. Default: grad_dot, kfac, ekfac, bm25.", panel=_SCORES),
    ] = None,
    damping: Annotated[
        list[float] | None,
        o.option("--damping", help="A damping to choose from, on held-out queries; several times.", panel=_SCORES),
    ] = None,
    remove: Annotated[
        int | None,
        o.option("--remove", min=1, help="Retrain without the top N of each query (loss difference).", panel=_RETRAIN),
    ] = None,
    controls: Controls = 10,
    workers: Workers = 1,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Run methods on the bank's own model and compare them: LDS, loss difference, time, memory, a row each."""
    screen = Screen(quiet, json_output)
    chosen = list(method) if method else ["grad_dot", "kfac", "ekfac", "bm25"]
    for each in chosen:
        methods.get(each)
    with screen.session():
        opened = evaluate.Bank.open(bank)
        model = bank_model(opened)
        for each in chosen:
            dampings = (list(damping) if damping else list(evaluate.DAMPINGS)) if _has_damping(each) else [0.1]
            evaluate.run_row(opened, each, scorer(model, each), out / each, dampings, remove, controls, workers)
        rows = evaluate.read_rows(out, opened)
        noise = evaluate.bank_noise(opened)
    _show(screen, rows, noise)
    content = {"command": "evaluate board", "bank": opened.identity, "noise": noise, "rows": rows}
    _write(screen, out, content, rows, "board")
    if json_output:
        print(json.dumps(content))


# ------------------------------------------------------------------------------------------ shared


def _has_damping(name: str) -> bool:
    method = methods.get(name)
    return method.factors is not None or getattr(method, "solver", None) is not None


def bank_model(bank: evaluate.Bank) -> Any:
    """The fully trained model of a bank; trains it if it is not there."""
    from pyinf.data import load_model

    bank.build(evaluate.full(bank.protocol.train_size))
    return load_model(str(bank.directory / "model"), dtype="float32", device=getattr(bank.protocol, "device", "cpu"))


def scorer(model: Any, method: str, **options: Any) -> evaluate.board.Scorer:
    """A method of pyinf as a board calls it: fitted anew each time, so that its time is that of the whole."""

    def run(queries: list[Any], train: list[Any], dampings: Sequence[float]) -> dict[float, Any]:
        attributor = pyinf.Attributor(model, method=method, damping=dampings[0], **options)
        if len(dampings) == 1:
            return {dampings[0]: attributor.run(train, queries).total().double().numpy()}
        attributor.fit(train)
        found = attributor.score(queries, train, dampings=list(dampings))
        return {d: s.total().double().numpy() for d, s in found.items()}

    return run


def _protocol(name: str, settings: Sequence[str] | None = None) -> Any:
    if ":" not in name:
        return evaluate.ready_protocol(name, **_settings(name, settings or ()))
    if settings:
        raise ConfigError("--set is for the ready protocols; a protocol of your own has its settings in your code")
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as python -m has it
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import protocol {name!r}: {error}; give module:name, from this folder") from error
    found = found() if callable(found) else found
    if not isinstance(found, evaluate.Protocol):
        raise ConfigError(f"{name} is a {type(found).__name__}; it must be a pyinf.evaluate.Protocol, or make one")
    return found


def _settings(name: str, pairs: Sequence[str]) -> dict[str, Any]:
    kinds = {k: type(v) for k, v in vars(evaluate.ready_protocol(name)).items() if not k.startswith("_")}
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set {pair!r} is not of the form epochs=3")
        kind = kinds.get(key, str)
        try:
            found[key] = value if kind in (str, type(None)) else kind(value)
        except ValueError:
            raise ConfigError(f"--set {pair!r}: {key} takes a {kind.__name__}") from None
    return found


_HEADINGS = {
    "lds": "LDS",
    "lds_removal": "LDS 1 %",
    "lds_removal_other_seed": "LDS 1 %, other seed",
    "loo_spearman": "leave one out",
    "copies_spearman": "copies",
    "seconds": "seconds",
    "peak_mb": "MB",
}


def _show(screen: Screen, rows: Sequence[dict[str, Any]], noise: dict[str, Any]) -> None:
    if screen.quiet or screen.json_output:
        return
    names = list(dict.fromkeys(n for row in rows for n in row))
    values = [n for n in names if n in _HEADINGS or (n.startswith(("qld_", "flipped_")) and n.count("_") == 1)]
    labels = [r["name"] + ("" if r.get("damping") is None else f" (damping {r['damping']:g})") for r in rows]
    room = max(1, (screen.width - max(len(text) for text in labels) - 2) // 24)  # metrics side by side
    for start in range(0, len(values), room):
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("scores", no_wrap=True)
        for n in values[start : start + room]:
            table.add_column(_HEADINGS.get(n, n.replace("qld_", "loss +, top ").replace("flipped_", "flipped, top ")))
        for row, label in zip(rows, labels, strict=True):
            table.add_row(label, *(Text(_cell(row, n)) for n in values[start : start + room]))
        screen.table(table)
    half = noise.get("half")
    if half:
        screen.result(f"noise ceiling of LDS {half['ceiling']:.3f}; intervals: 95 %, over subsets and queries")


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name in ("seconds", "peak_mb"):
        return f"{value:.1f}" if name == "seconds" else f"{value:.0f}"
    if row.get(f"{name}_low") is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def _write(
    screen: Screen, out: Path | None, content: dict[str, Any], rows: Sequence[dict[str, Any]], stem: str
) -> None:
    if out is None:
        return
    artifacts.atomic_write_json(out / f"{stem}.json", content)
    artifacts.atomic_write_bytes(out / f"{stem}.csv", evaluate.to_csv(rows).encode())
    screen.result(f"written {out / f'{stem}.csv'}")
