"""Wheels built in isolation, from the source tree and from the source distribution, with and without nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_extension  # noqa: E402
import check_wheel  # noqa: E402

NVCC = build_extension.find_nvcc()[0]


def environment(nvcc: bool, **more: str) -> dict[str, str]:
    """This environment, with every way to nvcc cut off unless it is wanted."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PYINF_") and k != "TORCH_CUDA_ARCH_LIST"}
    if not nvcc:
        keep = {k: v for k, v in keep.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
        # A folder may hold nvcc and also things that the build needs, so it is replaced by links to everything else.
        folders = []
        for i, folder in enumerate(keep["PATH"].split(os.pathsep)):
            if Path(folder, "nvcc").exists():
                clean = Path(more["SCRATCH"], f"path{i}")
                clean.mkdir()
                for entry in Path(folder).iterdir():
                    if entry.name != "nvcc":
                        (clean / entry.name).symlink_to(entry)
                folder = str(clean)
            folders.append(folder)
        keep["PATH"] = os.pathsep.join(folders)
    return {**keep, **more}


def pip_wheel(source: Path, output: Path, env: dict[str, str]) -> Path:
    """An isolated build, as a user's ``pip wheel .`` does it: no torch in it, whatever is installed here."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(output), str(source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = output.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(output), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [archive] = output.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    [root] = folder.iterdir()
    return root


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The files of this checkout that git tracks or would, without any build product."""
    folder = tmp_path_factory.mktemp("clone")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        return ROOT  # not a checkout: an unpacked source distribution
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def leave_mark(line: str) -> None:
    """For .ci/run, which fails where no wheel was looked at."""
    marker = ROOT / "build" / "wheel-checked"
    marker.parent.mkdir(exist_ok=True)
    with marker.open("a") as handle:
        handle.write(line + "\n")


@pytest.fixture(scope="session")
def plain_wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return pip_wheel(clone, folder / "out", environment(False, SCRATCH=str(folder)))


def test_wheel_without_nvcc(plain_wheel):
    line, config, wrong = check_wheel.describe(plain_wheel)
    assert not wrong and not config["cuda"], (line, wrong)
    leave_mark(line)


def test_source_distribution_builds_the_same_wheel_with_nvcc(sdist, unpacked, plain_wheel, tmp_path):
    names = tarfile.open(sdist).getnames()
    inside = {name.split("/", 1)[-1] for name in names}
    assert {"setup.py", "csrc/bindings.cpp", "tools/build_extension.py", "GIT_HASH", "Makefile"} <= inside
    assert not [n for n in inside if n.endswith((".so", ".o")) or n.startswith(("build/", ".venv"))]
    env = environment(True, PYINF_CUDA="1" if NVCC else "0", TORCH_CUDA_ARCH_LIST="8.0;9.0a")
    wheel = pip_wheel(unpacked, tmp_path / "sdist", env)
    line, config, wrong = check_wheel.describe(wheel)
    assert not wrong, (line, wrong)
    assert config["cuda"] == bool(NVCC)
    if NVCC:
        assert config["cuda_archs"] == ["sm_80", "sm_90a"]
    assert config["git_hash"] == (unpacked / "GIT_HASH").read_text().strip() != "unknown"
    assert zipfile.ZipFile(plain_wheel).namelist() == zipfile.ZipFile(wheel).namelist()
    leave_mark(line)


def test_cuda_asked_for_without_nvcc_is_an_error(clone, tmp_path):
    env = environment(False, SCRATCH=str(tmp_path), PYINF_CUDA="1")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no nvcc" in done.stderr and "pip install nvidia-cuda-nvcc" in done.stderr
