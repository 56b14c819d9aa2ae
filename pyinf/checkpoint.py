"""Unfinished work on disk, such that a run killed at any moment goes on from its last complete state."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from pyinf import artifacts

__all__ = ["Checkpoint"]

_STATE_FORMAT = "pyinf.state"
_STATE_VERSION = 1
_SHARD_BYTES = 1 << 30


class Checkpoint:
    """Unfinished work on disk: named sets of tensor shards and one small state file that says which of them count.

    Shards are written under fresh names and only then does the state file, replaced atomically, point at them; a run
    killed at any moment therefore finds the last complete state.
    """

    def __init__(self, directory: Path, interval: float = 60.0) -> None:
        self.directory, self.interval = Path(directory), interval
        self.directory.mkdir(parents=True, exist_ok=True)
        self._serial = 0
        self._sets: dict[str, dict[str, Any]] = {}
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
        """The last complete state (stage, batch, extras) and its tensor sets, or None."""
        if not (self.directory / artifacts.MANIFEST_NAME).exists():
            return None
        manifest = artifacts.read_manifest(self.directory, _STATE_FORMAT, _STATE_VERSION)
        self._serial, self._sets = int(manifest["serial"]), manifest["sets"]
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, files in self._sets.items():
            tensors[name] = {}
            for file in files:
                path = artifacts.resolve_file(self.directory, file)
                loaded = artifacts.load_tensors(path, manifest["files"][file])
                # clone: a memory map is not aligned as an allocation is, and alignment may change the last bit
                tensors[name] |= {key: value.clone() for key, value in loaded.items()}
        return manifest["state"], tensors

    def due(self) -> bool:
        """Whether enough time has gone by since the last save."""
        return time.monotonic() - self._last >= self.interval

    def save(self, state: dict[str, Any], drop: tuple[str, ...] = (), **sets: dict[str, Tensor]) -> None:
        """Write ``sets`` (others are kept as they stand, ``drop`` is forgotten) and make ``state`` the current one."""
        self._serial += 1
        kept = {name: files for name, files in self._sets.items() if name not in sets and name not in drop}
        for name, tensors in sets.items():
            kept[name] = self._write_shards(name, tensors)
        stale = {f for name, files in self._sets.items() for f in files if kept.get(name) is not files}
        self._sets = kept
        fields = {"serial": self._serial, "state": state, "sets": {n: dict(f) for n, f in kept.items()}}
        files = {file: info for group in kept.values() for file, info in group.items()}
        artifacts.write_manifest(self.directory, _STATE_FORMAT, _STATE_VERSION, fields, files)
        for file in stale:
            (self.directory / file).unlink(missing_ok=True)
        self._last = time.monotonic()

    def _write_shards(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        files: dict[str, Any] = {}
        shard: dict[str, Tensor] = {}
        size = 0
        items = list(tensors.items())
        for position, (key, value) in enumerate(items):
            shard[key] = value
            size += value.numel() * value.element_size()
            if size >= _SHARD_BYTES or position == len(items) - 1:
                file = f"{name}-{self._serial:06d}-{len(files):04d}.safetensors"
                files[file] = artifacts.save_tensors(self.directory / file, shard, None)
                shard, size = {}, 0
        return files

    def clear(self) -> None:
        """Remove everything: the fit is finished and saved elsewhere."""
        for path in self.directory.glob("*"):
            path.unlink(missing_ok=True)
        self.directory.rmdir()
