"""Bad input: one or two lines naming the thing and the remedy, the right exit code, no traceback, no long work."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from cli_data import run, words, write

from pyinf.cli._options import read_config
from pyinf.errors import ArtifactError, ConfigError, DataError, ModelError, ResourceError


@pytest.fixture
def base(model_dir, files, tmp_path):
    train, queries = files
    return {"model": model_dir, "train": train, "queries": queries, "out": tmp_path / "x"}


def arguments(options):
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def fails(command, options, *extra):
    result = run(command, *arguments(options), *extra)
    lines = [line for line in result.stderr.splitlines() if line.startswith("pyinf: ")]
    assert result.exit_code != 0 and len(lines) == 1, result.output
    assert result.stderr.endswith(lines[0] + "\n") and "covariances:" not in result.stderr
    return result.exit_code, lines[0]


@pytest.mark.parametrize(
    ("extra", "error", "text"),
    [
        (["--damping", "0"], ConfigError, "damping is 0.0; it must be"),
        (["--damping", "-1"], ConfigError, "damping is -1.0"),
        (["--damping-mode", "relativ"], ConfigError, "relativ"),
        (["--method", "ekfak"], ConfigError, "did you mean ekfac"),
        (["--fisher", "true"], ConfigError, "use sampled or empirical"),
        (["--eigensolver", "qr"], ConfigError, "choose one of"),
        (["--query-rank", "many"], ConfigError, "give a rank (64) or a captured energy (0.99)"),
        (["--memory-budget", "lots"], ConfigError, "write it as 2GiB"),
        (["--memory-budget", "1KiB"], ResourceError, "the budget is"),
        (["--device", "tpu9"], ConfigError, "unknown device"),
        (["--dtype", "fp8"], ConfigError, "use auto, float32"),
        (["--field", "prompt"], ConfigError, "not of the form prompt=instruction"),
        (["--field", "promt=x"], ConfigError, "did you mean 'prompt'"),
        (["--modules", "*q_prj*"], ModelError, "q_proj"),
        (["--max-length", "65"], ConfigError, "more than the 64 positions"),
        (["--backend", "quantum"], ConfigError, "quantum"),
        (["--cache", "tape"], ConfigError, "unknown cache"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_options(base, extra, error, text):
    code, line = fails("attribute", base, *extra)
    assert text in line and code == error.exit_code
    assert not (base["out"] / "fit").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "train.jsonl is empty; give at least one example"),
        ('{"txt": "a"}\n', "--field text=txt"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n', "line 2: no field 'response'"),
        ('{"input_ids": [1, 9999]}\n', "line 1: token id 9999 is outside the model's vocabulary of"),
        (
            '{"text": "' + "sad " * 200 + '"}\n',
            "has 64 positions; cut it (--truncate, or --max-length 64)",
        ),
        ('{"text": "a"\n', "line 1: not JSON"),
        ("\xff", "not UTF-8"),
    ],
)
def test_training_data(base, content, text):
    base["train"].write_bytes(content.encode("latin-1"))
    code, line = fails("attribute", base)
    assert text in line and "train.jsonl" in line and code == DataError.exit_code
    assert not base["out"].exists()


def test_missing_things(base, tmp_path):
    code, line = fails("attribute", {**base, "train": "trian.jsonl"})
    assert code == DataError.exit_code and "nearest there: train.jsonl" in line
    code, line = fails("attribute", {**base, "model": tmp_path / "none"})
    assert code == ModelError.exit_code and "no folder" in line
    bare = tmp_path / "bare"
    shutil.copytree(base["model"], bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    code, line = fails("attribute", {**base, "model": bare})
    assert code == DataError.exit_code and "needs a tokenizer; give one (--tokenizer)" in line
    write(base["train"], [{"input_ids": [1, 2, 3]}] * 4)
    write(base["queries"], [{"input_ids": [1, 2, 3]}])
    assert run("attribute", *arguments({**base, "model": bare}), "--no-report").exit_code == 0


def test_folder_that_is_no_run(base):
    base["out"].mkdir()
    (base["out"] / "thesis.tex").write_text("x")
    code, line = fails("attribute", base)
    assert code == ArtifactError.exit_code and "holds no pyinf run (it has 'thesis.tex')" in line
    assert [p.name for p in base["out"].iterdir()] == ["thesis.tex"]


def test_a_start_that_came_to_nothing_binds_nobody(base, monkeypatch):
    import pyinf

    with monkeypatch.context() as patch:
        patch.setattr(pyinf.Attributor, "run", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        assert fails("attribute", base, "--no-report")[0] == 7
    assert (base["out"] / "run.json").exists()
    assert run("attribute", *arguments(base), "--no-report", "--damping", "0.4").exit_code == 0


def test_factors_that_do_not_belong(base, model_dir, tmp_path):
    fit = {k: base[k] for k in ("model", "train")} | {"out": tmp_path / "f"}
    assert run("fit", *arguments(fit), "--modules", "*mlp*").exit_code == 0
    score = {"fit": tmp_path / "f", "queries": base["queries"], "out": base["out"]}
    code, line = fails("score", score, "--modules", "*q_proj")
    assert code == ArtifactError.exit_code and "was fitted on other layers" in line
    code, line = fails("score", score, "--method", "kfac")
    assert code == ArtifactError.exit_code and "holds ekfac factors" in line
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    from safetensors.torch import load_file, save_file

    state = load_file(other / "model.safetensors")
    save_file({k: v * 1.01 for k, v in state.items()}, other / "model.safetensors", {"format": "pt"})
    code, line = fails("score", {**score, "model": other})
    assert code == ArtifactError.exit_code and "fitted on another model" in line
    home = tmp_path / "f" / "fit" / "factors"
    manifest = json.loads((home / "manifest.json").read_text())
    (home / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    code, line = fails("score", score)
    assert code == ArtifactError.exit_code and "version 99, this pyinf reads version" in line
    (home / "manifest.json").write_text(json.dumps({**manifest, "meta": {}}))
    assert "was changed" in fails("score", score)[1]
    (home / "manifest.json").write_text(json.dumps(manifest))
    part = next(home.glob("layer-*.safetensors"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-4] + b"\0\0\0\1")
    code, line = fails("score", score)
    assert code == ArtifactError.exit_code and part.name in line and "SHA-256" in line
    part.write_bytes(whole[:-4])
    assert "bytes, found" in fails("score", score)[1]
    part.unlink()
    assert "missing" in fails("score", score)[1]


def test_score_without_a_fit(base, tmp_path):
    code, line = fails("score", base)
    assert code == ConfigError.exit_code and "give --fit DIR of a pyinf fit, or use pyinf attribute" in line
    result = run("score", "--fit", tmp_path, "--queries", base["queries"], "--out", base["out"])
    assert result.exit_code == 2 and "holds no finished fit" in words(result.stderr)
    code, line = fails("fit", {k: base[k] for k in ("model", "train", "out")}, "--method", "grad_dot")
    assert "has nothing to fit" in line
    code, line = fails("score", base, "--method", "grad_dot", "--granularity", "word")
    assert "use sequence or token" in line


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("dampnig: 1", "unknown key 'dampnig'; did you mean 'damping'?"),
        ("nothing_like_it: 1", "it may hold"),
        ("- a", "must hold keys and values"),
        ("a: [", "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("batch_size: 2.5", "--batch-size"),
        ("batch_size: true", "--batch-size"),
        ("damping: [1, 2]", "takes one value, not a list"),
        ("damping: much", "--damping"),
        ("truncate: perhaps", "--truncate"),
        ("quiet: true", "unknown key 'quiet'"),
    ],
)
def test_config_files(base, tmp_path, content, text):
    (tmp_path / "c.yaml").write_text(content)
    result = run("attribute", *arguments(base), "--config", tmp_path / "c.yaml")
    assert result.exit_code == 2 and text in words(result.stderr)


def test_config_reading(tmp_path):
    path = tmp_path / "c.yaml"
    names = {"model": False, "batch_size": False, "modules": True, "field": True, "seed": False}
    path.write_text("model: m\nbatch-size: 4\nmodules: '*mlp*'\nfield: {prompt: q}\nseed: null\n")
    assert read_config(path, names) == {
        "model": "m",
        "batch_size": "4",
        "modules": ["*mlp*"],
        "field": ["prompt=q"],
    }
    path.write_text("")
    assert read_config(path, names) == {}
    missing = run("attribute", "--config", tmp_path / "none.yaml")
    assert missing.exit_code == 2 and "cannot read" in words(missing.stderr)
    path.write_text(yaml.safe_dump({"modules": ["a", {"b": 1}]}))
    assert "takes one value" in words(run("attribute", "--config", path).stderr)


def test_debug_shows_the_traceback(base, monkeypatch):
    monkeypatch.setenv("PYINF_DEBUG", "1")
    with pytest.raises(ConfigError):
        run("attribute", *arguments(base), "--damping", "0")


def test_out_of_memory_is_named(base, monkeypatch):
    from pyinf.cli import _job

    monkeypatch.setattr(_job, "load_model", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    code, line = fails("attribute", base)
    assert code == 7 and "lower --token-budget or --batch-size" in line


def test_report_of_no_run(tmp_path):
    code, line = fails("report", {}, str(tmp_path))
    assert code == ArtifactError.exit_code and "report.json is missing" in line
