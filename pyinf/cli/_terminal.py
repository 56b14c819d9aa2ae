"""What the terminal shows: progress with rate and time left, the plan, the strongest examples of each query."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pyinf import progress
from pyinf.errors import PyinfError
from pyinf.progress import NullSink, Stage

__all__ = ["Screen", "guarded"]

F = TypeVar("F", bound=Callable[..., Any])


def guarded(command: F) -> F:
    """A command whose errors are one or two lines on standard error and an exit code, not a traceback.

    ``PYINF_DEBUG=1`` lets the exception through.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("PYINF_DEBUG") == "1":
            return command(*args, **kwargs)
        try:
            return command(*args, **kwargs)
        except PyinfError as error:
            print(f"pyinf: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("pyinf: interrupted; the same command goes on where this one stopped", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
                raise
            print(
                "pyinf: out of memory; lower --token-budget or --batch-size, trace fewer --modules, set --query-rank",
                file=sys.stderr,
            )
            raise typer.Exit(7) from None

    return run  # type: ignore[return-value]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{_number(task.speed)} {task.fields['unit']}/s", style="cyan")


class _Done(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{int(task.total)}"
        return Text(f"{int(task.completed)}{total}", style="green")


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


class LiveSink:
    """Bars in a terminal, one a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Done(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            redirect_stdout=False,  # standard output carries results, --json above all
            redirect_stderr=False,
        )
        self._tasks: dict[int, Any] = {}

    def __enter__(self) -> LiveSink:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, stage: Stage) -> None:
        """A new bar."""
        self._tasks[id(stage)] = self._bars.add_task(stage.name, total=stage.total, unit=stage.unit)

    def advance(self, stage: Stage) -> None:
        """Move its bar."""
        self._bars.update(self._tasks[id(stage)], completed=stage.done)

    def end(self, stage: Stage) -> None:
        """Leave the bar as it stands."""
        task = self._tasks.pop(id(stage))
        self._bars.update(task, completed=stage.done, total=stage.total if stage.total is not None else stage.done)
        self._bars.stop_task(task)

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(Text(text, style="yellow"))


class LineSink:
    """Lines for a log file or a pipe: a stage's start, its state every ``interval`` seconds, its end."""

    def __init__(self, console: Console, interval: float = 10.0) -> None:
        self._console, self._interval = console, interval
        self._last: dict[int, float] = {}

    def __enter__(self) -> LineSink:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def start(self, stage: Stage) -> None:
        """Note the time."""
        self._last[id(stage)] = time.perf_counter()

    def advance(self, stage: Stage) -> None:
        """A line when the last one is long ago."""
        now = time.perf_counter()
        if now - self._last[id(stage)] < self._interval:
            return
        self._last[id(stage)] = now
        rate = stage.done / max(now - stage.started, 1e-9)
        of, left = "", ""
        if stage.total:
            of = f"/{stage.total:.0f}"
            left = f", {(stage.total - stage.done) / max(rate, 1e-9):.0f} s left"
        self._say(f"{stage.name}: {stage.done:.0f}{of} {stage.unit}, {_number(rate)}/s{left}")

    def end(self, stage: Stage) -> None:
        """One line with the time taken."""
        self._last.pop(id(stage), None)
        rate = stage.done / max(stage.seconds, 1e-9)
        self._say(f"{stage.name}: {stage.done:.0f} {stage.unit} in {stage.seconds:.1f} s ({_number(rate)}/s)")

    def note(self, text: str) -> None:
        """One line."""
        self._say(text)


class InnerSink(NullSink):
    """Stages inside one stage: each that ends is one unit of it."""

    def __init__(self, outer: Stage) -> None:
        self._outer = outer

    def end(self, stage: Stage) -> None:
        """Count it."""
        self._outer.advance(1)


class Screen:
    """Where a command writes: results on standard output, progress and plan on standard error; nothing when quiet."""

    def __init__(self, quiet: bool = False, json_output: bool = False) -> None:
        self.quiet, self.json_output = quiet, json_output
        self._out = Console(highlight=False, quiet=quiet)
        self._err = Console(stderr=True, highlight=False)

    @contextlib.contextmanager
    def session(self, together: bool = False) -> Iterator[Console]:
        """While work goes on: stages are shown, warnings become lines, other libraries keep quiet.

        ``together``: progress goes to standard output as well, for a command that writes there all along. Yields the
        console that results go to.
        """
        sink: Any = NullSink()
        console = self._out if together else self._err
        if not self.quiet:
            sink = LiveSink(console) if console.is_terminal else LineSink(console)
        with contextlib.ExitStack() as stack:
            if not self.quiet:
                stack.enter_context(sink)
            stack.enter_context(progress.use(sink))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("once")
            warnings.showwarning = lambda message, *_, **__: self.say(f"warning: {str(message).strip()}")
            _hush_libraries()
            yield self._out

    def say(self, text: str) -> None:
        """A line on standard error."""
        if not self.quiet:
            self._err.print(Text(text), soft_wrap=True)

    def result(self, text: str) -> None:
        """A line of the result."""
        if not (self.quiet or self.json_output):
            self._out.print(Text(text), soft_wrap=True)

    @property
    def width(self) -> int:
        """Columns that results have."""
        return self._out.width

    def table(self, table: Table) -> None:
        """A table of results."""
        if not (self.quiet or self.json_output):
            self._out.print(table)

    def plan(self, rows: Iterable[tuple[str, str]], notes: Iterable[str]) -> None:
        """The plan of the run, before it starts."""
        if self.quiet:
            return
        grid = Table.grid(padding=(0, 2))
        for name, value in rows:
            grid.add_row(Text(name, style="bold"), Text(value))
        self._err.print(grid)
        for line in notes:
            self._err.print(Text(f"· {line}", style="dim"), soft_wrap=True)

    def examples(self, title: str, rows: Iterable[tuple[str, int, float, str, str]]) -> None:
        """One query's strongest examples: rows of (side, index, score, labels, text)."""
        if self.quiet or self.json_output:
            return
        table = Table(title=Text(_one_line(title, 200)), title_justify="left", show_edge=False, pad_edge=False)
        rows = list(rows)
        label_width = max((min(20, len(labels)) for *_, labels, _ in rows), default=0)
        digits = max([5, *(len(str(index)) for _, index, *_ in rows)])
        # The text gives way in a narrow terminal, the numbers do not.
        room = self._out.width - (1 + 3 + digits + 3 + 10 + 3) - (max(5, label_width) + 3 if label_width else 0) - 1
        table.add_column("", no_wrap=True)
        table.add_column("train", no_wrap=True, justify="right", width=digits)
        table.add_column("score", no_wrap=True, justify="right", width=10)
        if label_width:
            table.add_column("label", no_wrap=True)
        table.add_column("text", no_wrap=True)
        for side, index, score, labels, text in rows:
            cells = [Text(side, style="green" if side == "+" else "red"), Text(str(index)), Text(f"{score:+.4g}")]
            line = Text(_one_line(text, 2000))
            line.truncate(max(20, room), overflow="ellipsis")
            table.add_row(*cells, *([Text(_one_line(labels, 20))] if label_width else []), line)
        self._out.print(table)
        self._out.print()


def _one_line(text: str, longest: int) -> str:
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _hush_libraries() -> None:
    """Other libraries' progress bars and chatter stay off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()
