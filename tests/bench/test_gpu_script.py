"""benchmarks/gpu.sh: the code that a GPU will run blind, run here on the CPU; crashes, hangs and time it must bear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as entry
from benchmarks.gpu import collect, parts, run, sanitizer, special
from benchmarks.gpu.bars import BARS, bars
from benchmarks.gpu.journal import LATE, LOST, Journal, supervise, work
from benchmarks.gpu.options import Options

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        timeout=300,
    )


@pytest.mark.parametrize("part", [p for p in parts.PARTS.values() if p.items], ids=lambda p: p.name)
def test_every_item_of_every_part_runs_on_a_cpu(part, tmp_path):
    """In this process: each shard's items as the worker would run them; none may raise."""
    options = Options("cpu", tmp_path, tiny=True)
    count = 0
    for shard in part.shards(options):
        if part.name == "correctness" and shard.endswith(":torch") and "norm" not in shard:
            continue  # tests/bench/test_bench_verify.py holds the torch backend to more
        for name, item in part.items(shard, options):
            row = item()
            json.dumps(row)
            count += 1
            for one in row if isinstance(row, list) else [row]:
                assert "WRONG" not in str(one.get("state", "")), (name, one)
    assert count > 0


def test_a_run_from_the_command_line(tmp_path):
    """A part in real processes; $OUT gets one archive and the summary."""
    out, back = tmp_path / "run", tmp_path / "back"
    only = ["--device", "cpu", "--tiny", "--out", str(out), "--only", "eigen"]
    done = script(*only, OUT=str(back))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "eigen.json").read_text())
    assert found["complete"] and {r["state"] for r in found["rows"]} == {"done"} and found["tiny"]
    assert "divide-and-conquer ieee" in (out / "eigen.csv").read_text()
    assert "A rehearsal" not in (out / "summary.md").read_text()  # it says so of correctness, which did not run
    assert sorted(p.name for p in back.iterdir()) == ["gpu-results.tar.gz", "summary.md"]
    with tarfile.open(back / "gpu-results.tar.gz") as archive:
        assert "run/eigen.json" in archive.getnames()


def test_a_checkout_that_is_not_installed_finds_its_kernels():
    """As on the machine with the card: no editable install, the sources alone."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
        "from benchmarks.gpu import locate_kernels; locate_kernels(); "
        "import pyinf, pyinf.triton_kernels.launch as l; print(pyinf.__file__, l.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "pyinf" / "__init__.py"), str(ROOT / "triton_kernels" / "launch.py")]


def test_dry_run_lists_parts_that_fit_in_nine_minutes(capsys):
    text = entry.dry_run(list(parts.PARTS), run.TOTAL)
    assert all(f"{name} " in text for name in parts.PARTS)
    assert sum(p.seconds for p in parts.PARTS.values()) <= run.TOTAL < 9 * 60
    assert all(p.limit <= 60 for p in parts.PARTS.values())
    assert entry.main(["--dry-run", "--only", "special"]) == 0
    text = capsys.readouterr().out
    assert "special " in text and "sanitizer" not in text
    with pytest.raises(SystemExit, match="2"):
        entry.main(["--only", "bensch"])
    assert "unknown part 'bensch'" in capsys.readouterr().err


def test_without_a_card_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(run, "capability", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        entry.main(["--device", "cuda"])
    assert "--device cpu --tiny rehearses" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ journals


def journal_of(tmp_path):
    return Journal(tmp_path / "j.jsonl")


def test_work_goes_on_after_a_failure_and_leaves_out_what_is_known(tmp_path):
    journal, ran = journal_of(tmp_path), []
    journal.add(id="known", state="done", row=1)

    def fails():
        raise ValueError("two\nlines")

    items = [("known", lambda: ran.append(0)), ("bad", fails), ("good", lambda: ran.append(1) or {"x": 2})]
    assert work(items, journal, time.time() + 60, lambda: None) == 0
    states = journal.states()
    assert ran == [1] and states["good"]["row"] == {"x": 2}
    assert states["bad"]["state"] == "failed" and states["bad"]["reason"] == "ValueError: two lines"
    assert journal.open_item() is None


def test_a_lost_context_ends_the_process(tmp_path):
    def fails():
        raise RuntimeError("illegal memory access")

    items = [("bad", fails), ("next", lambda: pytest.fail("ran in a lost context"))]
    assert work(items, journal_of(tmp_path), time.time() + 60, fails) == LOST


def test_no_item_is_started_after_the_deadline(tmp_path):
    journal = journal_of(tmp_path)
    assert work([("late", lambda: pytest.fail("ran"))], journal, time.time() - 1, lambda: None) == LATE
    assert journal.lines() == []


WORKER = """
import os, sys, time, pathlib
sys.path.insert(0, {root!r})
from benchmarks.gpu.journal import Journal, work
def die(): os.kill(os.getpid(), 11)
def hang(): time.sleep(600)
def lose(): raise RuntimeError("illegal memory access")
def sick():
    raise RuntimeError("gone")
