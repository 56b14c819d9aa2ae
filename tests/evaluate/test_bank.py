"""Banks: what is trained once is kept, a kill loses the trainings in flight only, damage is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluate_protocols as own
import numpy as np
import pytest

from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError, DataError, ResourceError
from pyinf.evaluate import (
    Bank,
    FunctionProtocol,
    bank_noise,
    choose_damping,
    evaluate_scores,
    full,
    group_copies,
    half_subsets,
    leave_one_out,
    plan_removals,
    random_removals,
    to_csv,
    to_rows,
    top_k_removals,
)

N, Q = own.N, own.Q


def files(bank):
    return {p: p.read_bytes() for p in (bank.directory / "entries").glob("*/*.json")}


def test_plans_are_seeded_nested_and_of_the_right_sizes():
    plan = half_subsets(N, 12)
    assert [r.key for r in plan[:5]] == [r.key for r in half_subsets(N, 5)]
    assert all(r.counts.sum() == N // 2 and set(r.counts) == {0, 1} for r in plan)
    assert len({r.key for r in plan}) == 12
    assert {r.key for r in plan}.isdisjoint(r.key for r in half_subsets(N, 12, draw_seed=1))
    other_seed = half_subsets(N, 12, seed=1)
    assert all(np.array_equal(a.counts, b.counts) and a.key != b.key for a, b in zip(plan, other_seed, strict=True))
    assert all(r.counts.sum() == N - 1 for r in random_removals(N, 5))  # 1 % of 20, at least one
    assert random_removals(N, 5, size=4)[0].kind == "removal-4" and random_removals(N, 5)[0].kind == "removal"
    assert [r.about["removed"] for r in leave_one_out(N, indices=[3, 1])] == [3, 1] and len(leave_one_out(N)) == N
    assert [int(r.counts[2]) for r in group_copies(N, [[2, 3]], [0, 3])] == [0, 3]
    top = top_k_removals(np.arange(2 * N).reshape(2, N) % 7, 3, "x")
    assert np.flatnonzero(top[0].counts == 0).tolist() == [5, 6, 13]  # values 6, 6, then the first of the 5s


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: half_subsets(N, 0), "number is 0"),
        (lambda: half_subsets(N, 3, fraction=1.0), "share between 0 and 1"),
        (lambda: random_removals(N, 3, size=N), f"size is {N}"),
        (lambda: top_k_removals(np.ones((2, N)), N, "x"), f"k is {N}"),
    ],
)
def test_plans_that_cannot_be(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
    with pytest.raises(DataError, match="indices go from 0"):
        leave_one_out(N, indices=[N])
    with pytest.raises(DataError, match="group 0"):
        group_copies(N, [[N]], [2])


def test_nothing_is_trained_twice_and_entries_come_back_exactly(tmp_path):
    calls = []

    def train(counts, seed):
        calls.append(seed)
        return own.linear_train(counts, seed)

    protocol = FunctionProtocol("counted", train, own.linear_measure, N, Q)
    plan = full(N) + half_subsets(N, 6)
    first = Bank(tmp_path / "bank", protocol).build(plan)
    assert len(calls) == 7
    again = Bank(tmp_path / "bank", protocol).build(plan + half_subsets(N, 8))
    assert len(calls) == 9 and len(again) == 15
    for a, b in zip(first, again, strict=False):
        assert np.array_equal(a.measured["loss"], b.measured["loss"]) and np.array_equal(
            a.retraining.counts, b.retraining.counts
        )
    exact = own.linear_measure(own.linear_train(plan[3].counts, 0)[0])["loss"]
    assert np.array_equal(first[3].measured["loss"], exact) and first[3].loss == 0.5


def test_workers_give_what_one_process_gives(tmp_path):
    plan = full(N) + half_subsets(N, 6) + half_subsets(N, 6, seed=1)
    one = Bank(tmp_path / "one", own.linear()).build(plan)
    two = Bank(tmp_path / "two", own.linear()).build(plan, workers=2)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.measured["loss"], b.measured["loss"])


def test_a_killed_build_goes_on(tmp_path):
    """kill -9 of the whole build: entries are whole, workers end by themselves, the rest is trained afterwards."""
    home = tmp_path / "bank"
    command = [sys.executable, str(Path(own.__file__)), str(home)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(own.__file__).parent)])}
    process = subprocess.Popen(command, env=environment)
    entries = home / "entries" / "half"
    deadline = time.monotonic() + 60
    while len(list(entries.glob("*.json"))) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # a worker notices at once that its parent is gone
    kept = {p.name: p.read_bytes() for p in entries.glob("*.json")}
    assert 4 <= len(kept) < 30
    time.sleep(0.6)
    assert len(list(entries.glob("*.json"))) == len(kept), "a worker outlived its parent"
    assert not (home / "manifest.json").exists()
    bank = Bank(home, _same_description_as_the_killed_one())
    found = bank.build(half_subsets(N, 30))
    assert len(found) == 30
    assert {name: (entries / name).read_bytes() for name in kept} == kept
    manifest = artifacts.read_manifest(home, "pyinf.bank", 1)
    assert manifest["retrainings"] == {"half": 30} and len(manifest["files"]) == 30


def _same_description_as_the_killed_one():
    return own.slow()


def test_errors_of_workers_reach_the_caller(tmp_path):
    plan = half_subsets(N, 4)
    protocol = FunctionProtocol("failing", own.failing_train, own.linear_measure, N, Q)
    with pytest.raises(ValueError, match="no convergence"):
        Bank(tmp_path / "a", protocol).build(plan, workers=2)
    protocol = FunctionProtocol("dying", own.dying_train, own.linear_measure, N, Q)
    with pytest.raises(ResourceError, match="ended with code 9"):
        Bank(tmp_path / "b", protocol).build(plan, workers=2)
    protocol = FunctionProtocol("local", lambda c, s: own.linear_train(c, s), own.linear_measure, N, Q)
    with pytest.raises(ConfigError, match="cannot be sent to worker processes"):
        Bank(tmp_path / "c", protocol).build(plan, workers=2)
    with pytest.raises(ConfigError, match="workers is 0"):
        Bank(tmp_path / "d", own.linear()).build(plan, workers=0)


@pytest.fixture
def bank(tmp_path):
    bank = Bank(tmp_path / "bank", own.linear())
    bank.build(full(N, repeats=2) + half_subsets(N, 12) + half_subsets(N, 5, seed=1))
    return bank


def test_a_damaged_or_foreign_entry_is_named(bank, tmp_path):
    path = sorted((bank.directory / "entries" / "half").glob("*.json"))[3]
    data = json.loads(path.read_text())
    data["measured"]["loss"][0] += 1e-9
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=f"{path.name}.*checksum does not match.*only this retraining"):
        bank.table("half")
    path.write_text("{}")
    with pytest.raises(ArtifactError, match=r"no pyinf\.retraining"):
        bank.table("half")
    path.unlink()
    bank.build(half_subsets(N, 12))
    other = Bank(tmp_path / "other", own.linear(settings={"rate": 2}))
    shutil.copytree(bank.directory / "entries", other.directory / "entries")
    with pytest.raises(ArtifactError, match="another bank"):
        other.table("half")


def test_a_bank_is_of_one_protocol(bank):
    with pytest.raises(ArtifactError, match=r"different run .*settings.rate"):
        Bank(bank.directory, own.linear(settings={"rate": 2}))
    with pytest.raises(ArtifactError, match=r"environment\.threads"):
        Bank(bank.directory, own.linear(), threads=2)
    with pytest.raises(ConfigError, match="pass it as protocol"):
        Bank.open(bank.directory)
    with pytest.raises(ArtifactError, match="holds no bank"):
        Bank.open(bank.directory / "entries")
    assert Bank.open(bank.directory, own.linear()).kinds() == {"full": 2, "half": 17}
    with pytest.raises(DataError, match=r"no 'removal' retrainings of seed 0; it has full \(2\), half \(17\)"):
        bank.table("removal")
    with pytest.raises(DataError, match="not 'accuracy'"):
        bank.table("half", what="accuracy")


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (lambda model: np.zeros(3), r"shape \(3,\)"),
        (lambda model: {"margin": np.zeros(Q)}, "must return 'loss'"),
        (lambda model: np.full(Q, np.nan), "query 0 is nan.*diverged"),
    ],
)
def test_measurements_are_checked(tmp_path, measure, text):
    protocol = FunctionProtocol("odd", own.linear_train, measure, N, Q)
    with pytest.raises(DataError, match=text):
        Bank(tmp_path / "bank", protocol).build(full(N))


def test_noise_repeats_and_other_seeds(bank):
    assert bank.repeats() == (1, 0.0)
    first, second = bank.pairs("half")
    assert first.shape == second.shape == (5, Q) and 0 < np.abs(first - second).max() < 0.1
    found = bank_noise(bank)
    assert found["repeats"] == 1 and found["largest_difference_of_repeats"] == 0
    assert found["half"]["subsets"] == 5 and found["half"]["agreement"] > 0.8


def test_every_metric_on_the_true_effects(bank):
    plan = (
        random_removals(N, 8) + random_removals(N, 5, seed=1) + leave_one_out(N, 6) + group_copies(N, [[1, 2]], [0, 3])
    )
    bank.build(plan + plan_removals(bank, own.EFFECT, "truth", 3, controls=4))
    found = evaluate_scores(bank, own.EFFECT, "truth")
    result = found.results
    assert set(result) == {
        "lds",
        "lds_removal",
        "lds_removal_other_seed",
        "leave_one_out",
        "copies",
        "qld",
        "brittleness",
    }
    assert result["lds"]["value"] == pytest.approx(1) and result["lds_removal"]["value"] == pytest.approx(1)
    assert result["leave_one_out"]["pearson"]["value"] == pytest.approx(1)
    assert result["copies"]["slope"] == pytest.approx(1)
    top = -np.sort(-own.EFFECT, axis=1)[:, :3].sum(1).mean() / N
    assert result["qld"]["3"]["removed"]["value"] == pytest.approx(top)
    assert result["qld"]["3"]["net"]["value"] < top + 0.1
    # margin after removing 3 of 20: 1 … 2 less 0.75: none flips
    assert result["brittleness"]["flipped"] == {"3": 0.0}
    rows = to_rows([found, evaluate_scores(bank, -own.EFFECT, "reversed", qld_k=3)])
    assert rows[1]["lds"] == pytest.approx(-1) and "qld_3" not in rows[1]  # nobody retrained for those
    lines = to_csv(rows).splitlines()
    assert lines[0].startswith("name,damping,lds,lds_low,lds_high") and lines[1].startswith("truth,,1.0000,")
    assert to_csv([{"name": "x", "damping": 1e-5, "lds": 0.5}]).splitlines()[1] == "x,1e-05,0.5000"
    notes = evaluate_scores(bank, -own.EFFECT, "reversed").notes
    assert "sign looks reversed" in notes[0]


def test_reported_queries_only(bank):
    broken = own.EFFECT.copy()
    broken[:2] *= -1
    assert evaluate_scores(bank, broken, "half right").results["lds"]["value"] == pytest.approx(0.2)
    assert evaluate_scores(bank, broken, "x", reported=[2, 3, 4]).results["lds"]["value"] == pytest.approx(1)
    with pytest.raises(ConfigError, match="queries to report"):
        evaluate_scores(bank, broken, "x", reported=[Q])


def test_damping_is_chosen_on_held_out_queries(bank):
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(Q, N))
    candidates = {d: own.EFFECT + noise * abs(np.log10(d) + 1) for d in (1e-3, 1e-1, 10.0)}
    candidates[10.0][[2, 3, 4]] = own.EFFECT[[2, 3, 4]]  # perfect where it does not count
    best, table = choose_damping(candidates, bank, queries=[0, 1])
    assert best == 0.1 and table[0.1] == pytest.approx(1) and table[10.0] < 0.99
    assert choose_damping({0.1: own.EFFECT, 1.0: own.EFFECT}, bank, [0])[0] == 1.0  # a tie: the larger
    with pytest.raises(ConfigError, match="holds no queries out"):
        choose_damping(candidates, bank)
    with pytest.raises(ConfigError, match="no damping to choose from"):
        choose_damping({}, bank, [0])


def test_an_empty_bank_says_how_to_build_it(tmp_path):
    with pytest.raises(DataError, match="holds no retrainings yet"):
        evaluate_scores(Bank(tmp_path / "bank", own.linear()), own.EFFECT, "x")
