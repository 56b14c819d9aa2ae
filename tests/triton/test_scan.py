"""scan_topk: the reference's order to the last tie, in every format, and whichever groups and rounds it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyinf import ops
from pyinf.errors import BackendUnavailableError
from pyinf.ops import triton_backend, triton_scan
from pyinf.triton_kernels import scan_topk as kernels
from tests.ops.cases import packed_signs
from tests.triton.harness import quick, wider


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Blocks of 16 keys: the interpreter sorts 256 of them in seconds."""
    monkeypatch.setattr(kernels, "_LEAST_WIDTH", 16)


def _integers(n, d, dtype, seed, largest=3):
    return torch.randint(-largest, largest + 1, (n, d), generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(queries, rows, k, format="bfloat16", scale=None):
    """Integer scores are exact in any order of summation: values and indices must be equal."""
    with ops.use_backend("triton"):
        values, indices = ops.scan_topk(queries, rows, k, format, scale)
    up = [x if x.dtype == torch.uint8 else x.float() if x.is_floating_point() else x for x in (queries, rows)]
    if format == "int8":
        up[0] = queries.float()
    with ops.use_backend("reference"):
        want = ops.scan_topk(*up, k, format, scale)
    assert torch.equal(values, want[0])
    assert torch.equal(indices, want[1])


@quick
@given(
    st.sampled_from([0, 1, 3, 17]), st.integers(0, 90), st.integers(1, 40), st.integers(0, 20),
    st.sampled_from(["float32", "float16", "mixed", "int8", "int8 queries"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_integer_values_with_many_ties(count, n, d, k, kind, scaled, seed):
    if kind.startswith("int8"):
        rows, format = _integers(n, d, torch.int8, seed), "int8"
        queries = _integers(count, d, torch.int8 if "queries" in kind else torch.float16, seed + 1)
    else:
        dtypes = {"float32": (torch.float32,) * 2, "float16": (torch.float16,) * 2}.get(
            kind, (torch.float32, torch.float16)
        )
        queries, rows = _integers(count, d, dtypes[0], seed + 1), wider(_integers(n, d, dtypes[1], seed), 3)
        format = "bfloat16"
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(-2, 3, (n,), generator=generator).float() if scaled else None
    same(queries, rows, k, format, scale)


@quick
@given(st.integers(1, 4), st.integers(0, 70), st.integers(1, 150), st.integers(1, 20), st.booleans(), st.integers(0, 9))
def test_signs(count, n, d, k, scaled, seed):
    _, rows = packed_signs(n, d, seed)
    queries, bits = packed_signs(count, d, seed + 100)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed)).round(decimals=1) if scaled else None
    same(queries, rows, k, "1bit", scale)
    if d % 8 == 0:
        same(bits, rows, k, "1bit", scale)


def test_several_rounds_of_selection(monkeypatch):
    """Few blocks a program: the groups, and the rows of the best groups, are selected in more than one round."""
    monkeypatch.setattr(kernels, "_BLOCKS_A_PROGRAM", 2)
    rows, queries = _integers(900, 3, torch.float32, 0), _integers(1, 3, torch.float32, 1)
    launches = []
    original = kernels._select
    monkeypatch.setattr(kernels, "_select", lambda *args: launches.append(list(original(*args))) or launches[-1])
    same(queries, rows, 6)
    assert [len(part) for part in launches] == [2, 2]  # 57 groups, 96 rows


def test_blocks_of_the_width_that_runs_on_a_card(monkeypatch):
    monkeypatch.setattr(kernels, "_LEAST_WIDTH", 256)
    same(_integers(1, 3, torch.float32, 1), _integers(600, 3, torch.float32, 0), 20)


def test_queries_in_parts(monkeypatch):
    monkeypatch.setattr(kernels, "_MAXIMA", 1)
    table = {"default": {**kernels.CONFIGS["default"], "ieee many": kernels.CONFIGS["default"]["ieee few"]}}
    monkeypatch.setattr(kernels, "CONFIGS", table)  # 16 queries a tile instead of 64
    same(_integers(18, 5, torch.float32, 0), _integers(40, 5, torch.float32, 1), 2)


def test_real_values_and_negative_zero():
    generator = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(200, 70, generator=generator), torch.randn(3, 70, generator=generator)
    with ops.use_backend("triton"):
        values, indices = ops.scan_topk(queries, rows, 9)
    with ops.use_backend("reference"):
        want = ops.scan_topk(queries.double(), rows.double(), 9)
    assert torch.equal(indices, want[1])
    assert torch.allclose(values.double(), want[0], rtol=1e-6)
    zeros = torch.tensor([[0.0], [-0.0], [0.0]])  # the products are 0, -0, 0: one score
    same(torch.ones(1, 1), zeros, 3)
    same(torch.ones(1, 1), torch.full((20, 1), float("-inf")), 18)
    same(torch.ones(1, 1), torch.tensor([[1.0], [float("inf")], [float("-inf")]]), 3)


def test_equal_rows_far_apart_keep_their_order():
    row = torch.randn(1, 33, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(300, 33, generator=torch.Generator().manual_seed(1)) * 0.1
    rows[[7, 150, 299]] = row
    with ops.use_backend("triton"):
        values, indices = ops.scan_topk(row, rows, 2)
    assert indices.tolist() == [[7, 150]] and values[0, 0] == values[0, 1]


def test_refusals_give_a_reason():
    x = torch.ones(2000, 8)
    with ops.use_backend("triton"):
        with pytest.raises(BackendUnavailableError, match="at most 1024 rows"):
            ops.scan_topk(x, x, 1025)
        with pytest.raises(BackendUnavailableError, match="float64"):
            ops.scan_topk(x.double(), x.double(), 3)


def test_an_old_triton_keeps_fewer(monkeypatch):
    assert triton_scan._largest_k() == (1024, "")
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(triton_backend, "triton_version", lambda: (3, 2))
    assert triton_scan._largest_k() == (512, " (1024 from Triton 3.6 on)")
    monkeypatch.setattr(triton_scan, "check_tensors", lambda *tensors, dtypes=(): None)
    x = torch.ones(2000, 8)
    assert "at most 512 rows" in triton_scan._check_scan(x[:1], x, 513, "bfloat16", None)
    assert triton_scan._check_scan(x[:1], x, 512, "bfloat16", None) is None
