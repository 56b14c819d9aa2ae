"""Every kernel and the configurations it takes there, compiled by the oldest supported Triton for sm_90, under the same
gate. An op could ask for a newer Triton by name (triton_backend.NEWER); none does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compile_table
from pyinf.ops import triton_backend
from pyinf.ops.triton_backend import NEWER

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.2.0"
FOLDER = ROOT / ".envs" / f"triton-{OLDEST}"
HERE = (FOLDER / "triton").is_dir()
MODULES = compile_table.modules()


@pytest.mark.skipif(not HERE, reason=f"no {FOLDER.relative_to(ROOT)}: `make oldest-triton` installs it")
@pytest.mark.parametrize("module", MODULES if HERE else ["every module"])
def test_compiles_on_the_oldest_triton(module, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("oldest.py")), module, "sm_90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["triton"] == OLDEST and result["cases"] > 0
    assert result["wrong"] == {}


def test_the_version_is_the_one_that_the_package_asks_for():
    assert f'"triton>={OLDEST.rsplit(".", 1)[0]};' in (ROOT / "pyproject.toml").read_text()
    assert f"triton=={OLDEST}" in (ROOT / "Makefile").read_text()


def test_no_op_asks_for_a_newer_triton():
    assert not NEWER, "then these modules are not compiled above"


def test_ops_that_need_a_newer_triton_say_so(monkeypatch):
    """The door that stays: an op whose kernel an older release does not compile well is refused by name there."""
    monkeypatch.setitem(NEWER, "scan_topk", (3, 6))
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(triton_backend, "triton_version", lambda: (3, 5))
    assert triton_backend.too_old_for("scan_topk").startswith(
        "the Triton kernel of scan_topk needs triton 3.6 or newer (here: 3.5)"
    )
    assert triton_backend.too_old_for("gradient_dot") is None
    monkeypatch.setattr(triton_backend, "triton_version", lambda: (3, 6))
    assert triton_backend.too_old_for("scan_topk") is None
