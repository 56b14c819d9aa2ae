"""Code that only a card reaches, run with stand-ins for torch.cuda: a GPU minute is too dear for a typo."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import parts, run, sanitizer, special
from benchmarks.gpu.options import Options
from pyinf.bench import Clock
from pyinf.bench.machine import card_name, facts, folder_name
from pyinf.bench.timing import copies_needed, resolve_device
from pyinf.errors import ConfigError
from pyinf.ops import registry, torch_backend

CPU = torch.device("cpu")
CARD = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150 << 30,
    L2_cache_size=60 << 20,
)


class Stream:
    """A stand-in: everything runs at once, in order."""

    def __init__(self, device=None):
        self.cuda_stream = 0

    def synchronize(self):
        pass

    wait_stream = record_event = lambda self, other=None: None


class Event:
    clock = 0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        Event.clock += 1
        self.at = Event.clock

    def elapsed_time(self, other):
        return float(other.at - self.at)


@pytest.fixture
def card(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_name", lambda device=None: CARD.name)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device=None: CARD)
    monkeypatch.setattr(cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(cuda, "device", lambda device=None: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(special, "has_streams", lambda device: True)


def test_the_device_and_its_facts(card):
    assert resolve_device("auto") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="torch sees 1 CUDA devices"):
        resolve_device("cuda:3")
    device = torch.device("cuda", 0)
    assert card_name(device) == "NVIDIA H200" and folder_name(device) == "nvidia-h200"
    found = facts(device)
    assert found["capability"] == "9.0" and found["l2_bytes"] == 60 << 20 and found["multiprocessors"] == 132
    assert copies_needed(50 << 20, device) == 4 and copies_needed(1 << 30, device) == 1


def test_the_clock_of_a_card_overwrites_the_cache_before_every_call(card):
    order = []
    clock = object.__new__(Clock)
    clock.device = torch.device("cuda", 0)
    clock._flush = SimpleNamespace(zero_=lambda: order.append("flush"))
    timing = clock.measure([lambda: order.append("a"), lambda: order.append("b")], seconds=0.0, least=4, warmup=2)
    timed = order[order.index("flush") :]
    assert timed[:4] == ["flush", "a", "flush", "b"] and timed.count("flush") == timing.runs
    assert timing.median == pytest.approx(1e-3)  # one tick between the two events of a call, in milliseconds


def test_a_side_stream(card):
    assert special.side_stream("gradient_norm", "torch", "float32", CPU) == "ok"
    assert special.side_stream("accumulate_covariance", "torch", "float32", CPU) == "ok"


def test_a_kernel_that_read_too_early_would_be_found(card):
    """A stand-in that has read its inputs before the side stream filled them."""
    before = list(registry._implementations["gradient_norm"])
    seen = []

    def early(g, a, offsets):
        seen.append((g, a))
        if len(seen) == 1:
            return torch_backend.gradient_norm(g, a, offsets)
        return torch_backend.gradient_norm(torch.full_like(g, float("nan")), a, offsets)

    registry.register("gradient_norm", "cpu", early)
    try:
        assert special.side_stream("gradient_norm", "cpu", "float32", CPU).startswith("WRONG: error inf")
    finally:
        registry._implementations["gradient_norm"] = before


@pytest.fixture
def graphs(monkeypatch):
    """A graph that, replayed, runs the last captured call again into the same output; ``broken`` does nothing."""
    state = SimpleNamespace(broken=False, refuse=())
    right = special.call

    def watched(op, backend, args):
        made = right(op, backend, args)
        state.again = lambda: _into(made, right(op, backend, args))
        if state.capturing and state.refuse and state.refuse.pop():
            raise RuntimeError("operation not permitted when stream is capturing")
        return made

    class Graph:
        def replay(self):
            if not state.broken:
                state.again()

    @contextlib.contextmanager
    def capture(graph):
        state.capturing = True
        try:
            yield
        finally:
            state.capturing = False

    state.capturing = False
    monkeypatch.setattr(special, "call", watched)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return state


def _into(made, again):
    for x, y in zip(
        (made,) if torch.is_tensor(made) else made, (again,) if torch.is_tensor(again) else again, strict=True
    ):
        x.copy_(y)


def test_a_graph_is_judged_on_the_inputs_of_its_replay(card, graphs):
    assert special.graph("gradient_norm", "torch", "float32", CPU) == "ok"
    graphs.broken = True
    assert special.graph("gradient_norm", "torch", "float32", CPU).startswith("WRONG")


def test_a_graph_may_want_its_offsets_on_the_host(card, graphs):
    graphs.refuse = [False, True]
    state = special.graph("gradient_norm", "torch", "float32", CPU)
    assert state.startswith("ok, with offsets on the host only") and "not permitted" in state


def test_the_sanitizer_runs_around_the_worker(monkeypatch, tmp_path):
    """A stand-in for the tool: runs what it is given and prints a summary."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/bash\nshift 4\n"$@"\nstatus=$?\necho "========= ERROR SUMMARY: 0 errors"\nexit $status\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "tool", lambda: str(tool))
    monkeypatch.setattr(sanitizer, "shards", lambda options: ["memcheck:cpu"])
    found = run.run_part(parts.PARTS["sanitizer"], Options("cpu", tmp_path / "out", tiny=True), 120)
    assert found["complete"], found
    summary = found["rows"][-1]
    assert summary["state"] == "ok" and summary["errors"] == 0
    assert sum(r.get("calls", 0) for r in found["rows"]) == 4  # what C++ kernels take of the small shape


def test_triton_is_not_imported_before_a_kernel_is_called():
    """The parent of a run holds no memory of the card and starts fast."""
    code = "import sys, benchmarks.gpu.run, pyinf.bench; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=run.ROOT, env=os.environ)
    assert done.stdout.strip() == "False", done.stderr