names = {{"ok 1": dict, "crash": die, "ok 2": dict, "hang": hang, "lost": lose, "ok 3": dict}}
sys.exit(work(names.items(), Journal(pathlib.Path({journal!r})), {deadline}, sick))
"""


def test_crashes_hangs_and_lost_contexts_cost_their_item_only(tmp_path):
    journal = journal_of(tmp_path)
    code = WORKER.format(root=str(ROOT), journal=str(journal.path), deadline=time.time() + 120)
    command = ["{python}", "-c", code]
    assert supervise(command, journal, tmp_path / "log", time.time() + 120, limit=5) == ""
    states = {name: line["state"] for name, line in journal.states().items()}
    assert states == {
        "ok 1": "done",
        "crash": "crashed",
        "ok 2": "done",
        "hang": "hung",
        "lost": "failed",
        "ok 3": "done",
    }
    assert (
        "status -11" in journal.states()["crash"]["reason"] and "no answer in 5 s" in journal.states()["hang"]["reason"]
    )


def test_the_time_of_a_part_ends_it(tmp_path):
    journal = journal_of(tmp_path)
    journal.add(id="x", state="started")
    code = "import time; time.sleep(60)"
    begun = time.time()
    assert supervise(["{python}", "-c", code], journal, tmp_path / "log", begun + 2, limit=30) == "its time ended"
    assert time.time() - begun < 20 and journal.states()["x"]["state"] == "cut"
    ran = []
    assert work([("x", lambda: ran.append(1))], journal, time.time() + 60, lambda: None) == 0 and ran == [1]


def test_a_worker_that_cannot_start_is_named(tmp_path):
    end = supervise(
        ["{python}", "-c", "raise SystemExit(3)"], journal_of(tmp_path), tmp_path / "log", time.time() + 60, 30
    )
    assert "status 3" in end


def test_parts_share_their_time(tmp_path, monkeypatch):
    """A part gets its own time, one that may stretch also what is left over, and the last one everything."""
    given = {}

    def record(part, options, seconds, again):
        given[part.name] = seconds
        return {"part": part.name, "rows": [], "complete": True, "note": "", "seconds": 0}

    monkeypatch.setattr(run, "run_part", record)
    run.run_all(Options("cpu", tmp_path, True), list(parts.PARTS), total=530)
    assert given["special"] == parts.PARTS["special"].seconds
    assert parts.PARTS["correctness"].seconds < given["correctness"] <= 1.8 * parts.PARTS["correctness"].seconds
    assert given["bench"] > 500
    given.clear()
    run.run_all(Options("cpu", tmp_path, True), list(parts.PARTS), total=4)
    assert given == {}


# ------------------------------------------------------------------------------------------ what only a GPU reaches


def test_the_architecture_of_the_card():
    assert run.architecture("9.0") == "9.0a" and run.architecture("8.6") == "8.6"
    sys.path.insert(0, str(ROOT / "tools"))
    from build_extension import parse_arch_list

    assert parse_arch_list(run.architecture("9.0")) == (["90a"], [])


def test_the_build_for_a_card(tmp_path, monkeypatch):
    seen = {}

    def fake(command, **options):
        seen.update(command=command, env=options["env"])
        return subprocess.CompletedProcess(command, 0, "compiled")

    monkeypatch.setattr(run, "capability", lambda: "9.0")
    monkeypatch.setattr(run.subprocess, "run", fake)
    found = run.build(Options("cuda", tmp_path), time.time() + 60)
    assert found["complete"] and seen["env"]["TORCH_CUDA_ARCH_LIST"] == "9.0a" and seen["env"]["PYINF_CUDA"] == "1"
    assert Path(seen["command"][1]).is_file()
    monkeypatch.setattr(run.subprocess, "run", lambda c, **o: subprocess.CompletedProcess(c, 1, "no nvcc"))
    found = run.build(Options("cuda", tmp_path), time.time() + 60)
    assert not found["complete"] and "Triton kernels only" in found["note"]


def test_the_command_of_the_sanitizer(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: "/x/compute-sanitizer")
    assert sanitizer.prefix("racecheck:triton")[:3] == ["/x/compute-sanitizer", "--tool", "racecheck"]
    shards = sanitizer.shards(Options("cuda", tmp_path))
    assert shards[0] == sanitizer.CONTROL and "synccheck:cuda" in shards and len(shards) == 7
    assert sanitizer.environment("memcheck:cuda") == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    monkeypatch.setattr(sanitizer, "tool", lambda: None)
    assert sanitizer.shards(Options("cuda", tmp_path)) == []
    assert "not on this machine" in run._nothing(parts.PARTS["sanitizer"], Options("cuda", tmp_path))


@pytest.mark.parametrize(
    ("shard", "log", "state"),
    [
        ("memcheck:triton", "========= ERROR SUMMARY: 0 errors", "ok"),
        ("memcheck:triton", "========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors", "WRONG"),
        ("racecheck:cuda", "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "WRONG"),
        ("racecheck:cuda", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        ("memcheck:triton", "Error: Device not supported", "no summary"),
        (sanitizer.CONTROL, "========= ERROR SUMMARY: 128 errors", "ok: found"),
        (sanitizer.CONTROL, "========= ERROR SUMMARY: 0 errors", "WRONG: the planted"),
        # a worker that was started again: each start leaves its own summary
        ("memcheck:cuda", "ERROR SUMMARY: 1 error\nERROR SUMMARY: 0 errors", "WRONG"),
    ],
)
def test_reports_of_the_sanitizer_are_read(tmp_path, shard, log, state):
    (tmp_path / "log").write_text(log)
    assert run._sanitizer_row(shard, tmp_path / "log")["state"].startswith(state)


def test_far_rows_are_far():
    import torch

    kind = type("Far", (special.FarInputs,), {"far": 1 << 12})
    x = kind(torch.float32, torch.device("cpu")).matrix(10, 7)
    assert x.shape == (10, 7) and x.stride(0) * 9 > 1 << 12 and x.stride(0) % 8 == 0
    assert special.FarInputs.far > 2**31


def test_a_kernel_with_32_bit_offsets_would_be_found(monkeypatch):
    """A stand-in that wraps row offsets at 2¹⁴, as a 32-bit one wraps at 2³¹."""
    import torch

    from pyinf.ops import registry, torch_backend

    def wraps(g, a, offsets):
        rows = (torch.arange(g.shape[0]) * g.stride(0)) % (1 << 14)
        near = g.as_strided((1 << 14,), (1,))
        g = near[(rows[:, None] + torch.arange(g.shape[1])) % (1 << 14)]
        return torch_backend.gradient_norm(g, a, offsets)

    before = list(registry._implementations["gradient_norm"])
    registry.register("gradient_norm", "cpu", wraps)
    try:
        state = special.far_rows("gradient_norm", "cpu", "float32", torch.device("cpu"), 1 << 16)
    finally:
        registry._implementations["gradient_norm"] = before
    assert state.startswith("WRONG")


# ------------------------------------------------------------------------------------------ results


def fake_run(folder, state="ok", tiny=False, note=""):
    rows = [
        {"shard": "gradient_norm:triton", "item": f"case {i}", "state": "ok", "error": 1e-7, "reason": ""}
        for i in range(3)
    ]
    rows[1]["state"] = state
    rows.append({"shard": "scan_topk:cuda", "item": "c", "state": "not taken", "reason": "no sm_70"})
    facts = {"item": "facts", "state": "done", "shard": "all", "device": "Card X", "torch": "2.11", "extension": "none"}
    for name, found in (("correctness", rows), ("environment", [facts])):
        body = {"part": name, "rows": found, "complete": not note, "note": note, "tiny": tiny, "seconds": 1}
        run.write_json(folder / f"{name}.json", body)
    collect.write_verified(folder)


@pytest.mark.parametrize("state", ["ok", "WRONG", "failed", "crashed", "hung"])
def test_only_what_passed_every_call_is_verified(tmp_path, state):
    fake_run(tmp_path, state)
    found = json.loads((tmp_path / "verified.json").read_text())
    assert ("gradient_norm" in found) == (state == "ok") and "scan_topk" not in found
    assert ("WRONG" in collect.summarise(tmp_path)) == (state in ("WRONG", "failed"))


@pytest.mark.parametrize(("test", "state", "good"), [("far rows", "WRONG: error 1", False), ("graph", "failed", True)])
def test_a_stream_or_an_offset_may_undo_it(tmp_path, test, state, good):
    fake_run(tmp_path)
    row = {"shard": "triton:0", "item": f"gradient_norm:triton {test}", "state": state, "reason": ""}
    run.write_json(tmp_path / "special.json", {"part": "special", "rows": [row], "complete": True, "note": ""})
    assert (collect.judged(tmp_path)["gradient_norm", "triton"] == "verified") == good


def test_calls_that_were_not_made_verify_nothing(tmp_path):
    fake_run(tmp_path, note="gradient_norm:triton: its time ended")
    assert json.loads((tmp_path / "verified.json").read_text()) == {}


def test_the_record_is_what_the_library_reads(tmp_path, monkeypatch):
    from pyinf.ops import verified

    monkeypatch.setenv("PYINF_CACHE", str(tmp_path))
    fake_run(tmp_path)
    verified._records.cache_clear()
    try:
        assert verified.is_verified("gradient_norm", "Card X", "triton")
        assert not verified.is_verified("gradient_norm", "Card X", "cuda")
    finally:
        verified._records.cache_clear()


def test_merging_strikes_what_is_wrong_now(tmp_path):
    target = tmp_path / "all.json"
    fake_run(tmp_path)
    collect.merge_verified(tmp_path, target)
    assert "gradient_norm" in json.loads(target.read_text())
    fake_run(tmp_path, "WRONG")
    collect.merge_verified(tmp_path, target)
    assert json.loads(target.read_text()) == {}
    fake_run(tmp_path, tiny=True)
    with pytest.raises(SystemExit, match="rehearsal"):
        collect.merge_verified(tmp_path, target)


def test_a_missing_run_has_a_summary(tmp_path):
    text = collect.summarise(tmp_path)
    assert text.count("not run") >= 8 and "not measured" in text


def test_bars_are_met_or_missed_by_numbers():
    row = {"op": "accumulate_covariance", "provider": "triton", "dtype": "bfloat16", "shape": "s", "variant": ""}
    row |= {"sizes": "tokens=8192 d_in=4096", "median_ms": 1.0, "ratio_to_torch": 1.6, "percent_of_ceiling": 70.0}
    row |= {"limit": "arithmetic", "note": ""}
    small = {**row, "sizes": "tokens=8192 d_in=768"}
    wrong = {**row, "median_ms": None, "ratio_to_torch": None, "note": "no speed: values are wrong"}
    text = [line for line in bars([row, small, {**row, "ratio_to_torch": 1.2}, wrong]) if "covariance" in line]
    assert ["yes" in t for t in text] == [True, False, False] and "**no**" in text[1] and "values are wrong" in text[2]
    theirs = {**row, "op": "random_projection", "provider": "fast_jl", "median_ms": 9.0}
    ours = {**row, "op": "random_projection", "provider": "cuda", "median_ms": 1.0}
    assert any("9.00 | yes" in line for line in bars([theirs, ours]))
    from pyinf.bench import OPS

    assert {bar.op for bar in BARS} <= OPS.keys()
