"""The interpreter, the choice of backend under it, and the float32 precision setting."""

from __future__ import annotations

import pytest
import torch

from pyinf import ops
from pyinf.errors import ConfigError
from pyinf.ops import registry, triton_backend, verified


def test_the_interpreter_serves_cpu_tensors_when_forced_and_never_by_itself():
    assert triton_backend.interpreted() and triton_backend.unavailable() is None
    x = torch.ones(3, 4)
    assert triton_backend.check_tensors(x) is None
    for op in registry._implementations:
        for entry in registry._implementations[op]:
            if entry.backend == "triton":
                assert not entry.prefer(x)


def test_reasons(monkeypatch):
    x = torch.ones(3, 4)
    assert "torch.float64" in triton_backend.check_tensors(x.double())
    assert "one device" in triton_backend.check_tensors(x, x.to("meta"))
    assert "meta" in triton_backend.check_tensors(x.to("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "these are on the CPU" in triton_backend.check_tensors(x)
    if not torch.cuda.is_available():
        assert "no CUDA device" in triton_backend.unavailable()
    triton_backend._installed.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in triton_backend.unavailable()
    triton_backend._installed.cache_clear()


def test_backends_are_verified_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYINF_CACHE", str(tmp_path))
    verified._records.cache_clear()
    try:
        verified.record("op", "Card", {}, backend="triton")
        assert verified.is_verified("op", "Card", backend="triton") and not verified.is_verified("op", "Card")
        verified.record("op", "Card", {})
        assert verified.is_verified("op", "Card")
    finally:
        verified._records.cache_clear()


def test_float32_precision():
    assert ops.float32_precision() == "ieee"
    assert ops.set_float32_precision("tf32x3") == "ieee"
    try:
        assert ops.float32_precision() == "tf32x3"
        with pytest.raises(ConfigError, match="ieee, tf32x3, tf32"):
            ops.set_float32_precision("bf16")
    finally:
        ops.set_float32_precision("ieee")
