"""Report, doctor and demo from the command line; and a run on real data where it is present."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_data import run

import pyinf
from pyinf.errors import ArtifactError


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_a_run_ends_in_a_report_that_can_be_written_again(model_dir, files, tmp_path):
    train, queries = files
    out = tmp_path / "x"
    base = ["attribute", "--model", model_dir, "--train", train, "--queries", queries, "--out", out, "--topk", 3]
    result = ok(*base)
    assert f"report  {out / 'report.html'}" in result.stdout and "report: " in result.stderr
    assert not (out / "unfinished").exists()
    page = (out / "report.html").read_text()
    assert "i feel happy 100" in page and "train.jsonl" in page and "angry" in page
    data = json.loads((out / "report.json").read_text())
    assert len(data["queries"]) == 5 and len(data["queries"][0]["top"]) == len(data["queries"][0]["bottom"]) == 3
    assert data["queries"][0]["top"][0]["token_scores"] is not None
    (out / "report.html").unlink()
    summary = json.loads(ok("report", out, "--json").stdout)
    assert summary["queries"] == 5 and (out / "report.html").read_text() == page
    ok("report", out / "report.json", "--out", tmp_path / "copy.html", "--quiet")
    assert (tmp_path / "copy.html").read_text() == page
    again = ok(*base[:-1], 4, "--show", 0)  # scores and factors are there; only the page is new
    assert "covariances:" not in again.stderr and "scores found" in again.stderr
    assert len(json.loads((out / "report.json").read_text())["queries"][0]["top"]) == 4
    (out / "report.json").write_text("{")
    broken = run("report", out)
    assert broken.exit_code == ArtifactError.exit_code and "report.json" in broken.stderr


@pytest.mark.parametrize("extra", [["--only-top"], ["--per-module"], ["--granularity", "token"], ["--method", "bm25"]])
def test_every_kind_of_score_has_a_report(model_dir, files, tmp_path, extra):
    train, queries = files
    if "bm25" not in extra:
        ok("fit", "--model", model_dir, "--train", train, "--out", tmp_path / "f")
        extra = [*extra, "--fit", tmp_path / "f"]
    base = ["score", "--model", model_dir, "--train", train, "--queries", queries, "--out", tmp_path / "s", "--topk", 2]
    ok(*base, *extra)
    assert (tmp_path / "s" / "report.html").exists()


def test_doctor():
    text = ok("doctor").stdout
    assert pyinf.__version__ in text and "torch" in text and "backends" in text
    assert "versions" in json.loads(ok("doctor", "--json").stdout)


def test_demo(tmp_path):
    result = ok("demo", "--out", tmp_path / "d", "--quick", "--device", "cpu")
    assert (tmp_path / "d" / "report.html").exists() and "EK-FAC" in result.stdout
    assert "planted" in (tmp_path / "d" / "report.html").read_text()


EMOTION = Path(os.environ.get("PYINF_EMOTION", Path(__file__).parents[3] / "shared/data/emotion"))


@pytest.mark.skipif(not (EMOTION / "train.jsonl").exists(), reason="the emotion data are not here (PYINF_EMOTION)")
def test_real_files(model_dir, tmp_path):
    sources = ["--train", EMOTION / "train.jsonl", "--queries", EMOTION / "test.jsonl"]
    limits = ["--limit", 60, "--query-limit", 4, "--truncate"]
    ok("attribute", "--model", model_dir, *sources, *limits, "--out", tmp_path / "x", "--method", "grad_dot")
    scores = pyinf.Scores.load(tmp_path / "x" / "scores")
    assert scores.values.shape == (4, 60)
    assert '"label"' in (tmp_path / "x" / "report.json").read_text()
