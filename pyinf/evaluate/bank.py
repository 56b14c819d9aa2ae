"""Retraining banks: many trainings of one protocol on different subsets, cached on disk and resumable.

Layout of a bank: ``run.json`` (the protocol and the environment it ran in), ``base/`` (what all trainings share),
``model/`` (the fully trained model, seed 0), ``entries/KIND/KEY.json`` (one finished training each, with its own
checksum) and ``manifest.json`` (what was there when the last run ended).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyinf import artifacts, progress
from pyinf._version import __version__
from pyinf.errors import ArtifactError, ConfigError, DataError
from pyinf.evaluate.language_model import LanguageModelProtocol
from pyinf.evaluate.protocol import Protocol, check_sendable, checked_measurement
from pyinf.evaluate.subsets import Retraining

__all__ = ["BANK_FORMAT", "BANK_VERSION", "Bank", "Entry"]

BANK_FORMAT = "pyinf.bank"
BANK_VERSION = 1
_ENTRY_FORMAT = "pyinf.retraining"
_FIELDS = {"kind", "removed", "copies", "seed", "repeat", "about", "measured", "loss", "seconds", "model", "train_size"}


@dataclass(frozen=True)
class Entry:
    """One finished training: the subset, and ``measured`` ``{"loss": [Q], …}`` after it; ``loss`` is the training loss.

    ``model`` is a fingerprint of the trained weights (None where the protocol's model is no ``nn.Module``): two runs of
    one subset that agree have the same one.
    """

    retraining: Retraining
    measured: dict[str, np.ndarray]
    loss: float | None
    seconds: float
    model: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; floats come back exactly."""
        counts = self.retraining.counts
        return {
            "format": _ENTRY_FORMAT,
            "version": BANK_VERSION,
            "kind": self.retraining.kind,
            "train_size": len(counts),
            "removed": np.flatnonzero(counts == 0).tolist(),
            "copies": {str(i): int(counts[i]) for i in np.flatnonzero(counts > 1)},
            "seed": self.retraining.seed,
            "repeat": self.retraining.repeat,
            "about": self.retraining.about,
            "measured": {name: [float(v) for v in values] for name, values in self.measured.items()},
            "loss": self.loss,
            "seconds": self.seconds,
            "model": self.model,
        }

    def save(self, path: Path, identity: str) -> None:
        """Write the entry, with the identity of its bank and a checksum."""
        body = {**self.to_dict(), "bank": identity}
        artifacts.atomic_write_json(path, {**body, "checksum": _digest(body)})

    @classmethod
    def load(cls, path: Path, identity: str) -> Entry:
        """Read an entry.

        Raises:
            ArtifactError: damaged, changed, or of another bank; names the file.
        """
        data = artifacts.read_json(path, "retraining")
        remedy = "delete it and build the bank again: only this retraining is repeated"
        if not isinstance(data, dict) or data.get("format") != _ENTRY_FORMAT or not set(data) >= _FIELDS:
            raise ArtifactError(f"{path} is no {_ENTRY_FORMAT}; {remedy}")
        checksum = data.pop("checksum", None)
        if checksum != _digest(data):
            raise ArtifactError(f"{path} is damaged or was changed: its checksum does not match; {remedy}")
        if data["version"] != BANK_VERSION or data["bank"] != identity:
            raise ArtifactError(f"{path} belongs to another bank or version of it; {remedy}")
        counts = np.ones(data["train_size"], dtype=np.int64)
        counts[np.asarray(data["removed"], dtype=np.int64)] = 0
        for index, count in data["copies"].items():
            counts[int(index)] = count
        retraining = Retraining(data["kind"], counts, data["seed"], data["repeat"], data["about"])
        measured = {name: np.asarray(values) for name, values in data["measured"].items()}
        return cls(retraining, measured, data["loss"], data["seconds"], data["model"])


def _digest(body: dict[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def environment(threads: int) -> dict[str, Any]:
    """What rounding depends on beside the protocol; a bank is continued in the same one only."""
    return {
        "torch": torch.__version__.split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        "threads": threads,
    }


class Bank:
    """A directory of retrainings of one protocol.

    Args:
        directory: made if it is not there; an existing one must be of the same protocol and environment.
        protocol: how to train and what to measure.
        threads: CPU threads of every training. One is the fastest use of several cores by several workers, and keeps
            the rounding the same.

    Raises:
        ArtifactError: the directory holds something else; lists what differs.
    """

    def __init__(self, directory: str | os.PathLike[str], protocol: Protocol, threads: int = 1) -> None:
        if threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1")
        self.directory, self.protocol, self.threads = Path(directory), protocol, threads
        description = {
            "format": BANK_FORMAT,
            "version": BANK_VERSION,
            "protocol": protocol.describe(),
            "environment": environment(threads),
        }
        artifacts.claim_directory(self.directory, description)
        self.identity = _digest(json.loads(json.dumps(description, default=str)))
        protocol.prepare(self.directory / "base")

    @classmethod
    def open(cls, directory: str | os.PathLike[str], protocol: Protocol | None = None) -> Bank:
        """A bank that is there; one of a ready protocol knows it by itself.

        Raises:
            ArtifactError: no bank there.
            ConfigError: it is of a protocol of the user's own, which was not given.
        """
        path = Path(directory) / artifacts.RUN_NAME
        if not path.exists():
            raise ArtifactError(f"{directory} holds no bank; build one with: pyinf evaluate bank --out {directory}")
        found = artifacts.read_json(path, "bank description")
        if not isinstance(found, dict) or found.get("format") != BANK_FORMAT or found.get("version") != BANK_VERSION:
            raise ArtifactError(f"{directory} holds another kind of run, not a bank of version {BANK_VERSION}")
        if protocol is None:
            settings = dict(found["protocol"])
            if settings.pop("protocol", None) != "language model":
                raise ConfigError(f"the bank in {directory} is of a protocol of your own; pass it as protocol=…")
            protocol = LanguageModelProtocol(**settings)
        return cls(directory, protocol, found["environment"]["threads"])

    # -- building ------------------------------------------------------------------------------------------------------

    def path(self, retraining: Retraining) -> Path:
        """Where its entry is, or will be."""
        return self.directory / "entries" / retraining.kind / f"{retraining.key}.json"

    def missing(self, plan: Sequence[Retraining]) -> list[Retraining]:
        """Those of ``plan`` that are not done yet, each once."""
        seen: set[Path] = set()
        left = []
        for retraining in plan:
            if len(retraining.counts) != self.protocol.train_size:
                raise DataError(
                    f"a {retraining.kind} retraining is over {len(retraining.counts)} examples, the protocol has "
                    f"{self.protocol.train_size}"
                )
            path = self.path(retraining)
            if path not in seen and not path.exists():
                left.append(retraining)
            seen.add(path)
        return left

    def train(self, retraining: Retraining) -> Entry:
        """Do one training now, in this process, and keep its entry."""
        begin = time.perf_counter()
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            trained = self.protocol.train(retraining.counts, retraining.seed)
            measured = checked_measurement(self.protocol.measure(trained.model), self.protocol)
        finally:
            torch.set_num_threads(before)
        fingerprint = artifacts.fingerprint_model(trained.model) if isinstance(trained.model, torch.nn.Module) else None
        loss = trained.loss if np.isfinite(trained.loss) else None
        entry = Entry(retraining, measured, loss, round(time.perf_counter() - begin, 3), fingerprint)
        if retraining.kind == "full" and retraining.seed == 0 and retraining.repeat == 0:
            self._keep_model(trained.model)
        entry.save(self.path(retraining), self.identity)
        return entry

    def _keep_model(self, model: Any) -> None:
        import shutil

        target, fresh = self.directory / "model", self.directory / f"model.{os.getpid()}.pyinf-tmp"
        for left in self.directory.glob("model.*.pyinf-tmp"):
            shutil.rmtree(left, ignore_errors=True)
        self.protocol.save_model(model, fresh)
        if fresh.exists():
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)

    def build(self, plan: Sequence[Retraining], workers: int = 1) -> list[Entry]:
        """Do what of ``plan`` is not done yet, in ``workers`` processes; a killed build goes on where it stopped.

        Each entry is written as soon as its training ends, so a kill loses at most the trainings in flight.

        Returns:
            The entries of the whole plan, in its order.

        Raises:
            ConfigError: a protocol that cannot be sent to other processes, with more than one worker.
            Whatever a training raises.
        """
        if workers < 1:
            raise ConfigError(f"workers is {workers}; it must be at least 1")
        for folder in (self.directory / "entries").glob("*"):
            artifacts.remove_stale_temporaries(folder)
        left = self.missing(plan)
        with progress.stage("retrainings", len(left), "retrainings") as stage:
            if workers == 1 or len(left) < 2:
                for retraining in left:
                    self.train(retraining)
                    stage.advance(1)
            else:
                from pyinf.evaluate.workers import run_in_processes

                check_sendable(self.protocol)
                run_in_processes(self, left, min(workers, len(left)), lambda: stage.advance(1))
        self._write_manifest()
        return [Entry.load(self.path(r), self.identity) for r in plan]

    def _write_manifest(self) -> None:
        names = sorted(p.relative_to(self.directory).as_posix() for p in (self.directory / "entries").glob("*/*.json"))
        files = {
            name: {
                "sha256": artifacts.sha256_file(self.directory / name),
                "bytes": (self.directory / name).stat().st_size,
            }
            for name in names
        }
        fields = {
            "identity": self.identity,
            "retrainings": dict(sorted(Counter(name.split("/")[1] for name in names).items())),
            "versions": {"pyinf": __version__, "torch": torch.__version__},
        }
        artifacts.write_manifest(self.directory, BANK_FORMAT, BANK_VERSION, fields, files)

    # -- reading -------------------------------------------------------------------------------------------------------

    def kinds(self) -> dict[str, int]:
        """How many entries there are of each kind."""
        found = Counter(p.parent.name for p in (self.directory / "entries").glob("*/*.json"))
        return dict(sorted(found.items()))

    def entries(self, kind: str, seed: int | None = None, repeat: int | None = 0) -> list[Entry]:
        """The finished entries of a kind, in the order in which they were drawn.

        Raises:
            ArtifactError: one is damaged; names the file.
        """
        found = [Entry.load(p, self.identity) for p in sorted((self.directory / "entries" / kind).glob("*.json"))]
        kept = [
            e
            for e in found
            if (seed is None or e.retraining.seed == seed) and (repeat is None or e.retraining.repeat == repeat)
        ]

        def place(entry: Entry) -> tuple[Any, ...]:
            about = entry.retraining.about
            first = next((about[k] for k in ("draw", "removed", "group", "query") if k in about), 0)
            return entry.retraining.seed, entry.retraining.repeat, first, entry.retraining.key

        return sorted(kept, key=place)

    def table(self, kind: str, seed: int = 0, what: str = "loss", repeat: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """``(counts [M, N], outcomes [M, Q])`` of the entries of a kind.

        Raises:
            DataError: there are none, or they did not measure ``what``.
        """
        entries = self.entries(kind, seed, repeat)
        if not entries:
            there = ", ".join(f"{k} ({n})" for k, n in self.kinds().items()) or "nothing yet"
            raise DataError(f"the bank in {self.directory} has no '{kind}' retrainings of seed {seed}; it has {there}")
        if what not in entries[0].measured:
            raise DataError(f"the bank measured {', '.join(entries[0].measured)}, not '{what}'")
        return np.stack([e.retraining.counts for e in entries]), np.stack([e.measured[what] for e in entries])

    def pairs(self, kind: str, seeds: tuple[int, int] = (0, 1), what: str = "loss") -> tuple[np.ndarray, np.ndarray]:
        """Outcomes of the subsets of a kind that were trained with both seeds: two ``[M, Q]`` (noise ceiling)."""
        first, second = (
            {e.retraining.counts.tobytes(): e.measured[what] for e in self.entries(kind, seed)} for seed in seeds
        )
        both = [key for key in first if key in second]
        empty = np.zeros((0, self.protocol.query_size))
        if not both:
            return empty, empty
        return np.stack([first[k] for k in both]), np.stack([second[k] for k in both])

    def repeats(self, what: str = "loss") -> tuple[int, float]:
        """Trainings done twice with the same subset and seed: how many, and the largest difference of a measurement."""
        count, largest = 0, 0.0
        for kind in self.kinds():
            by_run: dict[tuple[bytes, int], list[np.ndarray]] = {}
            for e in self.entries(kind, None, None):
                by_run.setdefault((e.retraining.counts.tobytes(), e.retraining.seed), []).append(e.measured[what])
            for runs in by_run.values():
                for other in runs[1:]:
                    count += 1
                    largest = max(largest, float(np.abs(other - runs[0]).max()))
        return count, largest
