"""Runs killed at any moment go on to bit-identical results; what is damaged, foreign or too large is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import core_oracle as oracle
import pytest
import torch
from resume_trials import QUERIES, TRAIN, Net

import pyinf
from pyinf.errors import ArtifactError, ResourceError

SETTINGS = [
    {"method": "ekfac", "cache": "auto", "rank": None, "seed": 0},
    {"method": "ekfac", "cache": "none", "rank": 3, "seed": 1},
    {"method": "ekfac", "cache": "disk", "rank": None, "seed": 2},
    {"method": "diagonal", "cache": "auto", "rank": 0.9, "seed": 3},
    {"method": "kfac", "cache": "auto", "rank": None, "seed": 4},
    {"method": "tracin", "cache": "auto", "rank": None, "seed": 5},
    {"method": "source", "cache": "auto", "rank": None, "seed": 6},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s['method']}-{s['cache']}")
def test_killed_at_any_moment(setting, tmp_path):
    script = Path(__file__).with_name("resume_trials.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), json.dumps(setting)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] > 20
    killed = 0
    for trial in found["trials"]:
        assert trial["kills"][-1] == "done", (trial["kills"], done.stderr[-2000:])
        killed += trial["kills"].count("killed")
        for what in ("factors", "scores", "energy", "left"):
            assert trial[what] == found["reference"][what], what
    assert killed >= 4
    # no scratch, no unfinished work stays behind
    assert found["reference"]["left"] == (["fit/run.json"] if found["reference"]["factors"] else [])


class _Stop(Exception):
    pass


def interrupted(monkeypatch, attributor, batches: int, call) -> None:
    """Run ``call`` until the model has been run on so many batches."""
    from pyinf.capture.session import TracingSession

    real, count = TracingSession.run, [0]

    def run(self, *args, **kwargs):
        if count[0] == batches:
            raise _Stop
        count[0] += 1
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TracingSession, "run", run)
        with pytest.raises(_Stop):
            call()


def passes(monkeypatch):
    from pyinf.capture.session import TracingSession

    real, calls = TracingSession.run, []
    monkeypatch.setattr(
        TracingSession, "run", lambda self, b, c, loss="train": calls.append(loss) or real(self, b, c, loss)
    )
    return calls


def attributor(directory, **options):
    return pyinf.Attributor(Net(), run_dir=directory, checkpoint_seconds=0, **options)


def test_finished_batches_are_not_run_again(monkeypatch, tmp_path):
    whole = attributor(None, cache="none").fit(TRAIN, 3)
    interrupted(monkeypatch, None, 4, lambda: attributor(tmp_path, cache="none").fit(TRAIN, 3))
    interrupted(
        monkeypatch, None, 4, lambda: attributor(tmp_path, cache="none").fit(TRAIN, 3)
    )  # 2 + 2 of the second pass
    calls = passes(monkeypatch)
    again = attributor(tmp_path, cache="none").fit(TRAIN, 3)
    assert len(calls) == 12 - 8
    for name, layer in whole.factors.layers.items():
        assert torch.equal(layer.corrected, again.factors.layers[name].corrected)
    attributor(tmp_path, cache="none").fit(TRAIN, 3)  # finished: nothing is run
    assert len(calls) == 4
    scores = whole.score(QUERIES, TRAIN, 3)
    calls.clear()
    interrupted(monkeypatch, None, 2 + 3, lambda: again.score(QUERIES, TRAIN, 3))
    calls.clear()
    resumed = attributor(tmp_path, cache="none").fit(TRAIN, 3).score(QUERIES, TRAIN, 3)
    assert torch.equal(resumed.values, scores.values) and calls.count("train") == 3


def test_scores_whose_partial_file_is_gone_are_made_again(monkeypatch, tmp_path):
    fitted = attributor(tmp_path).fit(TRAIN, 3)
    wanted = attributor(None).fit(TRAIN, 3).score(QUERIES, TRAIN, 3).values
    for damage in ("delete", "truncate"):
        interrupted(monkeypatch, None, 2 + 4, lambda: fitted.score(QUERIES, TRAIN, 3))
        (partial,) = tmp_path.rglob("scores-*.partial")
        assert (partial.parent / "progress.json").exists()
        if damage == "delete":
            partial.unlink()
        else:
            os.truncate(partial, partial.stat().st_size // 2)
        assert torch.equal(fitted.score(QUERIES, TRAIN, 3).values, wanted)


def test_scratch_of_a_killed_run_is_removed(tmp_path):
    stale = tmp_path / "fit" / "pyinf-capture-abc"
    fitted = attributor(tmp_path)
    fitted.fit(TRAIN, 3)
    stale.mkdir()
    (stale / "train-000000.safetensors").write_bytes(b"x")
    for path in (tmp_path / "fit" / "factors").iterdir():
        path.unlink()
    attributor(tmp_path).fit(TRAIN, 3)
    assert not stale.exists()


def test_a_directory_of_another_run_is_refused(tmp_path):
    attributor(tmp_path).fit(TRAIN, 3)
    for options, what in (
        ({"seed": 1}, "seed"),
        ({"fisher": "empirical"}, "fisher"),
        ({"modules": "blocks.0.*"}, "layers"),
        ({"method": "diagonal"}, "method"),
        ({"eigensolver": "fp64"}, "eigensolver"),
    ):
        with pytest.raises(ArtifactError, match=f"(?s)holds a different run.*{what}.*choose another output directory"):
            attributor(tmp_path, **options).fit(TRAIN, 3)
    with pytest.raises(ArtifactError, match="data"):
        attributor(tmp_path).fit(TRAIN[:-1], 3)
    with pytest.raises(ArtifactError, match="batch_size"):
        attributor(tmp_path).fit(TRAIN, 4)
    other = Net()
    with torch.no_grad():
        other.blocks[0][0].weight += 1e-3
    with pytest.raises(ArtifactError, match="model"):
        pyinf.Attributor(other, run_dir=tmp_path).fit(TRAIN, 3)
    foreign = tmp_path / "foreign"
    (foreign / "fit").mkdir(parents=True)
    (foreign / "fit" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"holiday\.jpg"):
        attributor(foreign).fit(TRAIN, 3)


# -- factors on disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    fitted = pyinf.Attributor(Net(), fisher="empirical").fit(TRAIN)
    fitted.factors.save(tmp_path / "factors")
    return fitted, tmp_path / "factors"


def test_factors_come_back_the_same(saved):
    fitted, path = saved
    other = pyinf.Attributor(Net(), fisher="empirical").load_factors(path)
    assert other.factors.kind == "ekfac" and other.factors.tokens == fitted.factors.tokens
    assert torch.equal(other.score(QUERIES, TRAIN).values, fitted.score(QUERIES, TRAIN).values)
    V = {n: torch.randn(2, *layer.corrected.shape) for n, layer in fitted.factors.layers.items()}
    alone = pyinf.Factors.load(path)
    assert all(torch.equal(alone.ihvp(V)[n], fitted.factors.ihvp(V)[n]) for n in V)


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete", "empty", "swap"])
def test_a_damaged_factor_file_is_named(saved, damage):
    _, path = saved
    file = path / "layer-0001.safetensors"
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[-5] ^= 1
        file.write_bytes(raw)
    elif damage == "swap":
        file.write_bytes((path / "layer-0003.safetensors").read_bytes())
    elif damage == "delete":
        file.unlink()
    else:
        file.write_bytes({"truncate": raw[:-7], "extend": raw + b"x", "empty": b""}[damage])
    with pytest.raises(ArtifactError, match=r"layer-0001\.safetensors"):
        pyinf.Factors.load(path)


def test_a_manifest_that_was_tampered_with_is_refused(saved):
    _, path = saved
    manifest = path / "manifest.json"
    text = manifest.read_text()
    for bad in (text.replace('"sequences": 18', '"sequences": 17'), text[:-20], "{}", "[]", ""):
        assert bad != text
        manifest.write_text(bad)
        with pytest.raises(ArtifactError, match=str(path)):
            pyinf.Factors.load(path)
    manifest.unlink()
    with pytest.raises(ArtifactError, match="manifest"):
        pyinf.Factors.load(path)
    with pytest.raises(ArtifactError):
        pyinf.Factors.load(path / "nowhere")


def test_another_format_version_is_refused(saved, monkeypatch):
    fitted, path = saved
    from pyinf.curvature import factors as module

    monkeypatch.setattr(module, "FACTORS_VERSION", 99)
    fitted.factors.save(path)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="99"):
        pyinf.Factors.load(path)


def test_factors_of_something_else_are_refused(saved):
    _, path = saved
    other = Net()
    with torch.no_grad():
        other.head.weight += 1
    with pytest.raises(ArtifactError, match="was fitted on another model"):
        pyinf.Attributor(other, fisher="empirical").load_factors(path)
    with pytest.raises(ArtifactError, match=r"other layers: 'blocks\.1\.0' is \[24, 17\] there and not selected here"):
        pyinf.Attributor(Net(), modules="blocks.0.*").load_factors(path)
    with pytest.raises(ArtifactError, match="holds ekfac factors, method 'kfac' needs kfac"):
        pyinf.Attributor(Net(), "kfac").load_factors(path)
    with pytest.raises(ArtifactError, match="other layers: 'model.layers.0.self_attn.q_proj' is absent there"):  # noqa: RUF043
        pyinf.Attributor(oracle.make("llama", torch.float32)).load_factors(path)


# -- resources ---------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_any_work(monkeypatch, tmp_path):
    from pyinf import artifacts

    calls = passes(monkeypatch)
    monkeypatch.setattr(artifacts, "free_disk", lambda path: 1000)
    with pytest.raises(
        ResourceError, match=r"the run writes up to .* KiB, only 1000 B are free; use another directory"
    ):
        attributor(tmp_path).fit(TRAIN, 3)
    assert not calls
    attributor(None).fit(TRAIN, 3)  # nothing is written without a run_dir


def test_a_disk_that_fills_up_is_said_and_leaves_a_resumable_run(monkeypatch, tmp_path):
    import errno

    wanted = attributor(None).fit(TRAIN, 3).factors
    real, count = os.fsync, [0]

    def full(descriptor):
        count[0] += 1
        if count[0] > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="no space left on the disk while writing"):
            attributor(tmp_path).fit(TRAIN, 3)
    found = attributor(tmp_path).fit(TRAIN, 3).factors
    assert all(torch.equal(found.layers[n].corrected, wanted.layers[n].corrected) for n in wanted.layers)


def test_too_little_memory_is_said_before_any_work(monkeypatch):
    calls = passes(monkeypatch)
    with pytest.raises(ResourceError, match="lower the batch size or trace fewer layers"):
        pyinf.Attributor(Net(), memory_budget=1000).fit(TRAIN)
    with pytest.raises(ResourceError, match="for one query at a time, the budget is 1000 B; lower the batch size"):
        pyinf.Attributor(Net(), "grad_dot", memory_budget=1000).score(QUERIES, TRAIN)
    with pytest.raises(ResourceError):
        pyinf.attribute(Net(), TRAIN, QUERIES, memory_budget="64 MiB")
    assert not calls
