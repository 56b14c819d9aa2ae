"""Fill the generated parts of docs/ from the program itself: ``python tools/cli_docs.py [--check]``.

A block between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is rewritten: option tables and exit codes from the
command line, methods from their registry, operations from their signatures, docstrings, schemas and backends.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body])


# ------------------------------------------------------------------------------------------ command line


def _value(kind: Any) -> str:
    """What an option takes, as its type says it; empty for a flag."""
    inner = [t for t in typing.get_args(kind) if t is not type(None)]
    if inner:
        kind = inner[0] if typing.get_origin(kind) is not list else kind
    if typing.get_origin(kind) is list:
        return "TEXT, several times"
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "required"
    if value is None:
        return ""
    return ("on" if value else "off") if isinstance(value, bool) else f"`{value}`"


def _options(function: Callable[..., Any]) -> str:
    hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    groups: dict[str, list[list[str]]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *extra = typing.get_args(hints[name]) or [hints[name]]
        if not extra:
            continue  # typer's context
        info = extra[0]
        # In an Annotated option typer keeps the first flag where a default would stand.
        flags = [flag for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str)]
        label = ", ".join(f"`{flag}`" for flag in flags) if flags else f"`{name.upper()}`"
        taken = _value(kind) if flags else ""
        row = [label + (f" {taken}" if taken else ""), _default(parameter), info.help or ""]
        groups.setdefault(info.rich_help_panel or "", []).append(row)
    out = []
    for panel, rows in groups.items():
        out += [f"**{panel}**", ""] if panel else []
        out += [_table(["option", "default", "what it does"], rows), ""]
    return "\n".join(out).rstrip()


def _commands() -> dict[str, Callable[..., Any]]:
    from pyinf.cli import app

    found = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    for group in app.registered_groups:
        inner = group.typer_instance
        found |= {f"{inner.info.name} {c.name or c.callback.__name__}": c.callback for c in inner.registered_commands}
    return found


def commands() -> str:
    """Every command with its summary and its options."""
    parts = []
    for name, function in _commands().items():
        parts += [f"### pyinf {name}", "", inspect.getdoc(function) or "", "", _options(function), ""]
    return "\n".join(parts).rstrip()


def exit_codes() -> str:
    """Exit codes, from the classes of errors."""
    from pyinf import errors

    rows = [["0", "", "It worked."]]
    classes = [getattr(errors, name) for name in errors.__all__]
    classes = sorted(classes, key=lambda c: c.exit_code)
    for error in classes:
        if error is errors.PyinfError:
            rows.append(["1", "`PyinfError`", "Anything else that went wrong; a traceback says that it is a bug."])
        elif error is not errors.ModuleSelectionError:
            rows.append([str(error.exit_code), f"`{error.__name__}`", _one_line(inspect.getdoc(error) or "")])
    rows.append(["2", "", "Wrong usage: an unknown option, a missing or ill-typed value, a bad `--config` file."])
    rows.append(["130", "", "Interrupted with Ctrl-C; the same command goes on where this one stopped."])
    return _table(["code", "error", "when"], sorted(rows, key=lambda row: int(row[0])))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------ methods, operations


def methods() -> str:
    """The registered methods."""
    from pyinf.methods import METHODS

    rows = [[f"`{m.name}`", m.summary, m.source, m.needs] for m in METHODS.values()]
    return _table(["method", "what it is", "source", "needs"], rows)


def eigensolvers() -> str:
    """The eigensolvers."""
    from pyinf.curvature import EIGENSOLVERS

    return _table(["`eigensolver`", "what it is"], [[f"`{name}`", text] for name, text in EIGENSOLVERS.items()])


def method_options() -> str:
    """The options that methods have of their own."""
    from pyinf.methods import METHODS

    rows: dict[tuple[str, str, str], list[str]] = {}
    for method in METHODS.values():
        for name, option in method.options.items():
            rows.setdefault((name, str(option.default), option.help), []).append(f"`{method.name}`")
    body = [[f"`{n}`", f"`{d}`", text, ", ".join(methods)] for (n, d, text), methods in rows.items()]
    return _table(["option", "default", "what it is", "methods"], body)


def measured_block_cg() -> str:
    """The committed measurement of block conjugate gradients."""
    import json

    path = ROOT / "benchmarks" / "results" / "solve" / "block_cg.json"
    if not path.is_file():
        return "*not measured: benchmarks/results/solve/block_cg.json is not there*"
    data = json.loads(path.read_text())
    names = ["solver", "queries", "products", "iterations", "solved", "seconds"]
    body = [[str(row[n]) for n in names] for row in data["rows"]]
    text = (
        f"{data['model']}, {data['train']} training sequences ({data['tokens']:,} tokens), damping {data['damping']}, "
        f"to a true relative residual of {data['tol']}, {data['dtype']}, threads: {data['threads']}, torch "
        f"{data['torch']}. `ekfac_cg` takes {data['products_ratio']:.2f} of the products of plain CG, and "
        f"{data['queries']} queries at once take {data['seconds_ratio']:.2f} of the time of one at a time."
    )
    return f"{_table(names, body)}\n\n{text}"


def measured_eigensolvers() -> str:
    """The committed measurement of the eigensolvers."""
    import csv
    import json

    folder = ROOT / "benchmarks" / "results" / "eigen"
    if not (folder / "eigensolvers.csv").is_file():
        return "*not measured: benchmarks/results/eigen/eigensolvers.csv is not there*"
    with (folder / "eigensolvers.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    facts = json.loads((folder / "eigensolvers.json").read_text())
    llama = facts["llama"]
    good = ", ".join(f"`{name}`" for name in facts["faster_than_auto_and_as_good"]) or "none"
    text = (
        f"Llama of {llama['layers']} layers, d = {llama['hidden']}, MLP {llama['intermediate']}, vocabulary "
        f"{facts['vocabulary']}; {facts['train']} training sequences of docstrings, {facts['train_tokens']:,} tokens, "
        f"{facts['queries']} queries; {facts['repeats']} interleaved repetitions; threads: {facts['threads']}, "
        f"{facts['cpu']}, torch {facts['torch']}. Faster than `auto` on both models with every Pearson at 0.999 or "
        f"more: {good}."
    )
    return _table(rows[0], rows[1:]) + "\n\n" + text


def ops() -> str:
    """Every public operation: signature, docstring, registered form, backends."""
    import pyinf.ops as public
    from pyinf.ops import api, api_projection, quantise, registry
    from pyinf.ops.schemas import SCHEMAS

    parts = []
    for module in (api, api_projection, quantise):
        for name in module.__all__:
            function = getattr(public, name, None)
            if function is None:
                continue
            parts += [f"### {name}", "", "```python", _signature(name, function), "```", ""]
            parts += [_markdown(inspect.getdoc(function) or ""), ""]
            if name in SCHEMAS:
                backends = [i.backend for i in registry._implementations[name]]
                parts += [f"Registered as `torch.ops.pyinf.{name}{SCHEMAS[name]}`.", ""]
                parts += [f"Backends: {', '.join(backends)}.", ""]
    return "\n".join(parts).rstrip()


def _markdown(docstring: str) -> str:
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", docstring).replace("``", "`")


def _signature(name: str, function: Callable[..., Any]) -> str:
    pieces = []
    for parameter in inspect.signature(function).parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        pieces.append(parameter.name + default)
    return "\n".join(textwrap.wrap(f"pyinf.ops.{name}({', '.join(pieces)})", 110, subsequent_indent="    "))


# ------------------------------------------------------------------------------------------ files


def measured_convergence() -> str:
    """LDS of the iterates of refinement, a row a damping."""
    import csv

    path = ROOT / "benchmarks" / "results" / "board" / "convergence.csv"
    if not path.is_file():
        return "*not measured: benchmarks/results/board/convergence.csv is not there*"
    with path.open(newline="") as handle:
        found = {(float(r["damping"]), int(r["iteration"])): float(r["lds"]) for r in csv.DictReader(handle)}
    iterations = sorted({i for _, i in found})
    body = [
        [f"{damping:g}", *(f"{found[damping, i]:.3f}" if (damping, i) in found else "" for i in iterations)]
        for damping in sorted({d for d, _ in found})
    ]
    said = "LDS on the 10 tuning queries (`python -m benchmarks.board.convergence`); iteration 0: EK-FAC."
    return f"{_table(['damping', *(f'iteration {i}' for i in iterations)], body)}\n\n{said}"


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "exit-codes": exit_codes,
    "methods": methods,
    "method-options": method_options,
    "measured-block-cg": measured_block_cg,
    "measured-convergence": measured_convergence,
    "eigensolvers": eigensolvers,
    "measured-eigensolvers": measured_eigensolvers,
    "ops": ops,
}


def render(text: str) -> str:
    """The page with every block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[4]}", text)


def main() -> int:
    """Rewrite the pages, or with ``--check`` only say which are out of date."""
    sys.path.insert(0, str(ROOT))
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = render(old)
        if new == old:
            continue
        stale.append(path.name)
        if "--check" not in sys.argv[1:]:
            path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in sys.argv[1:] else 'rewritten'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
