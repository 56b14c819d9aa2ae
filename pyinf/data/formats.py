"""Rows out of files: JSON lines, JSON, CSV, Parquet, plain text, folders of those, saved ``datasets``, hub names.

Every reader yields ``(place, record)``: ``place`` says where the row stands ("line 3"), for error messages; ``record``
is a plain dict whose values are JSON values (NaN becomes None, dates and the like become text). Whatever is wrong with
a file is a :class:`~pyinf.errors.DataError` naming the file and the line.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyinf.errors import DataError

__all__ = ["ENDINGS", "read_rows"]

Row = tuple[str, dict[str, Any]]

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "zip"}


def read_rows(source: str | Path, split: str | None = None, revision: str | None = None) -> Iterator[Row]:
    """Rows of a local file or folder, or of a dataset on the Hugging Face hub when nothing local has that name.

    The ending of a file decides how it is read (:data:`ENDINGS`). A plain-text file is cut at its blank lines into one
    document a block; a folder of text files is one document a file; a folder of any one other kind is read file after
    file, in the order of the names. ``split`` picks a split of a saved or hub dataset (the only one, or ``train``).
    """
    path = Path(source).expanduser()
    if not str(source).strip():
        raise DataError("the name of a data file is empty; give a path or a hub name")
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a NUL, or a name too long for the file system
        raise DataError(f"cannot read {str(source)!r}: {error}") from error
    if is_dir:
        yield from _folder(path, split)
    elif is_file:
        yield from _reader(path)(path)
    elif path.suffix.lower() in ENDINGS or len(str(source)) > 200 or not _HUB_NAME.match(str(source)):
        raise DataError(f"no file {path}{_nearest_file(path)}")
    else:
        yield from _hub(str(source), split, revision)


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f": there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; nearest there: {', '.join(near)}" if near else "; check the path"


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(f"{path}: unknown ending {ending or '(none)'!r}; it may be one of {', '.join(sorted(ENDINGS))}")
    return ENDINGS[ending]


# ------------------------------------------------------------------------------------------ values


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def plain_record(value: Any, where: str) -> dict[str, Any]:
    """``value`` as a record, or a DataError that says what stands there instead."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected an object with fields, found a {_kind(value)}")
    return {str(key): _plain(inner) for key, inner in value.items()}


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "text", list: "list", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


# ------------------------------------------------------------------------------------------ files


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _encoding_error(path: Path, where: str, start: bytes) -> DataError:
    looks = next((f" (it looks like {name})" for bom, name in _BOMS.items() if start.startswith(bom)), "")
    return DataError(f"{path}{where} is not UTF-8{looks}; save it as UTF-8 text")


def _text(path: Path) -> str:
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _encoding_error(path, f", line {line},", data[:4]) from error


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_lines(path: Path) -> Iterator[Row]:
    try:
        handle = open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    with handle:
        start = b""
        for number, raw in enumerate(handle, 1):
            if number == 1:
                start = raw[:4]
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _encoding_error(path, f", line {number},", start) from error
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({_json_reason(error)}); one object a line"
                ) from error
            yield f"line {number}", plain_record(value, f"{path}, line {number}")


def _json(path: Path) -> Iterator[Row]:
    text = _text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the wrong ending
            yield from _json_lines(path)
            return
        raise DataError(f"{path}, line {error.lineno}: not JSON ({_json_reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({_json_reason(error)})") from error
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects, found a {_kind(value)}; or use JSON lines")
    for number, item in enumerate(value, 1):
        yield f"item {number}", plain_record(item, f"{path}, item {number}")


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    text = _text(path)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows: list[tuple[int, list[str]]] = []
        try:
            rows.extend((reader.line_num, row) for row in reader if row)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        return
    header = rows[0][1]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}, line 1: column {twice[0]!r} stands twice; the first line must name the columns")
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(row)} fields, but line 1 names {len(header)} columns; "
                f"quote fields that hold {delimiter!r}"
            )
        yield f"line {number}", dict(zip(header, row, strict=True))


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, "\t")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow; install it: pip install 'pyinf[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for item in batch.to_pylist():
                    number += 1
                    yield f"row {number}", plain_record(item, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged or not Parquet: {_first_line(error)}") from error


def _blocks(path: Path) -> Iterator[Row]:
    block: list[str] = []
    first = 1
    for number, line in enumerate([*_text(path).splitlines(), ""], 1):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield f"line {first}", {"text": "\n".join(block), "line": first}
            block = []


ENDINGS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _blocks,
    ".text": _blocks,
    ".md": _blocks,
}


# ------------------------------------------------------------------------------------------ folders, datasets


def _folder(path: Path, split: str | None) -> Iterator[Row]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _saved_dataset(path, split)
        return
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in ENDINGS)
    readers = {ENDINGS[p.suffix.lower()] for p in files}
    if not files:
        raise DataError(f"{path} holds no data file; it may hold {', '.join(sorted(ENDINGS))} files or a saved dataset")
    if len(readers) > 1:
        raise DataError(f"{path} holds files of several kinds ({files[0].name}, {files[-1].name}); name one of them")
    for file in files:
        if readers == {_blocks}:
            yield file.name, {"text": _text(file), "file": file.name}
        else:
            yield from ((f"{file.name}, {place}", record) for place, record in _reader(file)(file))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("reading a dataset folder or hub name needs datasets: pip install 'pyinf[data]'") from error
    return datasets


def _pick_split(data: Any, split: str | None, name: str) -> Any:
    splits = list(data) if isinstance(data, Mapping) else None
    if splits is None:
        if split is not None:
            raise DataError(f"{name} has no splits, but split {split!r} was asked for")
        return data
    split = split or (splits[0] if len(splits) == 1 else "train")
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(map(str, splits))}")
    return data[split]


def _dataset_rows(data: Iterable[Any], name: str) -> Iterator[Row]:
    for number, item in enumerate(data, 1):
        yield f"row {number}", plain_record(item, f"{name}, row {number}")


def _saved_dataset(path: Path, split: str | None) -> Iterator[Row]:
    datasets = _datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes that library raise
        raise DataError(f"{path} is damaged or not a saved dataset: {_first_line(error)}") from error
    data = _pick_split(data, split, str(path))
    try:
        yield from _dataset_rows(data, str(path))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} is damaged: {_first_line(error)}") from error


def _hub(name: str, split: str | None, revision: str | None) -> Iterator[Row]:
    try:
        datasets = _datasets()
    except DataError as error:
        raise DataError(f"no file {name}; as a hub name it needs datasets: pip install 'pyinf[data]'") from error
    # datasets ≥ 4 cannot run code of the dataset's own; before that it has to be told not to.
    old = datasets.__version__.split(".")[0] in ("2", "3")
    try:
        data = datasets.load_dataset(name, revision=revision, **({"trust_remote_code": False} if old else {}))
    except Exception as error:  # network, missing name, damaged files: one message, the reason kept
        raise DataError(
            f"no file or folder {name!r}, and no dataset of that name could be loaded from the hub "
            f"({_first_line(error)}); give a path, or check the name and the network"
        ) from error
    yield from _dataset_rows(_pick_split(data, split, name), name)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__
