"""What a store is on disk: its specification, its manifest, and the files of a shard.

A store is a directory. ``manifest.json`` (format ``pyinf.store``) carries the specification, the shards in the order of
their rows, and size and SHA-256 of every file. A shard ``NAME`` is up to four files, each a flat array:

- ``NAME.rows``: ``rows × row_bytes`` bytes (:mod:`pyinf.store.quantise`);
- ``NAME.ids``: int64, one a row (per sequence) or two a row (per token: sequence, position);
- ``NAME.norms``: float32, one a row, where the store keeps norms;
- ``NAME.documents`` and ``NAME.lines``, where it keeps documents: JSON lines, and where each begins (uint64, rows + 1
  of them; two equal ones: no document beside that row).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pyinf import artifacts
from pyinf._version import __version__
from pyinf.errors import ArtifactError, ConfigError
from pyinf.store.quantise import FORMATS, row_bytes
from pyinf.store.sections import Section

__all__ = ["FORMAT", "GRANULARITIES", "VERSION", "Manifest", "Shard", "StoreSpec", "read", "shard_files", "write"]

FORMAT = "pyinf.store"
VERSION = 1
GRANULARITIES = ("sequence", "token")
JOURNAL = "journal.json"
LOCK = "lock"
_REMEDY = "delete the store and build it again"


@dataclass(frozen=True)
class StoreSpec:
    """What the rows of a store are; two stores with equal specifications (but for ``data``) can be merged.

    compressor, settings: which compressor made the rows, and its settings (JSON); its tensors are kept beside.
    sections, format, granularity: columns, format of a row, one row a "sequence" or a "token".
    norms, documents: whether these are kept beside the rows.
    model, data, task: fingerprints, or None where unknown. damping: λ as the compressor uses it, or None.
    meta: anything else in JSON. pyinf: the version that wrote it.
    Raises ``ConfigError`` for an unknown format or granularity, or no sections.
    """

    compressor: str
    sections: Sequence[Section]
    format: str = "bfloat16"
    granularity: str = "sequence"
    settings: Mapping[str, Any] = field(default_factory=dict)
    norms: bool = False
    documents: bool = False
    model: str | None = None
    data: str | None = None
    task: str | None = None
    damping: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    pyinf: str = __version__

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}; choose one of: {', '.join(FORMATS)}")
        if self.granularity not in GRANULARITIES:
            raise ConfigError(f"unknown granularity {self.granularity!r}; choose one of: {', '.join(GRANULARITIES)}")
        object.__setattr__(self, "sections", list(self.sections))
        if not self.sections:
            raise ConfigError("a store needs at least one section")
        at = 0
        for section in self.sections:
            if section.offset != at:
                raise ConfigError(f"section {section.name!r} begins at column {section.offset}, expected {at}")
            at = section.stop

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return row_bytes(self.sections, self.format)

    @property
    def id_width(self) -> int:
        """Integers of an id: 1 (sequence), or 2 (sequence, position)."""
        return 2 if self.granularity == "token" else 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["sections"] = [section.to_dict() for section in self.sections]
        data["settings"], data["meta"] = dict(self.settings), dict(self.meta)
        try:
            return json.loads(json.dumps(data, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"settings and meta of a store must be JSON: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StoreSpec:
        """The inverse of :meth:`to_dict`; unknown and missing keys are a ``ConfigError``."""
        wanted = {f.name for f in fields(cls)}
        if set(data) != wanted:
            raise ConfigError(f"specification has other keys than expected: {sorted(wanted ^ set(data))}")
        return cls(**{**data, "sections": [Section.from_dict(s) for s in data["sections"]]})

    def differences(self, other: StoreSpec, ignore: Sequence[str] = ("pyinf", "meta")) -> list[str]:
        """What ``other`` has differently, one line each; ``ignore`` is not compared."""
        mine, theirs = self.to_dict(), other.to_dict()
        for key in ignore:
            mine.pop(key), theirs.pop(key)
        return artifacts.differences(mine, theirs)

    def with_settings(self, settings: Mapping[str, Any]) -> StoreSpec:
        """The same with other settings of the compressor."""
        return replace(self, settings=dict(settings))


class Shard(NamedTuple):
    """One shard: its name, its rows, and the first of them in the store."""

    name: str
    rows: int
    first: int


@dataclass
class Manifest:
    """``manifest.json``: specification, shards, files, the file of the compressor's tensors (None: it has none).

    ``serial`` numbers the next file, ``finished`` ends a build.
    """

    spec: StoreSpec
    shards: list[Shard] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    serial: int = 0
    finished: bool = False
    tensors: str | None = None

    @property
    def count(self) -> int:
        """Rows of all shards."""
        return self.shards[-1].first + self.shards[-1].rows if self.shards else 0

    def add(self, name: str, rows: int, files: Mapping[str, dict[str, Any]]) -> None:
        """Append a shard."""
        self.shards.append(Shard(name, rows, self.count))
        self.files.update(files)


def suffixes(spec: StoreSpec) -> list[str]:
    """Which files a shard has."""
    found = ["rows", "ids"]
    if spec.norms:
        found.append("norms")
    if spec.documents:
        found += ["documents", "lines"]
    return found


def shard_files(spec: StoreSpec, name: str) -> dict[str, str]:
    """Suffix → file name of a shard."""
    return {suffix: f"{name}.{suffix}" for suffix in suffixes(spec)}


def expected_bytes(spec: StoreSpec, suffix: str, rows: int) -> int | None:
    """Size of a shard's file with so many rows; None where it depends on the content."""
    sizes = {"rows": spec.row_bytes * rows, "ids": 8 * spec.id_width * rows, "norms": 4 * rows, "lines": 8 * (rows + 1)}
    return sizes.get(suffix)


