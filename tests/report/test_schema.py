from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_data import report

from pyinf.errors import ArtifactError
from pyinf.report import Histogram, ReportData
from pyinf.report.html import histogram


def test_round_trip(tmp_path):
    data = report()
    data.queries[0].top[1].tokens.pop()  # a lone surrogate has no UTF-8 form
    data.queries[0].top[1].token_scores.pop()
    for query in data.queries[1:]:
        query.top = []
    data.queries[0].top[1].text = "x"
    data.save(tmp_path / "report.json")
    assert ReportData.load(tmp_path / "report.json") == data
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def _broken(change):
    raw = json.loads(report(1).to_json())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda r: r.update(format="other"), "pyinf report"),
        (lambda r: r.update(version=99), "version 99"),
        (lambda r: r.update(version=True), "version True"),
        (lambda r: r.pop("model"), "lacks model"),
        (lambda r: r.update(extra=1), "unknown fields extra"),
        (lambda r: r.update(train_size="3"), "train_size should be int"),
        (lambda r: r.update(train_size=True), "train_size should be int"),
        (lambda r: r["queries"][0]["top"][0].update(score="1"), r"queries\[0\].top\[0\].score"),
        (lambda r: r["queries"][0]["top"][0]["token_scores"].pop(), "one token score a token"),
        (lambda r: r["queries"][0]["counted"].pop(), "loss marks"),
        (lambda r: r["queries"][0]["histogram"]["counts"].pop(), "one edge more"),
        (lambda r: r["queries"][0]["histogram"]["edges"].reverse(), "rising edges"),
        (lambda r: r["stages"].append(["x"]), "list of 2"),
        (lambda r: r["tables"][0]["rows"].append([1]), "another length"),
        (lambda r: r["queries"][0]["metadata"].update(x=[1]), "has the type list"),
        (lambda r: r["queries"][0]["top"][0].update(score=float("nan")), "NaN"),
    ],
)
def test_damage_is_named(change, names):
    with pytest.raises(ArtifactError, match=names):
        ReportData.from_json(_broken(change), "here.json")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_broken_bytes_never_crash(tmp_path_factory, position, value):
    raw = bytearray(report(1).to_json().encode("utf-8", "replace"))
    raw[position % len(raw)] = value
    path = tmp_path_factory.mktemp("r") / "report.json"
    path.write_bytes(bytes(raw[: len(raw) - position % 7]))
    try:
        ReportData.load(path)
    except ArtifactError as error:
        assert str(path) in str(error)


def test_missing_file_and_odd_values(tmp_path):
    with pytest.raises(ArtifactError, match="Cannot read"):
        ReportData.load(tmp_path / "none.json")
    data = copy.deepcopy(report(1))
    data.queries[0].top[0].score = math.inf
    with pytest.raises(ArtifactError, match="Infinity"):
        data.to_json()
    data = report(1)
    data.options["object"] = object()
    with pytest.raises(ArtifactError, match="plain values"):
        data.to_json()


def test_histogram_counts_every_value():
    values = [0.0, 1.0, 1.0, 3.0, -2.0]
    found = histogram(values, bins=10)
    assert sum(found.counts) == 5
    assert (found.edges[0], found.edges[-1], len(found.edges)) == (-2.0, 3.0, 11)
    assert histogram([2.0, 2.0]) == Histogram([2.0, 2.0], [2])
