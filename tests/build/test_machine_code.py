"""Kernels compiled ahead of time for every architecture, and their machine code held to its claims."""

from __future__ import annotations

from pathlib import Path

import gate
import pytest

from benchmarks import compile_table

ROOT = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(
    gate.find_nvcc()[0] is None, reason="no nvcc: the CUDA kernels cannot be compiled on this machine"
)
# A file without a kernel needs no gate.
KERNEL_FILES = sorted(
    p for p in (ROOT / "csrc").glob("*.cu") if "<<<" in p.read_text() or "launch_kernel(" in p.read_text()
)

SPILLING = """
// gate: kernel=spills dynamic_shared=0
__global__ void __launch_bounds__(1024, 2) spills(float* out, const float* in) {
  float keep[96];
  for (int i = 0; i < 96; ++i) keep[i] = in[i * 1024 + threadIdx.x];
  for (int r = 0; r < 96; ++r) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) keep[i] = keep[i] * keep[(i * 7 + 3) % 96] + in[r];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = keep[i];
}
"""
GREEDY = """
// gate: kernel=greedy dynamic_shared=102400 tensor_cores=HMMA async_copies=LDGSTS
__global__ void greedy(float* out) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
"""


@needs_nvcc
@pytest.mark.parametrize("arch", gate.ARCHS)
@pytest.mark.parametrize("source", KERNEL_FILES, ids=lambda p: p.stem)
def test_cuda_kernels(source, arch, tmp_path):
    results = gate.check_cuda(source, arch, tmp_path)
    assert results
    assert {kernel.name: wrong for kernel, wrong in results if wrong} == {}
    rows = [compile_table.cuda_row(source, arch, kernel) for kernel, _ in results]
    version = compile_table.nvcc_version()
    assert {row["kernel"]: compile_table.differences(row, "cuda", version) for row in rows} == {
        row["kernel"]: [] for row in rows
    }


@needs_nvcc
def test_a_spilling_kernel_is_caught(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(SPILLING)
    [(_, wrong)] = gate.check_cuda(source, "80", tmp_path)
    assert any("spills" in message for message in wrong) and any("local memory" in message for message in wrong)


@needs_nvcc
def test_false_claims_are_caught(tmp_path):
    source = tmp_path / "greedy.cu"
    source.write_text(GREEDY)
    [(_, wrong)] = gate.check_cuda(source, "86", tmp_path)
    assert len(wrong) == 3
    assert "shared memory; sm_86 has 101376" in wrong[0] and "tensor-core" in wrong[1] and "asynchronous" in wrong[2]
    [(_, wrong)] = gate.check_cuda(source, "80", tmp_path)
    assert not any("shared memory" in message for message in wrong)  # fits there
    source.write_text(GREEDY.replace("kernel=greedy", "kernel=other"))
    with pytest.raises(RuntimeError, match="matches no kernel"):
        gate.check_cuda(source, "80", tmp_path)
    source.write_text(GREEDY.replace("// gate:", "//"))
    [(_, wrong)] = gate.check_cuda(source, "80", tmp_path)
    assert "no dynamic_shared claim" in wrong[0]


SIZES = {"BM": 64, "BN": 64, "BK": 32}
TYPES = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "m": "i32", "n": "i32", "k": "i32"}


@pytest.mark.parametrize(("arch", "tensor_cores"), [("80", "HMMA"), ("90", "HGMMA|HMMA")])
def test_triton_ahead_of_time(arch, tensor_cores, tmp_path):
    pytest.importorskip("triton")
    from tiny_triton import product_kernel

    cubin = tmp_path / "product.cubin"
    claims = gate.compile_triton(
        product_kernel, TYPES, SIZES, arch, cubin, divisible_by_16=("a", "b", "c", "n", "k"), num_warps=4, num_stages=3
    )
    [kernel] = gate.inspect(cubin)
    assert gate.check(kernel, arch, {**claims, "tensor_cores": tensor_cores, "async_copies": "LDGSTS|UTMALDG"}) == []


def test_triton_gate_sees_what_was_left_out(tmp_path):
    """Without the divisibility that a launcher would find, there are no asynchronous copies: the gate says so."""
    pytest.importorskip("triton")
    from tiny_triton import product_kernel

    cubin = tmp_path / "product.cubin"
    claims = gate.compile_triton(product_kernel, TYPES, SIZES, "80", cubin)
    [kernel] = gate.inspect(cubin)
    wrong = gate.check(kernel, "80", {**claims, "async_copies": "LDGSTS"})
    assert wrong == ["claims asynchronous copies (LDGSTS), but has none"]
    with pytest.raises(ValueError, match="left out"):
        gate.compile_triton(product_kernel, TYPES, {}, "80", cubin)