def shard_name(serial: int) -> str:
    """Name of a shard."""
    return f"shard-{serial:06d}"


def write(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, whole or not at all."""
    content = {
        "spec": manifest.spec.to_dict(),
        "shards": [[shard.name, shard.rows] for shard in manifest.shards],
        "count": manifest.count,
        "serial": manifest.serial,
        "finished": manifest.finished,
        "tensors": manifest.tensors,
        "byteorder": "little",
    }
    artifacts.write_manifest(directory, FORMAT, VERSION, content, manifest.files)


def read(directory: Path) -> Manifest:
    """Read ``manifest.json`` and check that it makes sense; sizes of the files are checked by the reader.

    Raises ``ArtifactError`` naming what is wrong: no store, a store of a later version, a manifest that was changed.
    """
    found = artifacts.read_manifest(directory, FORMAT, VERSION)
    path = Path(directory) / artifacts.MANIFEST_NAME
    try:
        spec = StoreSpec.from_dict(found["spec"])
        manifest = Manifest(spec, [], found["files"], int(found["serial"]), bool(found["finished"]), found["tensors"])
        if manifest.tensors is not None and manifest.tensors not in manifest.files:
            raise ValueError(f"the tensors {manifest.tensors!r} are not among the files")
        for name, rows in found["shards"]:
            if type(rows) is not int or rows < 1:
                raise ValueError(f"shard {name!r} has {rows!r} rows")
            for suffix, file in shard_files(manifest.spec, name).items():
                size, wanted = found["files"][file]["bytes"], expected_bytes(manifest.spec, suffix, rows)
                if wanted is not None and size != wanted:
                    raise ValueError(f"{file} has {size} bytes where {rows} rows need {wanted}")
            manifest.shards.append(Shard(name, rows, manifest.count))
        if found["count"] != manifest.count or found["byteorder"] != "little":
            raise ValueError("count or byte order do not fit")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"manifest {path} is damaged: {error}; {_REMEDY}") from error
    return manifest


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Every file has the size that the manifest says. Raises ``ArtifactError`` naming the first that has not."""
    for name, info in manifest.files.items():
        path = artifacts.resolve_file(directory, name)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ArtifactError(f"{path} is missing; {_REMEDY}, or bring the file back") from error
        if size != info["bytes"]:
            raise ArtifactError(f"{path} is damaged: expected {info['bytes']} bytes, found {size}; {_REMEDY}")
