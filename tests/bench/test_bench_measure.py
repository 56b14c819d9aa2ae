"""A benchmark shows a speed only beside right values; its files and the command."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from pyinf.bench import Clock, Target, ceilings, measure, parse_shape, targets, write_csv
from pyinf.bench.measure import FIELDS
from pyinf.bench.plot import roofline
from pyinf.bench.timing import Timing, copies_needed
from pyinf.cli import app
from pyinf.errors import ConfigError
from pyinf.ops import registry, torch_backend

CPU = torch.device("cpu")
TINY = "d_out=24,d_in=16,length=8,sequences=2,queries=3,rank=2,rows=64,width=32,k=4,sketch=8"
RATES = {"copy": 1e10, "float32": 1e11, "bfloat16": 1e11}


def rows_of(op, providers=("torch", "cpu"), dtype="float32"):
    target = next(targets([op], parse_shape(TINY), [dtype]))
    return {r.provider: r for r in measure(target, providers, Clock(CPU), RATES, 0.005)}


def test_wrong_values_get_no_speed():
    before = list(registry._implementations["gradient_norm"])
    registry.register("gradient_norm", "cpu", lambda g, a, o: torch_backend.gradient_norm(g, a, o) * 1.001)
    try:
        found = rows_of("gradient_norm")
    finally:
        registry._implementations["gradient_norm"] = before
    assert found["cpu"].median_ms is None and found["cpu"].tflops is None and "values are wrong" in found["cpu"].note
    assert found["torch"].median_ms > 0 and found["torch"].ratio_to_torch == 1.0


def test_accumulators_do_not_leak_from_one_provider_into_the_next():
    found = rows_of("accumulate_squared_gradients", ("torch", "cpu", "torch"))
    assert all(r.error is not None and r.error <= r.allowed_error and r.median_ms for r in found.values())


def test_rates_follow_from_time_and_work():
    row = rows_of("random_projection")["torch"]
    assert row.tflops == pytest.approx(row.flops / row.median_ms / 1e9)
    assert row.gb_per_s == pytest.approx(row.bytes / row.median_ms / 1e6)
    floor = max(row.flops / RATES["float32"], row.bytes / RATES["copy"])
    assert row.percent_of_ceiling == pytest.approx(100 * floor / (row.median_ms / 1e3))
    assert row.limit == ("arithmetic" if row.flops / 1e11 > row.bytes / 1e10 else "memory")


@pytest.mark.parametrize(
    ("provider", "op", "reason"),
    [
        ("fast_jl", "random_projection", "fast_jl is not installed"),
        ("sjlt", "sparse_projection", "sjlt is not installed"),
        ("fast_jl", "gradient_norm", "does random_projection only"),
        ("cpu", "gradient_dot", "no C++ kernel"),
    ],
)
def test_a_provider_that_cannot_says_why(provider, op, reason):
    row = rows_of(op, ("torch", provider))[provider]
    assert row.median_ms is None and reason in row.note and row.note.startswith("cannot run")


def test_the_best_torch_formulation_is_named():
    assert rows_of("gradient_dot")["torch"].formulation in ("pyinf's torch backend", "gradients", "grams")


def test_targets_come_once():
    two = [str(t) for t in targets(["accumulate_covariance"], parse_shape("gpt2"), ["float32"])]
    assert len(two) == len(set(two)) == 3  # 768, 2304 and 3072 columns, whatever layer they come from
    assert len(list(targets(["scan_topk"], parse_shape("gpt2"), ["float32"]))) == 3  # no layer in a store


@pytest.mark.parametrize(
    "bad", ["gpt3", "12", "12x", "d_out=3", "d_out=3,d_in=x", "d_out=3,d_in=4,colour=2", "d_out=0,d_in=3", "label=3"]
)
def test_unreadable_shapes_are_refused(bad):
    with pytest.raises(ConfigError, match="d_out"):
        parse_shape(bad)


def test_shapes_by_hand():
    [shape] = parse_shape("512x256")
    assert (shape.d_out, shape.d_in, shape.tokens, shape.flat) == (512, 256, 4096, 512 * 256)
    [shape] = parse_shape(TINY)
    assert shape.lengths == (8, 8) and shape.queries == 3 and shape.label == "24x16"


def test_the_clock_warms_up_and_rotates():
    seen = []
    timing = Clock(CPU).measure([lambda: seen.append("a"), lambda: seen.append("b")], 0.0, least=5, warmup=2)
    assert seen[:2] == ["a", "b"] and seen[2:4] == ["a", "b"] and timing.runs >= 2
    assert timing.low <= timing.median <= timing.high
    assert Timing(2.0, 1.5, 2.5, 9).spread == pytest.approx(0.25)
    assert copies_needed(1 << 30, CPU) == 1 and copies_needed(1 << 10, CPU) == 4


def test_ceilings_are_rates():
    found = ceilings(Clock(CPU), 64, 0.005)
    assert set(found) == {"copy", "bfloat16", "float16", "float32"} and all(v > 0 for v in found.values())


def test_csv_and_roofline(tmp_path):
    import dataclasses

    rows = list(rows_of("gradient_norm").values()) + list(rows_of("scan_topk").values())
    write_csv(rows, tmp_path / "ops.csv")
    with (tmp_path / "ops.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == FIELDS and len(read) == len(rows)
    assert {r["median_ms"] == "" for r in read if r["note"]} == {True}
    assert roofline([dataclasses.asdict(r) for r in rows], RATES, tmp_path / "r.svg", "x").stat().st_size > 1000
    assert roofline(read, RATES, tmp_path / "again.svg") is not None  # a table that was read back
    assert roofline([], RATES, tmp_path / "none.svg") is None


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_the_command(tmp_path):
    out = tmp_path / "out"
    done = bench(
        "--op", "gradient_norm", "--op", "sparse_projection", "--shape", TINY, "--dtype", "float32",
        "--dtype", "bfloat16", "--providers", "torch,cpu,sjlt", "--device", "cpu", "--seconds", "0.01",
        "--out", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "TFLOP/s" in done.stdout and "sjlt is not installed" in done.stdout and "x torch" in done.stdout
    assert (out / "ops.csv").is_file() and (out / "roofline.svg").is_file()
    done = bench("--op", "gradient_norm", "--shape", TINY, "--device", "cpu", "--seconds", "0.01", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["rows"][0]["op"] == "gradient_norm" and found["ceilings"]["copy"] > 0 and "torch" in found["machine"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--op", "gradient_nrm"], "unknown op"),
        (["--dtype", "fp8"], "unknown dtype"),
        (["--providers", "jax"], "unknown provider"),
        (["--providers", ","], "no provider"),
        (["--shape", "gpt3"], "cannot read the shape"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_the_command_refuses(arguments, text):
    done = bench("--device", "cpu", *arguments)
    assert done.exit_code == 2 and text in done.stderr


def test_wrong_values_fail_the_command(monkeypatch):
    before = list(registry._implementations["gradient_norm"])
    registry.register("gradient_norm", "cpu", lambda g, a, o: torch_backend.gradient_norm(g, a, o) * 1.001)
    try:
        done = bench("--op", "gradient_norm", "--shape", TINY, "--device", "cpu", "--seconds", "0.01")
    finally:
        registry._implementations["gradient_norm"] = before
    assert done.exit_code == 1 and "values are wrong" in done.stdout


def test_a_target_prints_what_it_is():
    assert str(Target("scan_topk", parse_shape("3x4")[0], "bfloat16", "int8")) == "scan_topk int8 3x4 bfloat16"
