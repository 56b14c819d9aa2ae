"""The extension that is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
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


OUTPUT = dict(out=64, ld_out=8, workspace=64, workspace_bytes=1 << 30, device=0, stream=0, seed=1, dtype=0)
MATRIX = dict(x=64, ld_x=40, batch=3, d=40, k=8, philox_stream=0)
LAUNCHES = {
    "random_projection": (
        {**OUTPUT, **MATRIX, "distribution": 0},
        [{"batch": -1}, {"k": 0}, {"ld_out": 7}, {"ld_x": 39}, {"distribution": 2}, {"out": 0}, {"x": 0}],
        [{"batch": 0}],
    ),
    "sparse_projection": (
        {**OUTPUT, **MATRIX, "nnz": 1},
        [{"batch": -1}, {"k": 0}, {"nnz": 0}, {"ld_out": 7}, {"ld_x": 39}, {"out": 0}, {"x": 0}],
        [{"batch": 0}],
    ),
    "sparse_projection_factors": (
        {**OUTPUT, "philox_stream": 0, "nnz": 1, "k": 8, "g": 64, "ld_g": 4, "a": 64, "ld_a": 5, "offsets": 64}
        | {"sequences": 2, "d_out": 4, "d_in": 5},
        [{"sequences": -1}, {"ld_g": 3}, {"ld_a": 4}, {"offsets": 0}, {"out": 0}],
        [{"sequences": 0}],
    ),
    "scan_topk": (
        {key: OUTPUT[key] for key in ("workspace", "workspace_bytes", "device", "stream")}
        | {"values": 64, "indices": 64, "queries": 64, "part_stride": 0, "ld_queries": 8, "rows": 64, "ld_rows": 8}
        | {"scale": 0, "count": 2, "n": 9, "d": 8, "bits": 64, "k": 3, "format": 0, "parts": 1},
        [{"count": -1}, {"k": 10}, {"ld_rows": 7}, {"values": 0}, {"workspace_bytes": 8}, {"parts": 0}],
        [{"count": 0}, {"k": 0}],
    ),
    "project_gradients": (
        {key: value for key, value in OUTPUT.items() if key != "ld_out"}
        | {"row_scale": 0, "g": 64, "ld_g": 4, "a": 64, "ld_a": 5, "offsets": 64, "rows": 9, "sequences": 2, "d_out": 4}
        | {"d_in": 5, "p_g": 0, "ld_p_g": 0, "p_a": 0, "ld_p_a": 0, "k_g": 3, "k_a": 2, "stream_g": 1, "stream_a": 2}
        | {"distribution": 0, "epilogue": 0},
        [{"k_g": 0}, {"ld_a": 4}, {"epilogue": 2}, {"epilogue": 4}, {"workspace": 0}, {"p_g": 64, "ld_p_g": 2}],
        [{"sequences": 0}],
    ),
}


@pytest.mark.parametrize("op", LAUNCHES)
def test_launchers_refuse_before_they_touch_the_device(op):
    if not hasattr(_C, "cuda_scan_topk"):
        assert not _C.build_config()["cuda"]
        return
    valid, wrong, empty = LAUNCHES[op]
    launch = getattr(_C, f"cuda_{op}")
    for change in wrong:
        assert _C.error_name(launch(**{**valid, **change})) == "invalid argument", change
    for change in empty:
        assert launch(**{**valid, **change}) == 0
    unknown = {"format": 9} if op == "scan_topk" else {"dtype": _C.DTYPES["float64"]}
    assert _C.error_name(launch(**{**valid, **unknown})) == "unsupported dtype"
    if not torch.cuda.is_available():
        assert launch(**valid) > 0  # a CUDA error code, not a crash


def test_limits_of_the_launchers():
    if not hasattr(_C, "cuda_scan_topk"):
        return
    scan, project = LAUNCHES["scan_topk"][0], LAUNCHES["project_gradients"][0]
    for launch, arguments in (
        (_C.cuda_scan_topk, {**scan, "n": 10**6, "k": 513}),
        (_C.cuda_scan_topk, {**scan, "n": 1 << 32}),
        (_C.cuda_scan_topk, {**scan, "d": 1 << 18, "ld_rows": 1 << 18, "ld_queries": 1 << 18, "format": 1}),
        (_C.cuda_project_gradients, {**project, "k_g": 129}),
    ):
        assert _C.error_name(launch(**arguments)).startswith("unsupported shape")


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
