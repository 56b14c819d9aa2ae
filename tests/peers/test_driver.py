"""The benchmark's driver: keeping and repeating runs, failures in the open, medians, the floor; no peer needed."""

import argparse
import csv
import json
import math

import numpy as np
import pytest
import vs_peers
from analysis import Entry, csv_rows, fill_agreement, floor, load_entry, table
from common import Recorder
from inputs import SHAPES, Shape, make_inputs
from reference import agreement


def _options(tmp_path, **changes):
    return argparse.Namespace(**{"threads": 1, "timeout": 120.0, "work": tmp_path, **changes})


def _result(seconds, **changes):
    stages = {name: {"seconds": value, "peak_mb": 100.0 + value} for name, value in seconds.items()}
    total = sum(v for k, v in seconds.items() if k != "setup")
    return {
        "version": "1.0",
        "settings": "fp32",
        "stages": stages,
        "total_seconds": total,
        "peak_mb": max(s["peak_mb"] for s in stages.values()),
        **changes,
    }


@pytest.mark.slow
def test_one_command_measures_writes_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vs_peers, "_source_of", lambda name: {})  # the source may be edited while this runs
    arguments = ["--shape", "tiny", "--repeats", "1", "--threads", "1", "--libraries", "pyinf", "--reference", "no"]
    arguments += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    vs_peers.main(arguments)
    first = capsys.readouterr().out
    assert "kept" not in first and "arithmetic floor" in first
    rows = list(csv.DictReader((tmp_path / "out" / "tiny.csv").open()))
    of_pyinf = {row["stage"]: float(row["seconds_median"]) for row in rows if row["library"] == "pyinf"}
    assert {"covariances", "eigendecomposition", "lambda", "queries", "scores", "total"} <= set(of_pyinf)
    assert math.isclose(of_pyinf.pop("total"), sum(of_pyinf.values()), abs_tol=0.01)
    assert {"forward", "activations", "weights"} == {row["stage"] for row in rows if row["library"] == "bare"}
    facts = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert facts["threads"] == 1 and facts["interleaved"] and facts["matrix_rate_flops"]["float32"] > 0
    assert (tmp_path / "out" / "tiny.svg").stat().st_size > 1000
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 1000
    vs_peers.main(arguments)
    assert capsys.readouterr().out.count("kept") == 2, "a second call uses the finished runs"


def test_missing_environment_is_shown_and_retried(tmp_path, monkeypatch):
    monkeypatch.setattr(vs_peers, "ENVS", tmp_path / "nowhere")
    shape = SHAPES["tiny"]
    folder = tmp_path / "r0"
    line = vs_peers.run_once("bergson", folder, tmp_path, {"k": 1}, _options(tmp_path))
    assert line.startswith("FAILED") and "envs.py bergson" in line
    assert vs_peers.run_once("bergson", folder, tmp_path, {"k": 1}, _options(tmp_path)).startswith("FAILED")
    entry = load_entry("bergson", [folder])
    assert not entry.results and "environment missing" in entry.error
    assert "environment missing" in csv_rows(shape, [entry])[0]["error"]
    assert "FAILED: environment missing" in table([entry], [])


def test_failing_and_endless_runs_say_why(tmp_path, monkeypatch):
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "run_bare.py").write_text("raise ValueError('no such thing')\n")
    monkeypatch.setattr(vs_peers, "PEERS", peers)
    line = vs_peers.run_once("bare", tmp_path / "a", tmp_path, {}, _options(tmp_path))
    assert "exit 1: ValueError: no such thing" in line
    (peers / "run_bare.py").write_text("import time\ntime.sleep(60)\n")
    line = vs_peers.run_once("bare", tmp_path / "b", tmp_path, {}, _options(tmp_path, timeout=0.3))
    assert "no result after 0.3 s" in line


def test_a_run_of_other_inputs_is_not_kept(tmp_path, monkeypatch):
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "run_bare.py").write_text(
        "import json, pathlib\npathlib.Path('result.json').write_text(json.dumps({'total_seconds': 1.0}))\n"
    )
    monkeypatch.setattr(vs_peers, "PEERS", peers)
    folder = tmp_path / "r0"
    assert vs_peers.run_once("bare", folder, tmp_path, {"inputs": "x"}, _options(tmp_path)).startswith("1.00 s")
    assert vs_peers.run_once("bare", folder, tmp_path, {"inputs": "x"}, _options(tmp_path)) == "kept"
    assert vs_peers.run_once("bare", folder, tmp_path, {"inputs": "y"}, _options(tmp_path)) != "kept"


