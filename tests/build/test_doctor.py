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


def test_verify_without_kernels_says_why(monkeypatch):
    from pyinf import doctor as module

    monkeypatch.setattr(sys.modules["pyinf.doctor"], "_devices", lambda: (["a card"], ""))
    for row in (reasons := pyinf.ops.registry.describe()).values():
        row.update(cuda="no CUDA here", triton="no Triton here")
    monkeypatch.setattr(pyinf.ops.registry, "describe", lambda: reasons)
    with pytest.raises(BackendUnavailableError, match="cuda: no CUDA here; triton: no Triton here"):
        module(verify=True)


@pytest.fixture
def broken_torch(monkeypatch):
    """The torch backend of one op, wrong in one element of one large tile."""
    from pyinf.ops import registry, torch_backend

    entry = next(e for e in registry._implementations["gradient_norm"] if e.backend == "cpu" or e.backend == "torch")

    def wrong(g, a, offsets):
        out = torch_backend.gradient_norm(g, a, offsets)
        return out * 1.001 if g.shape[1] == 128 else out

    before = list(registry._implementations["gradient_norm"])
    registry.register("gradient_norm", "cpu", wrong)
    yield entry
    registry._implementations["gradient_norm"] = before


def test_verification_remembers_what_passes_and_strikes_what_fails(monkeypatch, tmp_path, broken_torch):
    """The machinery of ``--verify`` on the CPU, with the C++ backend in the place of a GPU's."""
    import torch

    from pyinf.bench.machine import card_name
    from pyinf.ops import verified

    monkeypatch.setenv("PYINF_CACHE", str(tmp_path))
    verified._records.cache_clear()
    cpu = torch.device("cpu")
    card = card_name(cpu)
    verified.record("gradient_norm", card, {}, "cpu")
    ops = ["accumulate_squared_gradients", "gradient_norm"]
    lines, wrong = sys.modules["pyinf.doctor"].verify_kernels(cpu, ["cpu"], {"git": "x"}, ops)
    assert verified.is_verified("accumulate_squared_gradients", card, "cpu")
    assert not verified.is_verified("gradient_norm", card, "cpu")
    assert len(wrong) == 1 and wrong[0].startswith("gradient_norm cpu:") and "tile" in wrong[0]
    assert any(line.startswith("ok cpu accumulate_squared_gradients cpu bfloat16") for line in lines)
    assert any(line.startswith("WRONG cpu gradient_norm cpu float32") for line in lines)


def test_a_broken_context_ends_the_verification(monkeypatch, tmp_path):
    import torch

    from pyinf import bench

    monkeypatch.setenv("PYINF_CACHE", str(tmp_path))

    def broken(device, chosen):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(bench, "verify_all", broken)
    lines, wrong = sys.modules["pyinf.doctor"].verify_kernels(torch.device("cpu"), ["cpu"], {})
    assert lines == [] and len(wrong) == 1 and "illegal memory access" in wrong[0]


def test_python_dash_m_needs_no_driver():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "pyinf"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pyinf {pyinf.__version__}") and "accumulate_squared_gradients" in done.stdout
