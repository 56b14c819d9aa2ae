"""The build's own choices: architectures, compilers, what a change of options does."""

from __future__ import annotations

import dataclasses
import os
import stat

import build_extension as build
import pybind11  # noqa: F401  (loaded before a test hides sys.path)
import pytest


@pytest.mark.parametrize(
    ("text", "machine", "ptx"),
    [
        (None, ["80", "86", "89", "90a"], ["89"]),
        ("", ["80", "86", "89", "90a"], ["89"]),
        ("8.0;9.0a+PTX", ["80", "90a"], ["90a"]),
        ("8.0 8.6+PTX", ["80", "86"], ["86"]),
        ("9.0, 12.0f", ["90", "120f"], []),
    ],
)
def test_arch_list(text, machine, ptx):
    assert build.parse_arch_list(text) == (machine, ptx)


@pytest.mark.parametrize("text", ["Hopper", "80", "8.0+ptx", "7.5"])
def test_arch_list_says_what_is_wrong(text):
    with pytest.raises(build.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        build.parse_arch_list(text)


def test_gencode():
    flags = build.gencode_flags(["90a"], ["89"])
    assert flags == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_89,code=compute_89"]


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    for name in ("PYINF_NVCC", "CUDA_HOME", "CUDA_PATH", "PYINF_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    folders = [d for d in os.environ["PATH"].split(os.pathsep) if not os.path.exists(os.path.join(d, "nvcc"))]
    compiler = build.shutil.which("c++")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").symlink_to(compiler)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), *folders]))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    return tmp_path


def _fake_nvcc(path):
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_nvcc_is_looked_for_in_order(no_nvcc, monkeypatch):
    assert build.find_nvcc()[0] is None
    wheel = _fake_nvcc(no_nvcc / "nvidia" / "cu13" / "bin" / "nvcc")
    assert build.find_nvcc() == (wheel, "pip wheel")
    on_path = _fake_nvcc(no_nvcc / "path" / "nvcc")
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}{os.environ['PATH']}")
    assert build.find_nvcc() == (on_path, "PATH")
    for name in ("CUDA_PATH", "CUDA_HOME"):
        home = _fake_nvcc(no_nvcc / name / "bin" / "nvcc")
        monkeypatch.setenv(name, str(no_nvcc / name))
        assert build.find_nvcc() == (home, name)
    explicit = _fake_nvcc(no_nvcc / "mine" / "nvcc")
    monkeypatch.setenv("PYINF_NVCC", str(explicit))
    assert build.find_nvcc() == (explicit, "PYINF_NVCC")
    monkeypatch.setenv("PYINF_NVCC", str(no_nvcc / "absent"))
    with pytest.raises(build.BuildError, match="PYINF_NVCC"):
        build.find_nvcc()


def test_cuda_wanted_without_nvcc_says_how_to_get_one(no_nvcc, monkeypatch):
    assert not build.make_toolchain(no_nvcc).cuda
    monkeypatch.setenv("PYINF_CUDA", "1")
    with pytest.raises(build.BuildError, match=r"(?s)no nvcc.*pip install nvidia-cuda-nvcc"):
        build.make_toolchain(no_nvcc)
    monkeypatch.setenv("PYINF_CUDA", "yes")
    with pytest.raises(build.BuildError, match="auto, 0, 1"):
        build.make_toolchain(no_nvcc)


def test_cuda_can_be_switched_off(monkeypatch, tmp_path):
    monkeypatch.setenv("PYINF_CUDA", "0")
    tools = build.make_toolchain(tmp_path)
    assert not tools.cuda and tools.nvcc_found == "PYINF_CUDA=0"
    assert "-march=native" not in tools.cxx_flags


def test_changed_options_start_afresh_and_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PYINF_CUDA", "0")
    tools = build.make_toolchain(tmp_path)
    said = []
    build.apply_options(tools, tmp_path, said.append)
    (tmp_path / "kernel.cpp.o").touch()
    build.apply_options(tools, tmp_path, said.append)
    assert not said and (tmp_path / "kernel.cpp.o").exists()
    build.apply_options(dataclasses.replace(tools, debug=True), tmp_path, said.append)
    assert any("debug: False -> True" in line for line in said)
    assert not (tmp_path / "kernel.cpp.o").exists()


def test_unknown_instruction_set_in_a_file_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PYINF_CUDA", "0")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "kernel.sse9.cpp").touch()
    tools = build.make_toolchain(tmp_path)
    with pytest.raises(build.BuildError, match="sse9"):
        build.write_ninja(tools, tmp_path, tmp_path, tmp_path / "_C.so")


def test_hash_comes_from_git_or_from_the_source_distribution(root, tmp_path):
    assert build.git_hash(tmp_path) == "unknown"
    (tmp_path / build.HASH_FILE).write_text("abc\n")
    assert build.git_hash(tmp_path) == "abc"
