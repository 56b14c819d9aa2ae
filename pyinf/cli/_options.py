"""Options that several commands share, each declared once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

__all__ = ["effective", "option", "read_config"]


def read_config(path: Path, names: dict[str, bool]) -> dict[str, Any]:
    """Options out of a YAML file; ``names`` maps each option that exists to whether it may stand several times.

    Scalars come back as text, so that they are read exactly as on the command line. Raises ``typer.BadParameter``
    naming the file and the key.
    """
    try:
        found = yaml.safe_load(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise typer.BadParameter(f"{path} is not YAML: {reason}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} must hold keys and values (model: …), not a {type(found).__name__}")
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it may hold {', '.join(sorted(names))}"
            raise typer.BadParameter(f"{path}: unknown key {str(key)!r}{hint}")
        if value is None:
            continue
        if names[name]:
            if isinstance(value, dict):
                value = [f"{left}={right}" for left, right in value.items()]
            items = value if isinstance(value, list) else [value]
            values[name] = [_scalar(item, path, name) for item in items]
        else:
            values[name] = _scalar(value, path, name)
    return values


def _scalar(value: Any, path: Path, name: str) -> str:
    if isinstance(value, (dict, list)):
        raise typer.BadParameter(f"{path}: key {name!r} takes one value, not a {type(value).__name__}")
    return str(value)


def _use_config(ctx: typer.Context, value: Path | None) -> Path | None:
    if value is None or ctx.resilient_parsing:
        return value
    names = {
        p.name: bool(getattr(p, "multiple", False)) for p in ctx.command.params if p.name and p.name not in _NOT_KEPT
    }
    ctx.default_map = {**(ctx.default_map or {}), **read_config(value, names)}
    return value


_NOT_KEPT = ("config", "help", "quiet", "json_output")


def effective(ctx: typer.Context) -> dict[str, Any]:
    """The options in force, as ``--config`` takes them: set ones only, local paths made absolute."""
    kept: dict[str, Any] = {}
    for name, value in ctx.params.items():
        if name in _NOT_KEPT or value is None or value == [] or value == ():
            continue
        if name in ("model", "train", "queries", "adapter", "tokenizer", "fit_dir", "out") and isinstance(
            value, (str, Path)
        ):
            place = Path(value).expanduser()
            value = str(place.absolute()) if name == "out" or place.exists() else str(value)
        kept[name] = list(value) if isinstance(value, tuple) else value
    return kept


_MODEL, _DATA, _METHOD, _WORK, _OUT = "Model", "Data", "Method", "Resources", "Output"


def option(*names: str, help: str, panel: str, **extra: Any) -> Any:
    """An option of the command line, shown under ``panel``."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **extra)


Model = Annotated[str, option("--model", help="Folder of the model, or its hub name.", panel=_MODEL)]
Adapter = Annotated[str | None, option("--adapter", help="Folder or hub name of a PEFT adapter.", panel=_MODEL)]
Tokenizer = Annotated[str | None, option("--tokenizer", help="Tokenizer, if not the model's.", panel=_MODEL)]
Revision = Annotated[str | None, option("--revision", help="Revision of a hub model.", panel=_MODEL)]
TrustRemoteCode = Annotated[
    bool, option("--trust-remote-code", help="Run code that the model brings. Read it first.", panel=_MODEL)
]
Device = Annotated[str, option("--device", help="auto, cpu, cuda, cuda:N.", panel=_MODEL)]
Dtype = Annotated[str, option("--dtype", help="auto (the checkpoint's), float32, bfloat16, …", panel=_MODEL)]

