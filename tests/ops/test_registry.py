"""Choosing a backend: by call, by name, by environment; and the reason when one cannot serve."""

from __future__ import annotations

import pytest
import torch

from pyinf import ops
from pyinf.errors import BackendUnavailableError, ConfigError
from pyinf.ops import registry, schemas


def test_every_op_has_a_reference_and_a_torch_path():
    for op in schemas.SCHEMAS:
        have = [i.backend for i in registry._implementations[op]]
        assert {"reference", "torch"} <= set(have)
        assert have == sorted(have, key=registry.BACKENDS.index)


def test_a_forced_backend_that_cannot_serve_says_why():
    x = torch.ones(2, 3)
    with ops.use_backend("triton"), pytest.raises(BackendUnavailableError, match=r"random_projection.*Triton"):
        ops.random_projection(x, 4)
    with ops.use_backend("cpu"), pytest.raises(BackendUnavailableError, match="draws signs only"):
        ops.random_projection(x, 4, distribution="normal")
    with ops.use_backend("cuda"), pytest.raises(BackendUnavailableError, match="CUDA"):
        ops.accumulate_squared_gradients(torch.zeros(3, 3), x, x)
    Lam = torch.zeros(3, 6)[:, ::2]
    with ops.use_backend("cpu"), pytest.raises(BackendUnavailableError, match="next to each other"):
        ops.accumulate_squared_gradients(Lam, x, x)
    ops.accumulate_squared_gradients(Lam, x, x)  # "auto" takes another
    assert torch.equal(Lam, torch.full((3, 3), 4.0))


def test_names_are_checked(monkeypatch):
    with pytest.raises(ConfigError, match="choose one of"):
        ops.set_backend("fast")
    with pytest.raises(ConfigError, match="unknown op"):
        ops.set_backend("torch", op="matmul")
    monkeypatch.setenv("PYINF_BACKEND", "fast")
    with pytest.raises(ConfigError, match="PYINF_BACKEND"):
        ops.gradient_norm(torch.ones(2, 3), torch.ones(2, 3))
    monkeypatch.setenv("PYINF_BACKEND", "reference")
    assert ops.current_backend() == "reference"
    with ops.use_backend("torch", op="gradient_norm"):
        assert ops.current_backend("gradient_norm") == "torch"
        assert ops.current_backend("gradient_dot") == "reference"
    assert ops.current_backend("gradient_norm") == "reference"
    monkeypatch.setenv("PYINF_CPU_ISA", "avx1024")
    with ops.use_backend("cpu"), pytest.raises(ConfigError, match="PYINF_CPU_ISA"):
        ops.accumulate_squared_gradients(torch.zeros(3, 3), torch.ones(2, 3), torch.ones(2, 3))


def test_the_context_manager_restores_after_an_error():
    before = ops.current_backend()
    with pytest.raises(RuntimeError, match="inside"), ops.use_backend("reference"):
        raise RuntimeError("inside")
    assert ops.current_backend() == before


def test_describe():
    table = ops.describe()
    assert set(table) == set(schemas.SCHEMAS)
    for row in table.values():
        assert tuple(row) == registry.BACKENDS
        assert row["torch"] == row["reference"] == "available"


def test_verified_record(tmp_path, monkeypatch):
    from pyinf.ops import verified

    monkeypatch.setenv("PYINF_CACHE", str(tmp_path / "cache"))
    verified._records.cache_clear()
    try:
        assert not verified.is_verified("accumulate_squared_gradients", "Card X")
        path = verified.record("accumulate_squared_gradients", "Card X", {"error": 1e-7})
        assert verified.is_verified("accumulate_squared_gradients", "Card X")
        assert not verified.is_verified("accumulate_squared_gradients", "Card Y")
        path.write_bytes(b"\x00broken")
        verified._records.cache_clear()
        assert not verified.is_verified("accumulate_squared_gradients", "Card X")
    finally:
        verified._records.cache_clear()
