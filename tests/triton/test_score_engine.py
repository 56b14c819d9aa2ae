"""The score engine hands over the layers of one input together where a kernel reads it once: the same scores."""

from __future__ import annotations

import pytest
import torch

from pyinf import ops
from pyinf.capture import Layer
from pyinf.ops import grouped, triton_scores
from pyinf.score import QueryBlock, ScoreConsumer

OFFSETS = torch.tensor([0, 5, 5, 19])
LAYERS = {  # name: (group, d_out, bias)
    "up": ("up", 24, False),
    "gate": ("up", 24, False),
    "v": ("v", 8, True),
    "k": ("v", 8, True),
    "q": ("v", 16, True),
    "out": ("out", 16, False),
}
D_IN, QUERIES, RANK = 16, 2, 3


def block() -> QueryBlock:
    generator = torch.Generator().manual_seed(1)
    made = QueryBlock(QUERIES)
    for name, (_, d_out, bias) in LAYERS.items():
        made.left[name] = torch.randn(QUERIES, d_out, RANK, generator=generator)
        made.right[name] = torch.randn(QUERIES, RANK, D_IN + bias, generator=generator)
    return made


def scores(dtype: torch.dtype, per_token: bool, per_module: bool = False, norms: bool = False, repeats: int = 1):
    """What one batch gives; ``repeats`` batches must each give the same."""
    consumer, found = ScoreConsumer(block(), per_token, per_module, norms), []
    for _ in range(repeats):
        generator = torch.Generator().manual_seed(0)
        inputs = {group: torch.randn(19, D_IN, generator=generator).half().to(dtype) for group, *_ in LAYERS.values()}
        consumer.start_batch()
        for name, (group, d_out, bias) in LAYERS.items():
            g = torch.randn(19, d_out, generator=generator).half().to(dtype)
            consumer.consume(Layer(name, (), D_IN, d_out, bias), group, False, inputs[group], g, OFFSETS)
        consumer.finish_batch()
        found.append(consumer.by_module if per_module else consumer.scores)
    assert per_module or all(torch.equal(found[0], other) for other in found)
    return found[0], consumer.norms


@pytest.fixture
def launches(monkeypatch):
    taken, shared = [], triton_scores.low_rank_scores_shared
    monkeypatch.setattr(
        triton_scores, "low_rank_scores_shared", lambda *call: taken.append(len(call[1])) or shared(*call)
    )
    return taken


@pytest.mark.parametrize("per_token", [False, True])
def test_layers_of_one_input_are_scored_together(per_token, launches):
    with ops.use_backend("reference"):
        exact, square = scores(torch.float64, per_token, norms=True)
    with ops.use_backend("triton", "low_rank_scores"):
        together, norms = scores(torch.float16, per_token, norms=True, repeats=2)
    assert launches == [2, 3, 1] * 2  # a lone layer is one launch as ever
    assert together.dtype == torch.float32 and torch.allclose(norms, square, rtol=1e-5)
    assert (together.double() - exact).norm() / exact.norm() < 2e-3  # the queries in half precision
    with ops.use_backend("torch"):
        alone, _ = scores(torch.float16, per_token)
    assert (alone.double() - exact).norm() / exact.norm() < 1e-6


def test_where_nothing_is_shared(launches, monkeypatch):
    """Float32, a score for each module, and a backend that has no such kernel: one layer after the other, at once."""
    waited = []
    monkeypatch.setattr(ScoreConsumer, "_collect", lambda *call: waited.append(call))
    with ops.use_backend("triton", "low_rank_scores"):
        scores(torch.float32, False)
        by_module, _ = scores(torch.float16, False, per_module=True)
    scores(torch.float16, False)
    assert not waited and set(by_module) == set(LAYERS)


def test_layers_of_one_input_at_other_positions_are_not_mixed(monkeypatch):
    calls = []
    monkeypatch.setattr(grouped, "low_rank_scores_group", lambda *call: calls.append((len(call[1]), call[3].tolist())))
    consumer = ScoreConsumer(block(), False, False, False).start_batch()
    with ops.use_backend("triton", "low_rank_scores"):
        for name, marks in (("v", [0, 2, 4]), ("k", [0, 2, 4]), ("q", [0, 3, 4])):
            layer = Layer(name, (), D_IN, LAYERS[name][1], True)
            g, a = torch.zeros(4, layer.d_out).half(), torch.zeros(4, D_IN).half()
            consumer.consume(layer, "v", False, a, g, torch.tensor(marks))
        consumer.finish_batch()
        consumer.finish_batch()  # nothing is left
    assert calls == [(2, [0, 2, 4]), (1, [0, 3, 4])]
