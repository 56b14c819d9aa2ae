"""Rows of a small sentiment task, and a runner of the command line."""

from __future__ import annotations

import json

from typer.testing import CliRunner

WORDS = ["happy", "sad", "angry", "calm"]


def rows(count: int, start: int = 0) -> list[dict]:
    made = []
    for i in range(start, start + count):
        word = WORDS[i % 4]
        made.append({"prompt": f"Determine the sentiment: i feel {word} {i}", "response": word, "label": word})
    return made


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*arguments):
    """The result of one command; its exit code, ``stdout`` and ``stderr``."""
    from pyinf.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pyinf")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words(text: str) -> str:
    """The text without the frame that usage errors are drawn in."""
    return " ".join("".join(c for c in text if c not in "│╭╮╰╯─").split())
