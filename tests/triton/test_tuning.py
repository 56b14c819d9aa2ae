"""Autotuning: opt-in, remembered on disk for each card, and never on buffers that the caller owns."""

from __future__ import annotations

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from pyinf.ops import triton_squares, triton_tuning
from pyinf.triton_kernels import configs
from pyinf.triton_kernels.configs import FAMILIES, Config, family_of, lookup
from tests.ops.cases import make_layer

CPU = torch.device("cpu")
DEFAULT, FAST, HUGE = (Config({"BM": size}) for size in (64, 32, 512))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYINF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_tuning, "_known", {})
    return tmp_path / "cache" / "triton_tuning.json"


def choose(calls, key="shape", card="Card"):
    def seconds(call, device):
        call()
        return calls[-1].constants["BM"] * 1e-6

    def run_with(config):
        if config is HUGE:
            raise OutOfResources(1 << 20, 1 << 17, "shared memory")
        calls.append(config)

    return triton_tuning.tuned("op", key, DEFAULT, [FAST, HUGE], run_with, CPU, lambda device: card, seconds)


def test_the_fastest_that_fits_is_taken_and_remembered(cache, monkeypatch):
    calls = []
    assert choose(calls) is FAST and calls == [DEFAULT, FAST]
    assert json.loads(cache.read_text()) == {"Card": {"op": {"shape": FAST.name}}}
    assert choose(calls) is FAST and len(calls) == 2
    monkeypatch.setattr(triton_tuning, "_known", {})  # another process
    assert choose(calls) is FAST and len(calls) == 2
    assert choose(calls, key="other") is FAST and choose(calls, card="Other") is FAST and len(calls) == 6
    monkeypatch.setattr(triton_tuning, "_known", {})
    cache.write_text("broken")
    assert choose(calls) is FAST and len(calls) == 8
    cache.write_text(json.dumps({"Card": {"op": {"shape": "a configuration of an earlier version"}}}))
    monkeypatch.setattr(triton_tuning, "_known", {})
    assert choose(calls) is FAST and len(calls) == 10


def test_opt_in(monkeypatch):
    assert not triton_tuning.enabled(torch.device("cuda"))
    monkeypatch.setenv("PYINF_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert triton_tuning.enabled(torch.device("cuda")) and not triton_tuning.enabled(CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not triton_tuning.enabled(torch.device("cuda"))


def test_what_is_measured_does_not_reach_the_result(monkeypatch):
    x = make_layer([4, 5], 20, 30, torch.float32)
    expected, out = torch.zeros(20, 30), torch.zeros(20, 30)
    triton_squares.accumulate_squared_gradients(expected, x.g, x.a, x.offsets)
    ran = []

    def tuned(op, key, default, candidates, run_with, device):
        for config in [default, *candidates]:
            run_with(config)
            ran.append(config)
        return default

    monkeypatch.setattr(triton_squares, "enabled", lambda device: True)
    monkeypatch.setattr(triton_squares, "tuned", tuned)
    triton_squares.accumulate_squared_gradients(out, x.g, x.a, x.offsets)
    assert ran and torch.equal(out, expected)


def test_cards_without_a_table_take_the_default(monkeypatch):
    table = {"default": {"half": DEFAULT}, "sm_90": {"half": FAST}}
    assert lookup(table, "sm_90", "half") is FAST and lookup(table, "sm_120", "half") is DEFAULT
    assert lookup({**table, "sm_80": {}}, "sm_80", "half") is DEFAULT
    old = {**table, "default old": {"half": HUGE}, "sm_80 old": {"half": FAST}}
    assert lookup(old, "sm_90", "half") is FAST
    monkeypatch.setattr(configs, "is_old", lambda: True)
    assert lookup(old, "sm_90", "half") is HUGE and lookup(old, "sm_80", "half") is FAST
    assert lookup(table, "sm_90", "half") is FAST
    for capability, family in (((9, 0), "sm_90"), ((8, 9), "sm_89"), ((12, 0), "default")):
        family_of.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert family_of(torch.device("cuda", 0)) == family and (family in FAMILIES or family == "default")
    family_of.cache_clear()
    assert family_of(CPU) == "default"
