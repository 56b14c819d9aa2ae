"""Device code run by the host compiler: index maps as they stand, a whole kernel under a small emulator of a block."""

from __future__ import annotations

import shutil
import subprocess

import pytest

SOURCES = "csrc/include"


def compile_and_run(source, includes, output):
    command = [shutil.which("c++"), "-std=c++17", "-O1", "-w", *(f"-I{i}" for i in includes), str(source)]
    subprocess.run([*command, "-o", str(output), "-lpthread"], check=True)
    return subprocess.run([str(output)], capture_output=True, text=True)


def test_index_maps_visit_everything_once(root, tmp_path):
    done = compile_and_run(root / "tests/build/index_maps.cpp", [root / SOURCES], tmp_path / "maps")
    assert done.returncode == 0, done.stdout


def test_squared_gradients_kernel(root, tmp_path):
    here = root / "tests/build"
    done = compile_and_run(
        here / "squared_gradients_host.cpp", [here / "host_cuda", root / SOURCES], tmp_path / "kernel"
    )
    assert done.returncode == 0 and done.stdout.count("ok") == 6, done.stdout


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("__pipeline_wait_prior(kStages - 2)", "__pipeline_wait_prior(kStages - 1)"),  # a stage read before it arrived
        ("if (now.last_of_sequence()) work.square()", "work.square()"),  # squares of chunks, not of sequences
        ("row < count && column", "column"),  # rows of the next sequence leak in
    ],
)
def test_emulator_catches_a_broken_kernel(root, tmp_path, good, bad):
    headers = tmp_path / "pyinf"
    shutil.copytree(root / SOURCES / "pyinf", headers)
    kernel = headers / "accumulate_squared_gradients.cuh"
    text = kernel.read_text()
    assert good in text
    kernel.write_text(text.replace(good, bad))
    here = root / "tests/build"
    done = compile_and_run(here / "squared_gradients_host.cpp", [here / "host_cuda", tmp_path], tmp_path / "kernel")
    assert done.returncode != 0 and "WRONG" in done.stdout
