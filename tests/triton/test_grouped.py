"""Layers of one shape in one launch, against the float64 reference of each layer on its own."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import parts
from benchmarks.gpu.options import Options
from pyinf import ops
from pyinf.bench.grouped import GROUPED, PROVIDERS, _run, measure_grouped, verify_grouped
from pyinf.bench.timing import Clock
from pyinf.errors import ConfigError
from pyinf.ops import grouped, reference, triton_grouped, triton_scores

OFFSETS = torch.tensor([0, 5, 5, 40, 71])


def _layers(d_out: int, d_in: int, dtype: torch.dtype, count: int = 3, tokens: int = 71):
    generator = torch.Generator().manual_seed(d_out * 1000 + d_in)
    g = [torch.randn(tokens, d_out, generator=generator).to(dtype) for _ in range(count)]
    a = [torch.randn(tokens, d_in, generator=generator).to(dtype) for _ in range(count)]
    return g, a


def _error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(48, 32), (37, 65)])
def test_squared_gradients(sizes, dtype):
    g, a = _layers(*sizes, dtype)
    g.append(g[0][:, :])
    a.append(a[1])
    Lam = [torch.full(sizes, 0.5) for _ in g]
    with ops.use_backend("triton"):
        grouped.accumulate_squared_gradients_group(Lam, g, a, OFFSETS)
    for out, left, right in zip(Lam, g, a, strict=True):
        exact = torch.full(sizes, 0.5, dtype=torch.float64)
        reference.accumulate_squared_gradients(exact, left.double(), right.double(), OFFSETS)
        assert _error(out, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("d", [48, 65])
def test_covariances(d, dtype):
    x, _ = _layers(d, 8, dtype)
    C = [torch.full((d, d), 0.25) for _ in x]
    with ops.use_backend("triton"):
        grouped.accumulate_covariance_group(C, x, [False] * len(x))
    for out, rows in zip(C, x, strict=True):
        exact = torch.full((d, d), 0.25, dtype=torch.float64)
        reference.accumulate_covariance(exact, rows.double())
        assert _error(out.tril(), exact.tril()) < 1e-6


def test_one_launch_serves_the_layers_of_one_shape(monkeypatch):
    launches = []
    monkeypatch.setattr(triton_grouped, "run", lambda made, device: launches.extend(made))
    g, a = _layers(16, 32, torch.float32, count=4)
    h, b = _layers(16, 48, torch.float32, count=2)
    Lam = [torch.zeros(16, 32) for _ in g] + [torch.zeros(16, 48) for _ in h]
    with ops.use_backend("triton"):
        grouped.accumulate_squared_gradients_group(Lam, g + h, a + b, OFFSETS)
    assert [launch.grid[2] for launch in launches] == [4, 2]


def test_layers_that_the_grouped_kernel_does_not_take_go_one_by_one():
    g, a = _layers(16, 32, torch.float32, count=2)
    with_bias = [torch.zeros(33, 33) for _ in a]
    odd = torch.zeros(16 * 32 + 1)[1:].view(16, 32)  # an address that is no multiple of 16
    with ops.use_backend("triton"):
        grouped.accumulate_covariance_group(with_bias, a, [True, True])
        grouped.accumulate_squared_gradients_group([odd, torch.zeros(16, 32)], g, a, OFFSETS)
    exact = torch.zeros(33, 33, dtype=torch.float64)
    reference.accumulate_covariance(exact, a[1].double(), bias=True)
    assert _error(with_bias[1].tril(), exact) < 1e-6
    exact = torch.zeros(16, 32, dtype=torch.float64)
    reference.accumulate_squared_gradients(exact, g[0].double(), a[0].double(), OFFSETS)
    assert _error(odd, exact) < 1e-6


def test_two_layers_that_share_an_accumulator_do_not_race():
    g, a = _layers(16, 32, torch.float32, count=2)
    Lam = torch.zeros(16, 32)
    with ops.use_backend("triton"):
        grouped.accumulate_squared_gradients_group([Lam, Lam], g, a, OFFSETS)
    exact = torch.zeros(16, 32, dtype=torch.float64)
    for left, right in zip(g, a, strict=True):
        reference.accumulate_squared_gradients(exact, left.double(), right.double(), OFFSETS)
    assert _error(Lam, exact) < 1e-6


def test_lists_that_do_not_fit_are_refused():
    g, a = _layers(16, 32, torch.float32, count=2)
    with pytest.raises(ConfigError, match="one Lam, g and a a layer"):
        grouped.accumulate_squared_gradients_group([torch.zeros(16, 32)], g, a, OFFSETS)
    with pytest.raises(ConfigError, match="shape"):
        grouped.accumulate_covariance_group([torch.zeros(3, 3)] * 2, a, [False, False])


@pytest.mark.parametrize("op", GROUPED)
def test_verification_of_the_grouped_kernels(op):
    sizes = {"dtypes": ("float32", "float16"), "shapes": ((40, 24),)}
    passed, lines = verify_grouped(op, torch.device("cpu"), **sizes)
    taken = [line for line in lines if not line.startswith("not taken")]
    assert passed and len(lines) == 2 and all(line.startswith("ok") for line in taken)
    assert len(taken) == (1 if op == "low_rank_scores" else 2)  # float32 layers never share

    def off_by_a_little(*call):
        return [total * (1 + 1e-2) for total in _run(*call)]

    passed, lines = verify_grouped(op, torch.device("cpu"), run=off_by_a_little, **sizes)
    assert not passed and all(line.startswith(("WRONG", "not taken")) for line in lines)

    def not_a_number(*call):
        return [total * float("nan") for total in _run(*call)]

    assert not verify_grouped(op, torch.device("cpu"), run=not_a_number, **sizes)[0]


@pytest.mark.parametrize("op", GROUPED)
def test_what_the_grouped_kernel_does_not_take_is_not_verified(op, monkeypatch):
    """Walked one by one the values would be right, and would say nothing of the grouped kernel."""
    monkeypatch.setattr(grouped, "kernel_serves", lambda op, tensors: False)
    monkeypatch.setattr(grouped, "shares_inputs", lambda x: False)
    passed, lines = verify_grouped(op, torch.device("cpu"), ("float16",), ((40, 24),))
    assert not passed and lines[0].startswith("not taken")


FLOPS = {"accumulate_covariance": 8 * 16 * 17, "accumulate_squared_gradients": 2 * 8 * 24 * 16}


@pytest.mark.parametrize("op", GROUPED)
def test_speed_of_a_group(op, monkeypatch):
    clock, known = Clock(torch.device("cpu")), {"copy": 1e10, "float16": 1e11}
    rows = measure_grouped(op, (24, 16), 2, (5, 3), "float16", clock, known, seconds=0.001)
    assert [row.provider for row in rows] == list(PROVIDERS) and all(row.median_ms for row in rows)
    assert rows[0].flops == 2 * FLOPS.get(op, 2 * 8 * 41 * 4 * 16)
    for module, name in (
        (triton_grouped, "covariances"),
        (triton_grouped, "squared_gradients"),
        (triton_scores, "low_rank_scores_shared"),
    ):
        monkeypatch.setattr(module, name, lambda *call: None)  # a kernel that does nothing
    rows = measure_grouped(op, (24, 16), 2, (5, 3), "float16", clock, known, ("torch", "triton grouped"), 0.001)
    assert rows[0].median_ms and rows[1].median_ms is None and "values are wrong" in rows[1].note


@pytest.mark.parametrize("per_token", [False, True])
def test_layers_of_one_input_are_one_launch(per_token, monkeypatch):
    taken = []
    shared = triton_scores.low_rank_scores_shared
    monkeypatch.setattr(
        triton_scores, "low_rank_scores_shared", lambda *call: taken.append(len(call[1])) or shared(*call)
    )
    g, a = _layers(24, 32, torch.float16)
    L, R = _layers(4, 32, torch.float32, 3, 2 * 24), _layers(32, 4, torch.float32, 3, 2 * 4)
    layers = [(g[i], L[0][i].view(2, 24, 4), R[0][i].view(2, 4, 32)) for i in range(3)]
    scores = torch.full((2, 71 if per_token else 4), 0.5)
    exact = scores.double()
    for left, L_l, R_l in layers:
        reference.low_rank_scores(
            exact, left.double(), a[0].double(), OFFSETS, L_l.half().double(), R_l.half().double(), per_token
        )  # fmt: skip
    for forced in ("triton", "torch"):
        out = scores.clone()
        with ops.use_backend(forced):
            assert grouped.shares_inputs(a[0]) == (forced == "triton") and not grouped.shares_inputs(a[0].float())
            grouped.low_rank_scores_group(out, layers, a[0], OFFSETS, per_token)
        assert _error(out, exact) < (1e-6 if forced == "triton" else 1e-3)
    assert taken == [3]
    with pytest.raises(ConfigError, match="do not fit"):
        grouped.low_rank_scores_group(scores, [(g[0], layers[0][2], layers[0][1])], a[0], OFFSETS, per_token)


def test_the_script_for_gpus_judges_and_times_groups(tmp_path):
    options = Options("cpu", tmp_path, tiny=True)
    shards = [shard for shard in parts.judged_pairs(options) if "_group:" in shard]
    assert shards == [f"{op}_group:triton" for op in GROUPED] and not set(shards) & set(parts.pairs(options))
    for shard in shards:
        rows = [item() for _, item in parts.PARTS["correctness"].items(shard, options)]
        assert {row["op"] for row in rows} == {shard.split(":")[0]}
        assert {row["state"] for row in rows} <= {"ok", "not taken"} and any(row["state"] == "ok" for row in rows)
    clock, known = Clock(torch.device("cpu")), {"copy": 1e10, "float32": 1e11}
    for name, item in parts._bench_grouped(options, clock, known):
        timed = [row["provider"] for row in item() if row["median_ms"]]
        assert timed == [
            p for p in PROVIDERS if "low_rank" not in name or p != "triton grouped"
        ]  # float32 never shares
