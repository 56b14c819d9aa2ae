"""The extension that is installed."""

from __future__ import annotations

import subprocess
import sys

import torch

from pyinf import _C


def test_build_config():
    config = _C.build_config()
    assert {"compiler", "cxx_flags", "git_hash", "cuda", "cuda_archs", "nvcc", "cpu_isa", "openmp"} <= set(config)
    assert config["cuda"] == hasattr(_C, "cuda_accumulate_squared_gradients")
    if config["cuda"]:
        assert config["nvcc"] and config["cuda_archs"]


def test_error_names():
    assert _C.error_name(0) == "ok"
    assert _C.error_name(-2) == "unsupported dtype"
    assert "unknown" in _C.error_name(-99)


def test_kernels_triton_are_part_of_the_package():
    import pyinf.triton_kernels

    assert pyinf.triton_kernels.__name__ == "pyinf.triton_kernels"


def test_one_openmp_runtime_beside_torch():
    """Imported after torch, the extension uses torch's libgomp: two pools of threads would fight for the cores."""
    if not _C.build_config()["openmp"] or sys.platform != "linux":
        return
    program = (
        "import torch, pyinf._C; torch.ones(8, 8) @ torch.ones(8, 8);"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


def test_launcher_refuses_before_it_touches_the_device():
    if not hasattr(_C, "cuda_accumulate_squared_gradients"):
        assert not _C.build_config()["cuda"]
        return
    valid = dict(lam=64, ld_lam=8, g=64, ld_g=4, a=64, ld_a=8, offsets=64, sequences=1, d_out=4, d_in=8)
    launch = _C.cuda_accumulate_squared_gradients
    rest = dict(device=0, stream=0)
    float32, float64 = _C.DTYPES["float32"], _C.DTYPES["float64"]
    assert _C.error_name(launch(**valid, dtype=float64, **rest)) == "unsupported dtype"
    for wrong in ({"sequences": -1}, {"ld_lam": 7}, {"ld_g": 3}, {"ld_a": 7}, {"lam": 0}, {"offsets": 0}):
        assert _C.error_name(launch(**{**valid, **wrong}, dtype=float32, **rest)) == "invalid argument"
    for empty in ({"sequences": 0}, {"d_out": 0}, {"d_in": 0}):
        assert launch(**{**valid, **empty}, dtype=float32, **rest) == 0
    if not torch.cuda.is_available():
        assert launch(**valid, dtype=float32, **rest) > 0  # a CUDA error code, not a crash
        assert _C.cuda_device_count() <= 0
