"""Which implementation serves an op: every backend says whether it can, and why not when it cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pyinf.errors import BackendUnavailableError, ConfigError

__all__ = ["BACKENDS", "current_backend", "describe", "dispatch", "register", "set_backend", "use_backend"]

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")
"""Names in the order in which "auto" asks them."""

_NOT_HERE = {
    "cuda": "no CUDA kernel of pyinf serves this op",
    "triton": "no Triton kernel of pyinf serves this op",
    "cpu": "no C++ kernel of pyinf serves this op: plain torch was measured to be as fast",
}


@dataclass(frozen=True)
class Implementation:
    """One backend's function for one op.

    ``check(*args)`` returns None when the function can serve these arguments, else the reason why it cannot.
    ``prefer(*args)`` says whether "auto" should take it: it encodes where a measurement showed that it wins.
    """

    backend: str
    function: Callable[..., Any]
    check: Callable[..., str | None] | None = None
    prefer: Callable[..., bool] | None = None


_implementations: dict[str, list[Implementation]] = {}
_per_op: dict[str, str] = {}
_default: str | None = None  # None: read PYINF_BACKEND on every call


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    check: Callable[..., str | None] | None = None,
    prefer: Callable[..., bool] | None = None,
) -> None:
    """Add ``function`` as the implementation of ``op`` by ``backend``; replaces an earlier one of the same backend."""
    if backend not in BACKENDS:
        raise ConfigError(_unknown(backend))
    others = [i for i in _implementations.get(op, []) if i.backend != backend]
    others.append(Implementation(backend, function, check, prefer))
    others.sort(key=lambda i: BACKENDS.index(i.backend))
    _implementations[op] = others


def _unknown(name: str) -> str:
    return f"unknown backend {name!r}; choose one of: auto, {', '.join(BACKENDS)}"


def set_backend(name: str, op: str | None = None) -> None:
    """Choose the backend of every op, or of one ``op``.

    ``"auto"`` takes, for each call, the first backend that can serve it and was measured to win there. Any other
    name forces that backend: a call that it cannot serve raises :class:`~pyinf.errors.BackendUnavailableError`.
    The environment variable ``PYINF_BACKEND`` sets the same thing and is overridden by this function.

    Raises ``ConfigError`` for an unknown backend or op.
    """
    global _default
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(_unknown(name))
    if op is None:
        _default = name
        return
    if op not in _implementations:
        raise ConfigError(f"unknown op {op!r}; the ops are: {', '.join(sorted(_implementations))}")
    _per_op[op] = name


def current_backend(op: str | None = None) -> str:
    """Name of the backend in force ("auto" included), for all ops or for one."""
    if op is not None and op in _per_op:
        return _per_op[op]
    if _default is not None:
        return _default
    name = os.environ.get("PYINF_BACKEND", "auto") or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ConfigError("PYINF_BACKEND: " + _unknown(name))
    return name


@contextlib.contextmanager
def use_backend(name: str, op: str | None = None) -> Iterator[None]:
    """``set_backend`` for the length of a ``with`` block (process-wide, not per thread)."""
    global _default
    before, before_ops = _default, dict(_per_op)
    set_backend(name, op)
    try:
        yield
    finally:
        _default = before
        _per_op.clear()
        _per_op.update(before_ops)


def select(op: str, args: tuple[Any, ...]) -> Implementation:
    """The implementation that serves ``op`` for these arguments under the backend in force."""
    choice = current_backend(op)
    if choice == "auto":
        for entry in _implementations[op]:
            if (entry.check is None or entry.check(*args) is None) and (entry.prefer is None or entry.prefer(*args)):
                return entry
        raise BackendUnavailableError(f"no backend can serve {op}: {_reasons(op, args)}")
    for entry in _implementations[op]:
        if entry.backend == choice:
            reason = entry.check(*args) if entry.check is not None else None
            if reason is None:
                return entry
            raise BackendUnavailableError(f"backend {choice!r} cannot serve {op}: {reason}")
    raise BackendUnavailableError(f"backend {choice!r} cannot serve {op}: {_NOT_HERE[choice]}")


def dispatch(op: str, *args: Any) -> Any:
    """Run ``op`` on the backend in force."""
    return select(op, args).function(*args)


def _reasons(op: str, args: tuple[Any, ...]) -> str:
    found = ((e.backend, e.check(*args)) for e in _implementations[op] if e.check is not None)
    return "; ".join(f"{name}: {reason}" for name, reason in found if reason)


def describe() -> dict[str, dict[str, str]]:
    """For every op, every backend: "available", or the reason why it is not. Used by ``pyinf doctor``.

    A backend that depends on the arguments (dtype, device, shape) counts as available here.
    """
    table: dict[str, dict[str, str]] = {}
    for op in sorted(_implementations):
        have = {entry.backend: entry for entry in _implementations[op]}
        row: dict[str, str] = {}
        for name in BACKENDS:
            if name not in have:
                row[name] = _NOT_HERE[name]
            else:
                loaded = getattr(have[name].check, "unavailable", None)
                row[name] = (loaded() if loaded is not None else None) or "available"
        table[op] = row
    return table
