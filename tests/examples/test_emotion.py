from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EMOTION = Path(os.environ.get("PYINF_EMOTION", ROOT.parent / "shared/data/emotion"))
# Not skipped where the data are absent: made-up rows take the same path every time.
SOURCES = ["made-up", *(["emotion"] if (EMOTION / "train.jsonl").exists() else [])]
COLOURS = {"red": ("cherry", "ruby", "brick"), "green": ("lime", "frog", "moss"), "blue": ("plum", "sky", "sea")}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("emotion_example", ROOT / "examples" / "emotion.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def _made_up(folder):
    rng = random.Random(0)
    rows = [
        {"prompt": f"What colour is the {rng.choice(words)} number {n}?", "response": colour, "label": colour}
        for n in range(16)
        for colour, words in COLOURS.items()
    ]
    for name, part in (("train", rows[6:]), ("test", rows[:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.mark.parametrize("source", SOURCES)
def test_from_raw_lines_to_report(source, tmp_path):
    data = EMOTION if source == "emotion" else _made_up(tmp_path)
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "examples" / "emotion.py", data / "train.jsonl", data / "test.jsonl"]
    methods = ["ekfac", "bm25"] if source == "made-up" else ["ekfac"]
    command += ["--out", out, "--quick", "--limit", 40, "--limit-queries", 5, "--methods", *methods]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(map(str, command), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "emotion.json").read_text())
    assert [m["method"] for m in found["methods"]] == methods
    assert all(0 <= m[key] <= 1 for m in found["methods"] for key in ("acc", "cover"))
    assert (found["train"], found["queries"], found["labels"]) == (40, 5, 3 if source == "made-up" else 5)
    assert 0 < found["chance"] < 0.5
    assert "chance" in done.stdout and (out / "ekfac" / "report.html").stat().st_size > 10_000


def test_acc_and_cover_by_hand(example):
    train, queries = ["x", "x", "y", "z"], ["x", "y"]
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 1.0, 2.0, 0.0]])
    # first query: top-1 is an x, of its top 2 one is; second: top-1 is no y, and c = 1
    assert example.measure(scores, train, queries) == (0.5, 0.25)
    assert example.chance(train, queries) == pytest.approx((2 + 1) / (4 * 2))


def test_labels_come_in_turn(example):
    rows = [{"label": label} for label in ["a"] * 5 + ["b"] * 2 + ["c"]]
    assert [r["label"] for r in example.spread(rows, 6, 0)] == ["a", "b", "c", "a", "b", "a"]


def test_a_missing_field_is_named(example, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(SystemExit, match="line 1: no field 'label'"):
        example.read(path)
