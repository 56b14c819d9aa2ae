"""``pyinf evaluate``: bank, scores and board, from the command line."""

from __future__ import annotations

import json

import evaluate_protocols as own
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyinf
from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError, DataError
from pyinf.evaluate import Bank, load_matrix


def run(*arguments, code=0):
    from pyinf.cli import app

    result = CliRunner().invoke(app, ["evaluate", *(str(a) for a in arguments)], prog_name="pyinf")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    home = tmp_path_factory.mktemp("cli") / "bank"
    arguments = ["bank", "--protocol", "evaluate_protocols:linear", "--out", home, "--half", 10, "--other-seed", 4]
    arguments += ["--removals", 6, "--removals-other-seed", 3, "--leave-one-out", 5]
    result = run(*arguments)
    assert "30 retrainings of protocol linear, 29 of them to do" in result.stderr
    for text in ("half             14 retrainings", "removal          8", "largest difference of a measurement 0"):
        assert text in result.stdout
    assert "half, another seed: Spearman" in result.stdout
    again = run(*arguments, "--json")
    assert ", 0 of them to do" in again.stderr
    assert json.loads(again.stdout)["retrainings"] == {"full": 2, "half": 14, "leave-one-out": 5, "removal": 8}
    return home


def test_scores_of_any_library(bank, tmp_path):
    np.save(tmp_path / "theirs.npy", own.EFFECT.astype(np.float32))
    np.save(tmp_path / "transposed.npy", own.EFFECT.T)
    noisy = own.EFFECT + 3 * np.random.default_rng(1).normal(size=own.EFFECT.shape)
    pyinf.Scores(torch.from_numpy(noisy)).save(tmp_path / "run" / "scores")
    common = ["--bank", bank, "--protocol", "evaluate_protocols:linear"]
    out = tmp_path / "out"
    result = run("scores", tmp_path / "theirs.npy", tmp_path / "run", *common, "--remove", 2, "--out", out)
    assert "theirs" in result.stdout and "1.000 [" in result.stdout and "noise ceiling of LDS" in result.stdout
    found = json.loads((out / "evaluation.json").read_text())
    first, second = (s["results"] for s in found["scores"])
    assert first["lds"]["value"] == pytest.approx(1) and second["lds"]["value"] < 0.9
    assert first["qld"]["2"]["removed"]["value"] > second["qld"]["2"]["removed"]["value"] > 0
    assert (out / "evaluation.csv").read_text().splitlines()[1].startswith("theirs,,1.0000,")
    error = run("scores", tmp_path / "transposed.npy", *common, code=3)
    assert "training examples × queries" in error.stderr and "train_by_queries" in error.stderr
    fine = run("scores", tmp_path / "transposed.npy", *common, "--layout", "train_by_queries", "--json")
    assert json.loads(fine.stdout)["scores"][0]["results"]["lds"]["value"] == pytest.approx(1)
    np.save(tmp_path / "reversed.npy", -own.EFFECT)
    assert "sign looks reversed" in run("scores", tmp_path / "reversed.npy", *common).stderr


def test_wrong_use_is_explained(bank, tmp_path):
    np.save(tmp_path / "a.npy", own.EFFECT)
    common = ["--bank", bank, "--protocol", "evaluate_protocols:linear"]
    for arguments, code, text in [
        (["scores", tmp_path / "a.npy", "--bank", bank], 2, "pass it as protocol"),
        (["scores", tmp_path / "b.npy", *common], 6, "b.npy is missing"),
        (["scores", tmp_path / "a.npy", *common, "--layout", "sideways"], 2, "unknown layout 'sideways'"),
        (["scores", tmp_path / "a.npy", *common, "--name", "x", "--name", "y"], 2, "2 names for 1 matrices"),
        (["scores", tmp_path / "a.npy", "--bank", tmp_path], 6, "holds no bank; build one with"),
        (["bank", "--protocol", "large", "--out", tmp_path / "x"], 2, "unknown protocol 'large'"),
        (["bank", "--protocol", "quick", "--set", "epochs", "--out", tmp_path / "x"], 2, "of the form epochs=3"),
        (["bank", "--protocol", "quick", "--set", "epochs=a", "--out", tmp_path / "x"], 2, "epochs takes a int"),
        (["bank", "--protocol", "quick", "--set", "epoch=1", "--out", tmp_path / "x"], 2, "no setting 'epoch'"),
        (["bank", "--protocol", "nowhere:x", "--out", tmp_path / "x"], 2, "cannot import protocol"),
        (
            ["bank", "--protocol", "evaluate_protocols:N", "--out", tmp_path / "x"],
            2,
            "must be a pyinf.evaluate.Protocol",
        ),
        (["board", "--bank", bank, "--out", tmp_path / "x", "--method", "magic"], 2, "magic"),
    ]:
        assert text in " ".join(run(*arguments, code=code).stderr.split()), arguments


