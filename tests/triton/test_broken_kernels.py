"""Kernels broken on purpose: one line of a copy is changed, and the interpreter's gate has to see it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pyinf.triton_kernels import covariance, squared_gradients
from tests.ops.cases import make_layer
from tests.triton.harness import compare
from tests.triton.test_covariance import covariance as covariance_call
from tests.triton.test_covariance import some, tokens
from tests.triton.test_squared_gradients import squares


def broken(module, old, new, folder, monkeypatch):
    """A copy of a kernel module with ``old`` replaced by ``new``, put in its place."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) >= 1, f"{module.__name__} has no {old!r} any more"
    path = folder / f"broken_{Path(module.__file__).name}"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"pyinf.triton_kernels.{path.stem}", path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    for name in ("launches", "choose", "splits_of"):
        monkeypatch.setattr(module, name, getattr(copy, name))


def run_squares():
    compare(squares(make_layer([9, 0, 21, 4], 37, 70, torch.float32)), "accumulate_squared_gradients", torch.float32)


def run_covariance():
    compare(covariance_call(tokens(45, 70, torch.float32), True, some(45)), "accumulate_covariance", torch.float32)


WRONG_VALUES, NOT_WRITTEN = "error .*, allowed", "NaN or infinity"
EITHER = f"{WRONG_VALUES}|{NOT_WRITTEN}"  # what is read instead may be anything
SQUARES = [
    ("a wrong index", "a_at = a + start * a_row", "a_at = a + b * a_row", WRONG_VALUES),
    ("a token too many", "inside = token < length - t\n", "inside = token <= length - t\n", EITHER),
    ("a sum, not of squares", "squares += gradient * gradient", "squares += gradient", WRONG_VALUES),
    ("a run left out", "for _ in range(0, splits):", "for _ in range(1, splits):", WRONG_VALUES),
    (
        "rows of a partial sum not written",
        "tl.store(at, squares, mask=inside)",
        "tl.store(at, squares, mask=inside & (rows < 8)[:, None])",
        NOT_WRITTEN,
    ),
]
COVARIANCE = [
    (
        "no mask",
        "inside = inside & (tl.load(keep + t + token, mask=inside, other=0) != 0)",
        "pass",
        WRONG_VALUES,
    ),
    ("a tile left out", "row = tl.where(inside < square, inside % height, low)", "row = low * 0", NOT_WRITTEN),
    (
        "columns of the wrong tile",
        "columns = j * BM + tl.arange(0, BM)\n    at = x",
        "columns = i * BM + tl.arange(0, BM)\n    at = x",
        EITHER,
    ),
    (
        "tokens counted without the mask",
        "count += inside.to(tl.int32)",
        "count += (token < length - t).to(tl.int32)",
        WRONG_VALUES,
    ),
    (
        "the last sum not written",
        "tl.store(into + columns, ones, mask=columns < d)",
        "tl.store(into + columns, ones, mask=columns < d - 1)",
        NOT_WRITTEN,
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), [c[1:] for c in SQUARES], ids=[c[0] for c in SQUARES])
def test_broken_squares(old, new, message, tmp_path, monkeypatch):
    run_squares()
    broken(squared_gradients, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        run_squares()


@pytest.mark.parametrize(("old", "new", "message"), [c[1:] for c in COVARIANCE], ids=[c[0] for c in COVARIANCE])
def test_broken_covariance(old, new, message, tmp_path, monkeypatch):
    run_covariance()
    broken(covariance, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=message):
        run_covariance()
