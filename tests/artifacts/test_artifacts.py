"""Files on disk: atomic, checked, never half there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pyinf import artifacts as A
from pyinf.errors import ArtifactError, PyinfError, ResourceError

DTYPES = list(A._SAFETENSORS_DTYPES)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {f"t.{i}": (torch.rand(3, 5, generator=generator) * 4).to(d) for i, d in enumerate(DTYPES)}
    return {**out, "empty": torch.zeros(0, 7), "scalar": torch.tensor(2.5), "turned": torch.rand(4, 6).T}


def test_tensors_come_back_and_the_library_reads_them(tmp_path):
    given_ = tensors()
    info = A.save_tensors(tmp_path / "x.safetensors", given_, {"b": "2", "a": "1"})
    assert info["bytes"] == os.path.getsize(tmp_path / "x.safetensors")
    assert info["sha256"] == A.sha256_file(tmp_path / "x.safetensors")
    for loaded in (A.load_tensors(tmp_path / "x.safetensors", info), load_file(tmp_path / "x.safetensors")):
        assert set(loaded) == set(given_)
        for name, value in given_.items():
            assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
            assert torch.equal(loaded[name], value)


def test_equal_tensors_give_equal_bytes(tmp_path):
    x, y = torch.rand(3), torch.rand(2, 2)
    first = A.save_tensors(tmp_path / "a", {"x": x, "y": y}, {"k": "v", "a": "b"})
    second = A.save_tensors(tmp_path / "b", {"y": y.clone(), "x": x.clone()}, {"a": "b", "k": "v"})
    assert first == second


@pytest.mark.parametrize("bad", [{"x": torch.zeros(2, dtype=torch.complex64)}, {"x": torch.eye(2).to_sparse()}])
def test_unsupported_tensors_are_named(tmp_path, bad):
    with pytest.raises(ArtifactError, match="'x'"):
        A.save_tensors(tmp_path / "x", bad)
    assert not list(tmp_path.iterdir())


def test_metadata_must_be_strings(tmp_path):
    with pytest.raises(ArtifactError, match="'k'"):
        A.save_tensors(tmp_path / "x", {}, {"k": 1})


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    info = A.save_tensors(path, {"w": torch.rand(64)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=rf"x\.safetensors.*expected {info['bytes']} bytes, found {len(whole) - 1}"):
        A.load_tensors(path, info)
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        A.load_tensors(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="SHA-256"):
        A.load_tensors(path, info)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        A.load_tensors(path, info)


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"w": torch.rand(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        A.load_tensors(tmp_path / "x.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    A.atomic_write_bytes(path, b"old")
    with pytest.raises(RuntimeError), A.atomic_writer(path) as handle:
        handle.write(b"new, but only half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_killed_writer_leaves_the_old_file_and_its_rubbish_is_swept(tmp_path):
    path = tmp_path / "f"
    A.atomic_write_bytes(path, b"old")
    code = (
        "import sys, os, signal\nfrom pyinf.artifacts import atomic_writer\n"
        "with atomic_writer(sys.argv[1]) as handle:\n"
        "    handle.write(b'new'); handle.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert len(A.remove_stale_temporaries(tmp_path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_living_writer_is_left_alone(tmp_path):
    with A.atomic_writer(tmp_path / "f") as handle:
        handle.write(b"x")
        assert A.remove_stale_temporaries(tmp_path) == []
    assert (tmp_path / "f").read_bytes() == b"x"


def test_write_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot write"):
        A.atomic_write_bytes(tmp_path / "file" / "below", b"x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left"):
        A.atomic_write_bytes(tmp_path / "f", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json(tmp_path):
    A.atomic_write_json(tmp_path / "j", {"b": np.float32(0.5), "a": tmp_path, "t": torch.ones(2), "d": torch.float32})
    assert A.read_json(tmp_path / "j") == {"b": 0.5, "a": str(tmp_path), "t": [1, 1], "d": "torch.float32"}
    A.atomic_write_json(tmp_path / "s", {"lone": "\ud800"})
    assert A.read_json(tmp_path / "s") == {"lone": "\ud800"}
    for bad in (float("nan"), object()):
        with pytest.raises(ArtifactError, match="cannot write"):
            A.atomic_write_json(tmp_path / "n", {"x": bad})


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b'{"a":1,"a":2}', b"NaN", b"[" * 100_000, b"1" * 5000, b"\xef\xbb\xbf{}"], ids=range(8)
)
def test_broken_json_is_named(tmp_path, data):
    (tmp_path / "j.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"j\.json"):
        A.read_json(tmp_path / "j.json")


def manifest(tmp_path) -> dict:
    info = A.save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    return A.write_manifest(tmp_path, "pyinf-test", 3, {"counts": (1, 2), "model": "m"}, {"a.safetensors": info})


def test_manifest_round_trip(tmp_path):
    written = manifest(tmp_path)
    assert A.read_manifest(tmp_path, "pyinf-test", 3) == written
    assert written["counts"] == [1, 2]


def test_manifest_errors(tmp_path):
    with pytest.raises(ArtifactError, match="no directory"):
        A.read_manifest(tmp_path / "none", "pyinf-test", 3)
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        A.read_manifest(tmp_path, "pyinf-test", 3)
    manifest(tmp_path)
    with pytest.raises(ArtifactError, match="holds 'pyinf-test', expected 'other'"):
        A.read_manifest(tmp_path, "other", 3)
    with pytest.raises(ArtifactError, match="version 3, this pyinf reads version 4"):
        A.read_manifest(tmp_path, "pyinf-test", 4)
    path = tmp_path / A.MANIFEST_NAME
    path.write_text(path.read_text().replace('"m"', '"n"'))
    with pytest.raises(ArtifactError, match="checksum does not match"):
        A.read_manifest(tmp_path, "pyinf-test", 3)
    with pytest.raises(ArtifactError, match="reserved"):
        A.write_manifest(tmp_path, "f", 1, {"files": 1}, {})


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", ".", "..", "a//b", "a\\..\\b", "C:x", "a\0b", "a/./b", "link/x"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path)
    info = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(ArtifactError, match="leads out"):
        A.write_manifest(home, "f", 1, {}, {name: info})
    body = {"format": "f", "version": 1, "files": {name: info}}
    body["checksum"] = A._manifest_digest(body)
    (home / A.MANIFEST_NAME).write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="leads out"):
        A.read_manifest(home, "f", 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_bytes_as_manifest_or_tensors(tmp_path, data):
    (tmp_path / A.MANIFEST_NAME).write_bytes(data)
    with pytest.raises(PyinfError):
        A.read_manifest(tmp_path, "pyinf-test", 3)
    (tmp_path / "x.safetensors").write_bytes(data)
    try:
        A.load_tensors(tmp_path / "x.safetensors")
    except PyinfError:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(version=json_values, files=json_values, name=st.text(max_size=8), info=json_values, sha=st.text(max_size=64))
def test_any_json_as_manifest(tmp_path, version, files, name, info, sha):
    for entry in (files, {name: info}, {name: {"sha256": sha, "bytes": 1}}):
        body = {"format": "pyinf-test", "version": version, "files": entry}
        body["checksum"] = A._manifest_digest(body)
        (tmp_path / A.MANIFEST_NAME).write_text(json.dumps(body))
        try:
            A.read_manifest(tmp_path, "pyinf-test", 3)
        except PyinfError:
            continue


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_manifest_or_file_is_seen(tmp_path, data):
    written = manifest(tmp_path)
    for name in (A.MANIFEST_NAME, "a.safetensors"):
        path = tmp_path / name
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = bytearray(whole)
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(changed)
        try:
            got = A.read_manifest(tmp_path, "pyinf-test", 3)
            A.load_tensors(tmp_path / "a.safetensors", written["files"]["a.safetensors"])
            assert name == A.MANIFEST_NAME and got == written  # only white space of the manifest changed
        except PyinfError:
            pass
        path.write_bytes(whole)


def test_claim_directory(tmp_path):
    home = tmp_path / "deep" / "run"
    assert A.claim_directory(home, {"model": "a", "options": {"damping": 0.1}, "t": (1, 2)}) is False
    assert A.claim_directory(home, {"model": "a", "options": {"damping": 0.1}, "t": [1, 2]}) is True
    lines = r"different run \(model: \"a\" → \"b\"; options\.damping: 0\.1 → 1\.0; seed: absent"
    with pytest.raises(ArtifactError, match=lines):
        A.claim_directory(home, {"model": "b", "options": {"damping": 1.0}, "t": [1, 2], "seed": 1})
    strange = tmp_path / "strange"
    strange.mkdir()
    assert A.claim_directory(strange, {}) is False
    (strange / A.RUN_NAME).unlink()
    (strange / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match=r"'thesis\.tex'"):
        A.claim_directory(strange, {})
    with pytest.raises(ArtifactError, match="is a file"):
        A.claim_directory(strange / "thesis.tex", {})
    (home / A.RUN_NAME).write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        A.claim_directory(home, {})


def test_model_fingerprint():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 90), torch.nn.Linear(90, 3))
    first = A.fingerprint_model(model)
    assert first == A.fingerprint_model(model)
    assert A.fingerprint_model(model, ["0"]) != A.fingerprint_model(model, ["1"])
    only = A.fingerprint_model(model, ["1"])
    with torch.no_grad():
        model[0].weight.mul_(1.001)
    assert A.fingerprint_model(model) != first and A.fingerprint_model(model, ["1"]) == only
    assert A.fingerprint_model(model.double(), ["1"]) != only
    with torch.device("meta"):
        A.fingerprint_model(torch.nn.Linear(3, 3))


def test_example_fingerprint():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4]}]
    same = [{"labels": torch.tensor([-100, 2, 3]), "input_ids": np.array([1, 2, 3], np.int32)}, {"input_ids": [4]}]
    base = A.fingerprint_examples(rows)
    assert base == A.fingerprint_examples(same)
    assert base != A.fingerprint_examples(rows[::-1])
    assert base != A.fingerprint_examples(rows[:1])
    assert base != A.fingerprint_examples([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, rows[1]])
    assert A.fingerprint_examples([{"x": [[1], [2, 3]], "s": "é\ud800", "n": None}]) != A.fingerprint_examples([{}])


def test_disk(tmp_path):
    free = A.free_disk(tmp_path / "not" / "yet")
    assert free > 0
    A.check_free_disk(tmp_path, 1)
    with pytest.raises(ResourceError, match="GiB are free"):
        A.check_free_disk(tmp_path / "not", 1 << 60)
