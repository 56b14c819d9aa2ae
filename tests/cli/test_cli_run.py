"""The commands do their work, go on where they stopped, and can be replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cli_data import rows, run, words, write

import pyinf
from pyinf.data import load_examples, load_model, load_tokenizer
from pyinf.errors import ArtifactError


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_attribute_does_the_whole_of_it(model_dir, files, tmp_path):
    train, queries = files
    out = tmp_path / "runs" / "x"
    base = ["attribute", "--model", model_dir, "--train", train, "--queries", queries, "--out", out, "--no-report"]
    result = ok(*base, "--topk", 3, "--show", 2)
    for text in ("layers traced", "% of", "memory", "passes over the training set", "estimated time", "ekfac"):
        assert text in result.stderr
    for stage in ("covariances", "eigenbases", "corrected eigenvalues", "query gradients", "training pass and scores"):
        assert any(line.startswith(stage) and "/s)" in line for line in result.stderr.splitlines()), stage
    assert "query 1: Determine the sentiment: i feel sad 101" in result.stdout and "query 2" not in result.stdout
    assert "happy" in result.stdout and "and 3 more queries" in result.stdout
    saved = pyinf.Scores.load(out / "scores")
    model = load_model(model_dir, device="cpu")
    tokenizer = load_tokenizer(model_dir)
    own = pyinf.attribute(model, load_examples(train, tokenizer), load_examples(queries, tokenizer))
    assert torch.allclose(saved.values, own.values, rtol=1e-4, atol=1e-3 * float(own.values.abs().max()))
    assert {p.name for p in out.iterdir()} == {"config.yaml", "fit", "run.json", "scores", "summary.json"}


def test_the_same_run_goes_on_and_another_is_refused(model_dir, files, tmp_path):
    train, queries = files
    out = tmp_path / "x"
    base = ["attribute", "--model", model_dir, "--train", train, "--queries", queries, "--out", out, "--no-report"]
    ok(*base)
    before = (out / "scores" / "scores.safetensors").read_bytes()
    again = ok(*base, "--topk", 2)
    assert "scores found in" in again.stderr and "covariances:" not in again.stderr
    for path in (out / "scores").iterdir():
        path.unlink()
    third = ok(*base)
    assert "not fitted again" in third.stderr
    assert (out / "scores" / "scores.safetensors").read_bytes() == before
    other = run(*base, "--damping", "0.5")
    assert other.exit_code == ArtifactError.exit_code
    assert "holds a different run (options.damping: 0.1 → 0.5); choose another output directory" in other.stderr
    write(train, rows(23))
    changed = run(*base)
    assert changed.exit_code == ArtifactError.exit_code and "train:" in changed.stderr


def test_config_is_written_and_replays(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own.jsonl", [{"q": r["prompt"], "a": r["response"]} for r in rows(12)])
    first = tmp_path / "first"
    given = ["--model", model_dir, "--train", "own.jsonl", "--queries", "own.jsonl", "--query-limit", 3]
    shape = ["--field", "prompt=q", "--field", "response=a", "--modules", "*mlp*", "--modules", "*q_proj"]
    more = ["--damping", "0.3", "--fisher", "empirical", "--query-rank", "0.99", "--prompt-loss", "--separator", " => "]
    ok("attribute", *given, *shape, *more, "--out", "first", "--no-report", "--topk", 2)
    config = first / "config.yaml"
    kept = yaml.safe_load(config.read_text())
    assert kept["modules"] == ["*mlp*", "*q_proj"] and kept["field"] == ["prompt=q", "response=a"]
    assert kept["query_rank"] == "0.99" or kept["query_rank"] == 0.99
    assert Path(kept["train"]).is_absolute() and kept["separator"] == " => "
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = tmp_path / "second"
    ok("attribute", "--config", config, "--out", second)
    a, b = pyinf.Scores.load(first / "scores"), pyinf.Scores.load(second / "scores")
    assert torch.equal(a.values, b.values) and a.values.shape == (3, 12)
    again = yaml.safe_load((second / "config.yaml").read_text())
    assert {k: v for k, v in again.items() if k != "out"} == {k: v for k, v in kept.items() if k != "out"}
    ok("attribute", "--config", config, "--out", tmp_path / "third", "--damping", "1.0")
    assert yaml.safe_load((tmp_path / "third" / "config.yaml").read_text())["damping"] == 1.0


def test_fit_then_score(model_dir, files, tmp_path):
    train, queries = files
    fitted = ok("fit", "--model", model_dir, "--train", train, "--out", tmp_path / "f", "--damping", "0.2")
    assert "factors" in fitted.stdout
    scored = ok("score", "--fit", tmp_path / "f", "--queries", queries, "--out", tmp_path / "s", "--no-report")
    assert "0 to fit, 1 to score" in words(scored.stderr)
    direct = tmp_path / "d"
    base = ["--model", model_dir, "--train", train, "--queries", queries, "--damping", "0.2", "--no-report"]
    ok("attribute", *base, "--out", direct)
    one, two = pyinf.Scores.load(tmp_path / "s" / "scores"), pyinf.Scores.load(direct / "scores")
    assert torch.allclose(one.values, two.values, rtol=1e-4, atol=1e-4 * float(two.values.abs().max()))
    fit = ["score", "--fit", tmp_path / "f", "--queries", queries]
    ok(*fit, "--out", tmp_path / "tokens", "--granularity", "token")
    tokens = pyinf.Scores.load(tmp_path / "tokens" / "scores")
    assert tokens.values.dim() == 3
    assert torch.allclose(tokens.total(), one.values, rtol=1e-3, atol=1e-3 * float(one.values.abs().max()))
    ok(*fit, "--out", tmp_path / "modules", "--per-module")
    assert len(pyinf.Scores.load(tmp_path / "modules" / "scores").values) == 14
    ok(*fit, "--out", tmp_path / "top", "--only-top", "--topk", 4)
    assert pyinf.Scores.load(tmp_path / "top" / "scores").kept[0].shape == (5, 4)
    replay = ok("score", "--config", tmp_path / "s" / "config.yaml", "--out", tmp_path / "r")
    assert "0 to fit" in words(replay.stderr)


@pytest.mark.parametrize("method", ["grad_dot", "grad_cos", "bm25", "kfac", "diagonal"])
def test_other_methods(model_dir, files, tmp_path, method):
    train, queries = files
    base = ["--model", model_dir, "--train", train, "--queries", queries, "--no-report"]
    ok("attribute", *base, "--out", tmp_path / "x", "--method", method)
    assert pyinf.Scores.load(tmp_path / "x" / "scores").values.shape == (5, 24)


def test_json_and_quiet(model_dir, files, tmp_path):
    train, queries = files
    base = ["attribute", "--model", model_dir, "--train", train, "--queries", queries, "--out", tmp_path / "x"]
    result = ok(*base, "--no-report", "--json", "--quiet", "--topk", 2, "--method", "grad_dot")
    summary = json.loads(result.stdout)
    assert summary["queries"] == 5 and len(summary["top"]) == 5 and len(summary["top"][0]["train"]) == 2
    assert summary == json.loads((tmp_path / "x" / "summary.json").read_text())
    assert result.stderr == ""
    quiet = ok(*base, "--no-report", "--quiet", "--method", "grad_dot")
    assert quiet.stdout == quiet.stderr == ""


def test_version_help_and_no_stubs():
    assert ok("--version").stdout == f"pyinf {pyinf.__version__}\n"
    shown = ok("--help").stdout
    for command in ("attribute", "fit", "score", "report", "evaluate", "bench", "doctor", "demo"):
        assert command in shown
        assert ok(command, "--help").exit_code == 0
    for command in ("store", "study"):
        assert run(command).exit_code == 2


def start(*arguments, **kwargs):
    code = "from pyinf.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pyinf.__file__).parents[1])}
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that: undo it.
    undo = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, **undo, **kwargs)


def test_a_real_process(model_dir, files, tmp_path):
    train, queries = files
    base = ["attribute", "--model", model_dir, "--train", train, "--queries", queries, "--no-report", "--limit", 8]
    process = start(*base, "--out", tmp_path / "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "query 0:" in out and "corrected eigenvalues" in err and "Traceback" not in err


def test_interrupt(model_dir, tmp_path):
    train = write(tmp_path / "big.jsonl", [{"text": r["prompt"] * 3} for r in rows(6000)])
    base = ["attribute", "--model", model_dir, "--train", train, "--queries", train, "--query-limit", 2, "--no-report"]
    process = start(*base, "--batch-size", 1, "--out", tmp_path / "x", stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while not (tmp_path / "x" / "fit").exists() and time.time() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "goes on where this one stopped" in err and "Traceback" not in err
