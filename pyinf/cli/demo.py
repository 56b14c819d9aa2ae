"""``pyinf demo``: the whole story on one small model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyinf.cli._terminal import Screen, guarded
from pyinf.data.models import resolve_device


@guarded
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for model, data and report.")] = Path("demo-run"),
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: every step, in seconds, little learnt.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Train a small model with 16 planted falsehoods, ask it, and find them by attribution. No download."""
    from pyinf import demo as demos

    place = resolve_device(device)
    with Screen(quiet).session(together=True) as console:
        demos.run(out, quick=quick, console=console, device=place)
