"""Memory that an op asks for uninitialised is handed over full of NaN, so that a result it forgot to write is seen."""

from __future__ import annotations

import sys

import torch

_FUNCTIONS = ("empty", "empty_like", "empty_strided")
_METHODS = ("new_empty", "new_empty_strided")


def _poisoned(original):
    def wrapper(*args, **kwargs):
        out = original(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("pyinf.ops") and out.device.type != "meta":
            if out.is_floating_point():
                out.fill_(float("nan"))
            elif out.dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
                out.fill_(torch.iinfo(out.dtype).min)
            elif out.dtype == torch.uint8:
                out.fill_(0xA5)
        return out

    return wrapper


def install(monkeypatch) -> None:
    """Poison what the wrappers in pyinf.ops allocate, for the length of a test."""
    for name in _FUNCTIONS:
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in _METHODS:
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