def test_medians_ratios_and_what_counts_as_a_peer():
    fast = Entry("bergson", [_result({"setup": 9.0, "lambda": s, "scores": 1.0}) for s in (3.0, 1.0, 2.0)])
    slow = Entry("dattri_llm:memory", [_result({"capture": 4.0, "scores": 2.0})])
    check = Entry("kronfluence:all_but_last", [_result({"scores": 0.5})])
    mine = Entry("pyinf", [_result({"lambda": 0.5, "scores": 1.0})])
    rows = {(r["library"], r["stage"]): r for r in csv_rows(SHAPES["tiny"], [mine, fast, slow, check])}
    total = rows["bergson", "total"]
    assert (total["seconds_median"], total["seconds_min"], total["seconds_max"], total["runs"]) == (3.0, 2.0, 4.0, 3)
    assert rows["pyinf", "total"]["ratio_to_fastest_peer"] == 0.5, "the check is no peer, setup does not count"
    assert ("bergson", "setup") not in rows
    assert rows["dattri_llm", "capture"]["variant"] == "memory"
    assert "fastest peer: bergson, 3.00 s" in table([mine, fast, slow, check], [])


def test_agreement_is_with_the_same_covariance_positions():
    generator = np.random.default_rng(0)
    every, masked = generator.normal(size=(2, 9)), generator.normal(size=(2, 9))
    entries = [
        Entry("kronfluence", [_result({"scores": 1.0}, positions="all")], every),
        Entry("kronfluence:all_but_last", [_result({"scores": 1.0}, positions="all_but_last")], masked),
        Entry("pyinf", [_result({"scores": 1.0}, positions="all")], every * 1.001),
        Entry("bergson", [_result({"scores": 1.0}, positions="all_but_last")], masked),
    ]
    fill_agreement(entries, {"all": every})
    assert entries[0].vs_kronfluence is None and entries[0].vs_float64 == pytest.approx((1.0, 0.0))
    assert entries[2].vs_kronfluence == pytest.approx((1.0, 1e-3))
    assert entries[3].vs_kronfluence == pytest.approx((1.0, 0.0)) and entries[3].vs_float64 is None


def test_agreement_sees_scale_and_the_worst_query():
    target = np.array([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]])
    scores = np.array([[2.0, 4.0, 6.0], [-1.0, 0.0, -1.0]])
    pearson, difference = agreement(scores, target)
    assert pearson == pytest.approx(-1.0)
    assert difference == pytest.approx(np.linalg.norm(scores - target) / np.linalg.norm(target))


def test_floor_counts_shared_inputs_once_and_takes_the_cheaper_order():
    shape = Shape("x", "llama", 3, 8, 16, 2, 10, 64, 5, 2, 4, 5)
    rows = {row["stage"]: row for row in floor(shape, rate=1e3, passes_seconds=7.0)}
    n, d, m = 20, 8, 16
    inputs, outputs = [d, d, d, m], [d, d, d, d, m, m, d]  # q, k, v share one input; gate and up share one
    assert rows["covariances"]["flops"] == 3 * n * sum(w * w for w in inputs + outputs)
    assert rows["eigendecomposition"]["flops"] == pytest.approx(3 * 14 / 3 * sum(w**3 for w in inputs + outputs))
    pairs = [(d, d)] * 4 + [(d, m)] * 2 + [(m, d)]
    assert rows["scores"]["flops"] == 3 * sum(n * 2 * i * o + 2 * 5 * 2 * i * o for i, o in pairs)
    assert rows["one model pass"]["seconds"] == pytest.approx(7.0 * (1 + 2 / 5))
    assert rows["total"]["seconds"] == pytest.approx(sum(r["seconds"] for k, r in rows.items() if k != "total"))
    assert rows["scores"]["seconds"] == rows["scores"]["flops"] / 1e3


def test_stages_nest_without_counting_twice():
    recorder = Recorder()
    with recorder.stage("outer"):
        with recorder.stage("inner"):
            block = bytearray(64 << 20)
            block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
            del block
    assert set(recorder.stages) == {"outer", "inner"}
    assert recorder.stages["inner"]["seconds"] > recorder.stages["outer"]["seconds"]
    assert recorder.stages["inner"]["peak_mb"] > recorder.stages["outer"]["peak_mb"] + 40, "a stage's peak is its own"


def test_inputs_are_made_once_and_the_same_again(tmp_path):
    shape = SHAPES["tiny_gpt2"]
    first = make_inputs(shape, tmp_path / "a")
    stamp = (tmp_path / "a" / "model" / "model.safetensors").stat().st_mtime_ns
    assert make_inputs(shape, tmp_path / "a") == first
    assert (tmp_path / "a" / "model" / "model.safetensors").stat().st_mtime_ns == stamp
    assert make_inputs(shape, tmp_path / "b") == first
    train = np.load(tmp_path / "a" / "train.npy")
    assert train.shape == (shape.train, shape.length) and train.max() < shape.vocabulary
