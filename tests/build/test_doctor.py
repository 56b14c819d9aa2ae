"""What doctor says, with and without an extension, a driver, a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import pyinf
from pyinf.errors import BackendUnavailableError


def test_doctor_names_every_op_and_every_reason():
    report = pyinf.doctor()
    text = str(report)
    assert set(report.ops) == set(pyinf.ops.registry.describe())
    for op, row in report.ops.items():
        assert f"  {op}  " in text
        for state in row.values():
            assert state == "available" or state in text
    assert report.versions["torch"] in text and report.build["git_hash"] in text


def test_doctor_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyinf._C", None)
    monkeypatch.delattr(pyinf, "_C", raising=False)
    text = str(pyinf.doctor())
    assert "not loaded" in text and "pip install ." in text


def test_verify_without_a_gpu_says_so(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="no GPU"):
        pyinf.doctor(verify=True)


@pytest.mark.gpu
def test_verify_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PYINF_CACHE", str(tmp_path))
    checks = pyinf.doctor(verify=True).checks
    assert sum(line.startswith("ok ") for line in checks) >= 6
    assert (tmp_path / "verified.json").is_file()


def test_python_dash_m_needs_no_driver():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "pyinf"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pyinf {pyinf.__version__}") and "accumulate_squared_gradients" in done.stdout
