"""Which GPU kernels were checked on real hardware: "auto" takes no other.

A record is ``{op: {"<card> | <pyinf version>": {...}}}`` for a CUDA kernel, with `` | triton`` after the version for a
Triton kernel: each backend is verified on its own. Two files are read: ``benchmarks/results/verified.json`` of
a source tree, and the user's own, ``$PYINF_CACHE/verified.json`` (default ``~/.cache/pyinf``), which :func:`record`
writes.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyinf._version import __version__
from pyinf.artifacts import atomic_write_json

__all__ = ["forget", "is_verified", "record", "user_file"]

_REPOSITORY_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "verified.json"


def user_file() -> Path:
    """Where the user's own record is kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyinf"
    return Path(os.environ.get("PYINF_CACHE") or default) / "verified.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # no record, or an unreadable one: nothing counts as verified
    return found if isinstance(found, dict) else {}


@lru_cache(maxsize=1)
def _records() -> tuple[dict[str, Any], ...]:
    return _read(_REPOSITORY_FILE), _read(user_file())


def _key(card: str, backend: str) -> str:
    return f"{card} | {__version__}" + ("" if backend == "cuda" else f" | {backend}")


def is_verified(op: str, card: str, backend: str = "cuda") -> bool:
    """Whether this version's "cuda" or "triton" kernel of ``op`` was verified on a card of this name."""
    key = _key(card, backend)
    return any(isinstance(r.get(op), dict) and key in r[op] for r in _records())


def record(op: str, card: str, details: dict[str, Any], backend: str = "cuda") -> Path:
    """Remember in the user's file that ``backend``'s kernel of ``op`` was verified on ``card``; returns the file."""
    path = user_file()
    found = _read(path)
    found.setdefault(op, {})[_key(card, backend)] = details
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, found)
    _records.cache_clear()
    return path


def forget(op: str, card: str, backend: str = "cuda") -> bool:
    """Strike ``backend``'s kernel of ``op`` on ``card`` from the user's file; returns whether it stood there."""
    path = user_file()
    found = _read(path)
    if not isinstance(found.get(op), dict) or found[op].pop(_key(card, backend), None) is None:
        return False
    atomic_write_json(path, found)
    _records.cache_clear()
    return True
