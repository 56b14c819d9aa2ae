"""What a report holds, as plain data: written to JSON and read back strictly, independent of how it is drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyinf.errors import ArtifactError

__all__ = ["FORMAT", "VERSION", "ExampleReport", "Histogram", "QueryReport", "ReportData", "Table"]

FORMAT = "pyinf-report"
VERSION = 1

Cell = str | int | float | bool | None


@dataclass
class Histogram:
    """Distribution of one query's scores over all N training examples: ``counts[j]`` in ``[edges[j], edges[j+1]]``."""

    edges: list[float]
    counts: list[int]


@dataclass
class ExampleReport:
    """One training example that is shown for one query.

    ``rank`` counts from 1 at the highest score. ``token_scores`` has one number a token, in the unit of the score; None
    where the method has no per-token form. ``omitted_tokens`` counts those cut off at the end.
    """

    index: int
    score: float
    rank: int
    tokens: list[str]
    text: str
    token_scores: list[float] | None = None
    metadata: dict[str, Cell] = field(default_factory=dict)
    omitted_tokens: int = 0


@dataclass
class QueryReport:
    """One query: its tokens, which of them carry the loss, and what the training set has to say about it.

    ``histogram`` is None where only the largest scores were kept. ``module_shares`` is each module's share of the
    absolute scores of the shown proponents; the shares sum to 1.
    """

    index: int
    text: str
    tokens: list[str]
    counted: list[bool]
    top: list[ExampleReport]
    bottom: list[ExampleReport]
    histogram: Histogram | None = None
    module_shares: dict[str, float] = field(default_factory=dict)
    certificate: dict[str, Cell] | None = None
    metadata: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Table:
    """An extra table: as many cells in each row as there are columns."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass
class ReportData:
    """A whole report. ``stages`` are (name, seconds); ``plan`` and ``facts`` are rows of (name, value)."""

    title: str
    created: str
    model: str
    method: str
    formula: str
    train_size: int
    queries: list[QueryReport]
    options: dict[str, Cell] = field(default_factory=dict)
    plan: list[tuple[str, str]] = field(default_factory=list)
    stages: list[tuple[str, float]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    unit: str = "influence"

    def to_json(self) -> str:
        """Canonical JSON text. Raises ArtifactError where a number is not finite or a field has another type."""
        raw = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps(raw, ensure_ascii=False, indent=1, default=_refuse)
        ReportData.from_json(text)  # what is written can be read
        return text

    @classmethod
    def from_json(cls, text: str, source: str = "report") -> ReportData:
        """Read strictly: format, version, no missing and no unknown field, types, finite numbers, lengths that agree.

        Raises:
            ArtifactError: names ``source`` and the field.
        """
        try:
            raw = json.loads(text, parse_constant=lambda name: _bad(source, "a number", f"is {name}"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ArtifactError(f"{source} is not JSON ({error}); write the report again.") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ArtifactError(f'{source} is not a pyinf report: expected "format": "{FORMAT}".')
        if raw.get("version") != VERSION or isinstance(raw.get("version"), bool):
            raise ArtifactError(
                f"{source} has report version {raw.get('version')!r}, this pyinf reads {VERSION}; write it again."
            )
        body = {key: value for key, value in raw.items() if key not in ("format", "version")}
        data = _build(cls, body, source, "")
        _check(data, source)
        return data

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to ``path``, whole or not at all."""
        return write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReportData:
        """Read what ``save`` wrote. Raises ArtifactError as ``from_json`` does, or when there is no such file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"Cannot read the report {path}: {error}") from error
        return cls.from_json(text, str(path))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text under a temporary name, sync, rename: a killed run leaves no half file."""
    target = Path(path)
    # A lone surrogate has no UTF-8 form; it can only come from damaged input, and is shown as the replacement sign.
    payload = text.encode("utf-8", "replace")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ArtifactError(f"Cannot write {target}: {error}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; a report is meant to be handed on
        os.replace(temporary, target)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ArtifactError(f"Cannot write {target}: {error}") from error
    return target


def _refuse(value: Any) -> Any:
    raise ArtifactError(f"A report holds only plain values, not {type(value).__name__}: {str(value)[:60]!r}.")


def _bad(source: str, where: str, what: str) -> typing.NoReturn:
    raise ArtifactError(f"{source}: {where} {what}; write the report again.")


def _build(kind: Any, value: Any, source: str, where: str) -> Any:
    """``value`` as ``kind``, or an error that says where it does not fit."""
    label = where or "the report"
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            _bad(source, label, f"should be an object, not {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            _bad(source, label, f"has unknown fields {', '.join(unknown[:5])}")
        missing = sorted(set(hints) - set(value))
        if missing:
            _bad(source, label, f"lacks {', '.join(missing[:5])}")
        prefix = f"{where}." if where else ""
        return kind(**{key: _build(hints[key], item, source, prefix + key) for key, item in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        if not isinstance(value, list):
            _bad(source, label, f"should be a list, not {type(value).__name__}")
        return [_build(arguments[0], item, source, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(arguments):
            _bad(source, label, f"should be a list of {len(arguments)}")
        pairs = zip(arguments, value, strict=True)
        return tuple(_build(part, item, source, f"{where}[{i}]") for i, (part, item) in enumerate(pairs))
    if origin is dict:
        if not isinstance(value, dict):
            _bad(source, label, f"should be an object, not {type(value).__name__}")
        return {key: _build(arguments[1], item, source, f"{where}.{key}") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        if len(options) == 1:
            return _build(options[0], value, source, where)
        if type(value) not in options:
            _bad(source, label, f"has the type {type(value).__name__}")
        return _build(type(value), value, source, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        _bad(source, label, f"should be {kind.__name__}, not {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        _bad(source, label, "is not finite")
    return value


def _check(data: ReportData, source: str) -> None:
    """Lengths that must agree."""
    for q, query in enumerate(data.queries):
        where = f"queries[{q}]"
        if len(query.tokens) != len(query.counted):
            _bad(source, where, f"has {len(query.tokens)} tokens and {len(query.counted)} loss marks")
        if (plot := query.histogram) is not None:
            if len(plot.edges) != len(plot.counts) + 1:
                _bad(source, f"{where}.histogram", "needs one edge more than counts")
            if sorted(plot.edges) != plot.edges or min(plot.counts, default=0) < 0:
                _bad(source, f"{where}.histogram", "needs rising edges and counts ≥ 0")
        for side in ("top", "bottom"):
            for e, example in enumerate(getattr(query, side)):
                if example.token_scores is not None and len(example.token_scores) != len(example.tokens):
                    _bad(source, f"{where}.{side}[{e}]", "needs one token score a token")
    for t, table in enumerate(data.tables):
        if any(len(row) != len(table.columns) for row in table.rows):
            _bad(source, f"tables[{t}]", "has rows of another length than its columns")
