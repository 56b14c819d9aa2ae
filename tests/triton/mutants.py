"""Kernels broken on purpose: one line of a copy of a module is changed, and the copy is put in its place."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyinf.ops import registry

__all__ = ["SEEN", "broken_copy", "put_in_place"]

SEEN = r"error|NaN|not the same bits|wrote|assert|non-finite"
"""What a value test says of a broken kernel."""


def broken_copy(module: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of ``module``, imported beside it, with ``old`` replaced by ``new`` wherever it stands."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert old in source, f"{module.__name__} has no {old!r} any more"
    path = folder / f"broken_{Path(str(module.__file__)).name}"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    before = {op: list(entries) for op, entries in registry._implementations.items()}
    spec.loader.exec_module(copy)
    registry._implementations.update(before)  # a wrapper registers its copy when it is imported
    return copy


def put_in_place(
    module: ModuleType, copy: ModuleType, monkeypatch: pytest.MonkeyPatch, users: tuple[ModuleType, ...] = ()
) -> None:
    """Whatever ``module``, and ``users`` that imported from it, hold of its functions is replaced by the copy's; what
    it registered as implementations too."""
    functions = {name: held for name, held in vars(module).items() if _is_function_of(module, held)}
    for holder in (module, *users):
        for name, held in functions.items():
            if vars(holder).get(name) is held:
                monkeypatch.setattr(holder, name, vars(copy)[name])
    for op, entries in list(registry._implementations.items()):
        changed = [_replaced(entry, module, copy) for entry in entries]
        monkeypatch.setitem(registry._implementations, op, changed)


def _is_function_of(module: ModuleType, held: Any) -> bool:
    return callable(held) and getattr(getattr(held, "fn", held), "__module__", None) == module.__name__


def _replaced(entry: Any, module: ModuleType, copy: ModuleType) -> Any:
    if getattr(entry.function, "__module__", None) != module.__name__:
        return entry
    return dataclasses.replace(entry, function=getattr(copy, entry.function.__name__))