def test_matrices_on_disk(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", values)
    assert np.array_equal(load_matrix(tmp_path / "a.npy", 2, 3), values)
    artifacts.save_tensors(tmp_path / "a.safetensors", {"s": torch.from_numpy(values), "n": torch.zeros(3)}, None)
    assert np.array_equal(load_matrix(tmp_path / "a.safetensors", 2, 3), values)
    artifacts.save_tensors(tmp_path / "b.safetensors", {"s": torch.zeros(2, 3), "t": torch.ones(2, 3)}, None)
    assert load_matrix(tmp_path / "b.safetensors", 2, 3, key="t").sum() == 6
    with pytest.raises(ConfigError, match="holds 2 matrices"):
        load_matrix(tmp_path / "b.safetensors", 2, 3)
    with pytest.raises(ConfigError, match="no tensor 'u'; it has s, t"):
        load_matrix(tmp_path / "b.safetensors", 2, 3, key="u")
    pyinf.Scores({"x": torch.ones(2, 3), "y": torch.ones(2, 3)}).save(tmp_path / "modules")
    pyinf.Scores(torch.ones(2, 3, 4)).save(tmp_path / "tokens")
    pyinf.Scores(None, None, {"queries": 2, "train": 3}, (torch.ones(2, 1), torch.zeros(2, 1).long())).save(
        tmp_path / "top"
    )
    assert load_matrix(tmp_path / "modules", 2, 3).sum() == 12 and load_matrix(tmp_path / "tokens", 2, 3).sum() == 24
    with pytest.raises(DataError, match="only the top scores"):
        load_matrix(tmp_path / "top", 2, 3)
    np.save(tmp_path / "o.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactError, match="without unpickling"):
        load_matrix(tmp_path / "o.npy", 1, 1)
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"kind '.pt' are not read; save the matrix as .npy"):
        load_matrix(tmp_path / "a.pt", 2, 3)
    np.save(tmp_path / "square.npy", np.eye(3))
    with pytest.raises(ConfigError, match="is square"):
        load_matrix(tmp_path / "square.npy", 3, 3)
    assert load_matrix(tmp_path / "square.npy", 3, 3, "queries_by_train").shape == (3, 3)
    np.save(tmp_path / "nan.npy", np.array([[0.0, np.nan, 0]]))
    with pytest.raises(DataError, match="nan for query 0 and training example 1"):
        load_matrix(tmp_path / "nan.npy", 1, 3)
    with pytest.raises(DataError, match=r"shape \(1, 3\); the bank has 2 queries and 3"):
        load_matrix(tmp_path / "nan.npy", 2, 3)


def test_board(quick, tmp_path):
    out = tmp_path / "board"
    arguments = ["board", "--bank", quick.directory, "--out", out, "--method", "grad_dot", "--method", "bm25"]
    result = run(*arguments)
    assert "grad_dot" in result.stdout and "bm25" in result.stdout and "seconds" in result.stdout
    assert len((out / "board.csv").read_text().splitlines()) == 3
    content = json.loads((out / "board.json").read_text())
    assert content["bank"] == Bank.open(quick.directory).identity and len(content["rows"]) == 2
