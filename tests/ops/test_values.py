"""Every op on every backend and dtype against the float64 reference."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import CASES, DTYPES, LAYOUTS, backends, exact, layer, make_layer, run

pytestmark = pytest.mark.usefixtures("poison")

CEILING = {torch.float64: 1e-13, torch.float32: 1e-5}
# In float64 plain torch is the reference itself and its error is 0, hence the floor. In float32 an op that sums very
# many terms into very few outputs has an error that is chance in any one run: its floor is what such sums have.
FLOOR = {torch.float64: 3e-14, torch.float32: 3e-7}
LONG_SUMS = {
    "dense_scores": 3e-6,
    "low_rank_scores": 3e-6,
    "gradient_dot": 1e-6,
    "project_gradients": 6e-7,
    "random_projection": 1e-6,
}
PAIRS = [(op, backend) for op in CASES for backend in backends(op)]


def error(out, ref):
    assert out.shape == ref.shape
    if out.numel() == 0:
        return 0.0
    return ((out.double() - ref).norm() / ref.norm().clamp_min(1e-300)).item() if ref.norm() > 0 else out.norm().item()


def check(op, backend, x, dtype):
    """At most twice the error of plain torch in the same dtype, and under the ceiling of what sums are kept in."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    outs, plain, refs = run(op, backend, x, dtype), run(op, "reference", x, dtype), exact(op, x, dtype)
    floor = FLOOR[sums] if sums == torch.float64 else LONG_SUMS.get(op, FLOOR[sums])
    for out, simple, ref in zip(outs, plain, refs, strict=True):
        assert out.dtype == sums
        assert torch.isfinite(out).all(), f"{op} on {backend} is not finite"
        got, allowed = error(out, ref), max(2 * error(simple, ref), floor)
        assert got <= min(allowed, CEILING[sums]), f"{op} on {backend}: error {got:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_error_gate(op, backend, dtype):
    for name in LAYOUTS:
        check(op, backend, layer(name, dtype), dtype)
    check(op, backend, layer("odd", dtype, strided=True), dtype)


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_same_bits_twice(op, backend):
    x = layer("long", torch.float32)
    for first, second in zip(run(op, backend, x, torch.float32), run(op, backend, x, torch.float32), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("op", [op for op, backend in PAIRS if backend == "cpu"])
def test_cpp_does_not_depend_on_threads(op):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([run(op, "cpu", layer(name, torch.float32), torch.float32) for name in ("wide", "long")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(chain(*results[0]), chain(*other), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("op", [op for op, backend in PAIRS if backend == "cpu"])
def test_cpp_on_every_instruction_set(op, isa, monkeypatch):
    monkeypatch.setenv("PYINF_CPU_ISA", isa)  # above what the processor has: the best it has
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for name in ("odd", "long", "wide"):
            check(op, "cpu", layer(name, dtype), dtype)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=5),
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(lengths, d_out, d_in, dtype, strided, seed):
    x = make_layer(lengths, d_out, d_in, dtype, strided, seed)
    for op, backend in PAIRS:
        if op not in ("precondition", "random_projection", "project_gradients"):
            check(op, backend, x, dtype)


def test_half_precision_specials():
    """Subnormals, the largest values, infinities and NaN of float16 and bfloat16 come through the C++ conversion."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype)[:, None]
        one, marks = torch.ones(x.shape[0], 1, dtype=dtype), torch.arange(x.shape[0] + 1)
        from pyinf.ops import accumulate_squared_gradients, use_backend

        with use_backend("cpu"):
            for part in (x[torch.isfinite(x)][:, None],):
                n = part.shape[0]
                Lam = torch.zeros(n, 1)
                accumulate_squared_gradients(Lam, part.T.contiguous(), one[:1], marks[:2])
                assert torch.equal(Lam[:, 0], part[:, 0].float() ** 2)
            for value in (float("inf"), -float("inf"), float("nan")):
                Lam = accumulate_squared_gradients(torch.zeros(1, 1), torch.tensor([[value]], dtype=dtype), one[:1])
                assert not torch.isfinite(Lam).any()