_SOURCES = "JSON lines, JSON, CSV, Parquet, text, a folder, a saved dataset or a hub name"
Train = Annotated[str, option("--train", help=f"Training data: {_SOURCES}.", panel=_DATA)]
Queries = Annotated[str, option("--queries", help="What the model said: the same formats.", panel=_DATA)]
Field = Annotated[
    list[str] | None, option("--field", help="What the files call a field: prompt=instruction.", panel=_DATA)
]
Limit = Annotated[int | None, option("--limit", min=1, help="Use the first N training rows.", panel=_DATA)]
QueryLimit = Annotated[int | None, option("--query-limit", min=1, help="Use the first N queries.", panel=_DATA)]
TrainSplit = Annotated[str | None, option("--train-split", help="Split of a training dataset.", panel=_DATA)]
QuerySplit = Annotated[str | None, option("--query-split", help="Split of a query dataset.", panel=_DATA)]
MaxLength = Annotated[int | None, option("--max-length", min=1, help="Cut sequences after N tokens.", panel=_DATA)]
Truncate = Annotated[bool, option("--truncate", help="Cut sequences at the model's positions.", panel=_DATA)]
PromptLoss = Annotated[bool, option("--prompt-loss", help="Count the prompt as well as the response.", panel=_DATA)]
Separator = Annotated[
    str | None, option("--separator", help="Between prompt and response (a space where none is).", panel=_DATA)
]
AddEos = Annotated[bool, option("--add-eos", help="Append the tokenizer's end token.", panel=_DATA)]
SkipEmpty = Annotated[bool, option("--skip-empty", help="Leave out rows without a token.", panel=_DATA)]

MethodName = Annotated[str, option("--method", help="How to attribute; see pyinf.methods().", panel=_METHOD)]
Modules = Annotated[
    list[str] | None, option("--modules", help="Layers to trace: a name or a glob; several times.", panel=_METHOD)
]
Damping = Annotated[float, option("--damping", help="λ, as a share of the mean eigenvalue of a layer.", panel=_METHOD)]
DampingMode = Annotated[str, option("--damping-mode", help="relative or absolute.", panel=_METHOD)]
Fisher = Annotated[str, option("--fisher", help="sampled labels, or the data's own: empirical.", panel=_METHOD)]
QueryRank = Annotated[
    str | None, option("--query-rank", help="Dense if not given; a rank; or a captured energy (0.99).", panel=_METHOD)
]
QueryBasis = Annotated[
    str | None,
    option("--query-basis", help="shared: all queries in one two-sided basis of --query-rank.", panel=_METHOD),
]
MethodOption = Annotated[
    list[str] | None,
    option(
        "--method-option",
        help="An option of the method's own, name=value: max_iterations=50; several times.",
        panel=_METHOD,
    ),
]
Tol = Annotated[
    float | None, option("--tol", help="Refine until residual and error bound are at most this.", panel=_METHOD)
]
Certify = Annotated[
    bool | None,
    option(
        "--certify/--no-certify",
        help="Measure certificates; default: where it costs no more than a tenth of the run.",
        panel=_METHOD,
    ),
]
Eigensolver = Annotated[str, option("--eigensolver", help="How eigenbases are computed.", panel=_METHOD)]
Seed = Annotated[int, option("--seed", help="Seed of everything drawn.", panel=_METHOD)]

BatchSize = Annotated[int | None, option("--batch-size", min=1, help="Sequences a batch, at most.", panel=_WORK)]
TokenBudget = Annotated[
    int | None, option("--token-budget", min=1, help="Padded tokens a batch, at most.", panel=_WORK)
]
MemoryBudget = Annotated[str | None, option("--memory-budget", help="Memory to stay within: 8GiB.", panel=_WORK)]
Cache = Annotated[str, option("--cache", help="Keep what layers saw: auto, memory, disk, none.", panel=_WORK)]
Backend = Annotated[str | None, option("--backend", help="Which kernels: auto, reference, torch, cpu, …", panel=_WORK)]

Out = Annotated[Path, option("--out", help="Folder of the run; the same run again goes on there.", panel=_OUT)]
Topk = Annotated[int, option("--topk", min=1, help="Examples shown a query, at each end.", panel=_OUT)]
Show = Annotated[int, option("--show", min=0, help="Queries shown in the terminal.", panel=_OUT)]
Report = Annotated[bool, option("--report/--no-report", help="Write the HTML report.", panel=_OUT)]
Config = Annotated[
    Path | None,
    option(
        "--config", help="YAML file of options; flags override it.", panel=_OUT, callback=_use_config, is_eager=True
    ),
]
Quiet = Annotated[bool, option("--quiet", "-q", help="Say nothing but errors.", panel=_OUT)]
Json = Annotated[bool, option("--json", help="Print a summary as JSON on standard output.", panel=_OUT)]
