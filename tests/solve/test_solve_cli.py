"""Tolerances, method options and certificates on the command line and in the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from cli_data import rows, run, write

import pyinf
from pyinf.report import ReportData
from tests.tiny_model import save_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    home = tmp_path_factory.mktemp("model")
    tokenizer = save_tokenizer(home, [r["prompt"] + " " + r["response"] for r in rows(40)], 280, special=())
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(home)
    return home


def test_a_refined_run_shows_saves_and_reports_its_certificates(model_dir, tmp_path):
    train, queries = write(tmp_path / "t.jsonl", rows(12)), write(tmp_path / "q.jsonl", rows(2, 100))
    base = ["attribute", "--model", model_dir, "--train", train, "--queries", queries, "--seed", 1]
    base += ["--method", "ekfac_cg", "--damping", 3]
    out = tmp_path / "x"
    result = run(*base, "--out", out, "--tol", 0.05, "--method-option", "max_iterations=60")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "certificate: solved (relative residual" in text and "certificates 2 solved" in text
    scores = pyinf.Scores.load(out / "scores")
    assert [entry["verdict"] for entry in scores.certificate] == ["solved"] * 2
    assert all(entry["relative_residual"] <= 0.05 == entry["tol"] for entry in scores.certificate)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["certificate"] == scores.certificate
    report = ReportData.from_json((out / "report.json").read_text())
    assert report.queries[0].certificate["verdict"] == "solved"
    table = next(t for t in report.tables if t.title == "Certificates")
    assert table.columns[:3] == ["query", "verdict", "relative residual"] and len(table.rows) == 2
    assert "relative residual" in (out / "report.html").read_text()
    short = run(*base, "--out", tmp_path / "y", "--no-report", "--method-option", "max_iterations=1", "--tol", 1e-6)
    assert "stopped after 1 iterations" in " ".join(short.stdout.split())
    plain = run(*base[:-4], "--out", tmp_path / "z", "--no-report", "--certify")
    assert plain.exit_code == 0 and "certificates  2 " in plain.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_iterations=0", "max_iterations is '0'; it must be a whole number of at least 1"),
        ("depth=3", "unknown option 'depth' for method 'ekfac_cg'"),
        ("max_iterations", "'max_iterations' is not of the form name=value"),
    ],
)
def test_wrong_method_options_are_refused_before_a_model_is_loaded(tmp_path, option, message):
    train = write(tmp_path / "t.jsonl", rows(3))
    result = run(
        "attribute", "--model", "nowhere", "--train", train, "--queries", train, "--out", tmp_path / "x",
        "--method", "ekfac_cg", "--method-option", option,
    )  # fmt: skip
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
