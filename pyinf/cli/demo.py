"""``pyinf demo``: the whole story on one small model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyinf.cli._terminal import Screen, guarded


@guarded
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the model, the data and the report.")] = Path(
        "demo-run"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Train a small model with 16 planted falsehoods, ask it, and find them by attribution. No download."""
    from pyinf import demo as demos

    screen = Screen(quiet)
    with screen.session():
        demos.run(out)
