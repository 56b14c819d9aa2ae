"""``pyinf report``: the page of a finished run, written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyinf.cli._terminal import Screen, guarded
from pyinf.errors import ArtifactError


@guarded
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its report.json.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the page.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Write the HTML report of a finished run again, from its report.json."""
    from pyinf import report as reports

    source = run / "report.json" if run.is_dir() else run
    if not source.exists():
        raise ArtifactError(f"{source} is missing; give the --out folder of a finished pyinf attribute run")
    page = out if out is not None else source.with_suffix(".html")
    data = reports.ReportData.load(source)
    reports.write_html(data, page)
    screen = Screen(quiet, json_output)
    screen.result(f"report  {page}")
    if json_output:
        print(json.dumps({"command": "report", "report": str(page), "queries": len(data.queries)}))
