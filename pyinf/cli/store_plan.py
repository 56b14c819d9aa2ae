"""``pyinf store plan``: how many coordinates each layer needs, and the error to expect, before a store is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from pyinf.cli import _options as o
from pyinf.cli._terminal import Screen, guarded
from pyinf.curvature import Factors, check_damping
from pyinf.store.choose_k import choose_k

__all__ = ["plan"]

_PANEL = "Projection"


@guarded
def plan(
    fit_dir: Annotated[Path, typer.Argument(help="Folder of a pyinf fit, or of its factors.")],
    damping: o.Damping = 0.1,
    damping_mode: o.DampingMode = "relative",
    target: Annotated[
        list[float] | None,
        typer.Option(
            "--target",
            help="Correlation with unprojected scores; several times. 0.9, 0.95, 0.99 if not given.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option("--kind", help="flat, two_sided (LoGra) or top (leading eigenvectors).", rich_help_panel=_PANEL),
    ] = "flat",
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """How many coordinates each layer needs for a given agreement with unprojected scores."""
    screen = Screen(quiet, json_output)
    with screen.session():
        check_damping(damping, damping_mode)
        inner = fit_dir / "fit" / "factors"
        factors = Factors.load(inner if inner.is_dir() else fit_dir)
        targets = tuple(sorted(set(target))) if target else (0.9, 0.95, 0.99)
        found = choose_k(factors, damping, damping_mode, targets, kind)
    head, *lines = found.table()
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(head):
        table.add_column(Text(name), justify="left" if number == 0 else "right")
    for line in lines:
        table.add_row(*map(Text, line))
    screen.table(table)
    for t in targets:
        screen.result(f"{t:g}: {found.row_values(t):,} values a row, layer by layer")
    if json_output:
        row_values = {f"{t:g}": found.row_values(t) for t in targets}
        print(
            json.dumps({"damping": damping, "damping_mode": damping_mode, "row_values": row_values, **found.to_dict()})
        )
