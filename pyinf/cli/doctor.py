"""``pyinf doctor``: what runs here, and why not."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from pyinf.cli._terminal import guarded


@guarded
def doctor(
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the GPU kernels and compare them with float64.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say which backends run here, and why the others do not."""
    import pyinf

    found = pyinf.doctor(verify=verify)
    print(json.dumps(dataclasses.asdict(found), default=str) if json_output else found)
