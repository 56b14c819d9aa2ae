"""The command line: one thin file a command. ``pyinf.cli:main`` is the entry point."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pyinf._version import __version__
from pyinf.cli.attribute import attribute
from pyinf.cli.bench import bench
from pyinf.cli.demo import demo
from pyinf.cli.doctor import doctor
from pyinf.cli.evaluate import app as evaluate
from pyinf.cli.fit import fit
from pyinf.cli.report import report
from pyinf.cli.score import score
from pyinf.cli.serve import serve
from pyinf.cli.store import app as store

__all__ = ["app", "main"]

app = typer.Typer(
    name="pyinf",
    help="Which training data made the model say this? Influence functions for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (attribute, fit, score, report, serve, bench, doctor, demo):
    app.command()(_command)
app.add_typer(evaluate)
app.add_typer(store)


def _version(value: bool) -> None:
    if value:
        print(f"pyinf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, the ``exit_code`` of a PyinfError, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        app(args=None if argv is None else list(argv), prog_name="pyinf")
    except KeyboardInterrupt:
        sys.exit(130)
