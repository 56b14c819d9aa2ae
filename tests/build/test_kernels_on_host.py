"""Launchers and kernels of csrc/*.cu run under the emulator of a block, against the reference in float64."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from host_kernels import ROOT, HostKernels, compile_library

from pyinf.ops import cuda_backend, philox, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="session")
def kernels(folder):
    return HostKernels(compile_library(folder))


def randn(*shape, dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found, expected):
    """‖found − expected‖ / ‖expected‖ in float64; infinite where something is not a number."""
    found, expected = found.double(), expected.double()
    if not found.isfinite().all():
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def both_ways(kernels, op, *arguments):
    """The same bits whether the first or the last thread of a block runs first: no barrier is missing."""
    found = getattr(kernels, op)(*arguments)
    kernels.backwards(True)
    try:
        again = getattr(kernels, op)(*arguments)
    finally:
        kernels.backwards(False)
    pairs = zip(found, again, strict=True) if isinstance(found, tuple) else [(found, again)]
    assert all(torch.equal(one, other) or one.isnan().all() for one, other in pairs)
    return found


def test_normal_elements_are_those_of_python(kernels):
    seed, stream = (7 << 40) + 5, 3
    for i in (0, 11, (1 << 33) + 1):
        expected = philox.random_matrix((i, i + 1), (0, 400), seed, stream, "normal", dtype=torch.float64)[0]
        found = torch.empty(400)
        for block in range(100):
            kernels.library.host_normals(
                ctypes.c_uint64(seed), stream, ctypes.c_uint64(i), block, ctypes.c_void_p(found[4 * block :].data_ptr())
            )
        assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("batch", "d", "k", "distribution", "pad"),
    [
        (1, 37, 1, "rademacher", 0),
        (130, 300, 150, "rademacher", 4),
        (35, 270, 60, "rademacher", 1),  # rows that do not start on 16 bytes
        (17, 4500, 33, "rademacher", 4),  # in slices
        (33, 70, 130, "normal", 4),
    ],
)
def test_random_projection(kernels, dtype, batch, d, k, distribution, pad):
    x = randn(batch, (d + 7) // 8 * 8 + pad * 2, dtype=dtype)[:, :d]
    seed = (1 << 40) + 3
    expected = reference.random_projection(x.double(), k, seed, distribution)
    found = both_ways(kernels, "random_projection", x, k, seed, distribution)
    limit = 1e-6 if distribution == "rademacher" or dtype == FP32 else 1e-5
    assert error(found, expected) < limit


def test_random_projection_of_large_float16_does_not_overflow(kernels):
    x = torch.full((2, 256), 60000.0, dtype=FP16)
    found = kernels.random_projection(x, 5, 1, "rademacher")
    assert error(found, reference.random_projection(x.double(), 5, 1, "rademacher")) < 1e-6


def test_projections_of_nothing(kernels):
    assert kernels.random_projection(torch.empty(0, 5), 3, 1, "rademacher").shape == (0, 3)
    assert kernels.random_projection(torch.empty(4, 0), 3, 1, "rademacher").abs().sum() == 0
    assert kernels.sparse_projection(torch.empty(0, 5), 3, 1, 1).shape == (0, 3)
    assert kernels.sparse_projection(torch.empty(4, 0), 3, 1, 1).abs().sum() == 0
    none = torch.tensor([0])
    assert kernels.project_gradients(torch.empty(0, 5), torch.empty(0, 6), none, None, None, 3, 4)[0].shape == (0, 3, 4)
    offsets = torch.tensor([0, 2])
    empty = kernels.project_gradients(torch.empty(2, 0), randn(2, 6), offsets, None, None, 3, 4)[0]
    assert torch.equal(empty, torch.zeros(1, 3, 4))


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("batch", "d", "k", "nnz"),
    [
        (1, 50, 1, 1),  # one bucket, in as many pieces as a block has chains
        (5, 9001, 700, 2),  # rows and slices that are not whole, splits
        (4, 4100, 5000, 1),  # more buckets than a block has
        (3, 300, 2048, 3),
    ],
)
def test_sparse_projection(kernels, dtype, batch, d, k, nnz):
    x = randn(batch, d + 3, dtype=dtype)[:, :d]
    expected = reference.sparse_projection(x.double(), k, 5, nnz)
    assert error(both_ways(kernels, "sparse_projection", x, k, 5, nnz), expected) < 1e-6


def packed(lengths, d_out, d_in, dtype, seed=0):
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    n = sum(lengths)
    return randn(n, d_out + 1, dtype=dtype, seed=seed)[:, :d_out], randn(n, d_in, dtype=dtype, seed=seed + 1), offsets


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("lengths", "d_out", "d_in", "k", "nnz"),
    [([3, 0, 40, 1, 17], 70, 65, 300, 2), ([0, 0], 5, 7, 4, 1), ([33], 9, 130, 5000, 1)],
)
def test_sparse_projection_factors(kernels, dtype, lengths, d_out, d_in, k, nnz):
    g, a, offsets = packed(lengths, d_out, d_in, dtype)
    expected = reference.sparse_projection_factors(g.double(), a.double(), offsets, k, 5, nnz)
    found = both_ways(kernels, "sparse_projection_factors", g, a, offsets, k, 5, nnz)
    assert error(found, expected) < 1e-6


def test_keys_order_like_scores(kernels):
    """By score, then by the lower row; −0 is 0; not a number first, as in torch.sort."""
    kernels.library.host_compare_keys.argtypes = [ctypes.c_float, ctypes.c_int64] * 2
    kernels.library.host_key_round_trip.argtypes = [ctypes.c_float, ctypes.c_int64, ctypes.c_void_p]
    kernels.library.host_key_round_trip.restype = ctypes.c_float
    scores = [float("nan"), float("inf"), 3.0, 2.0**-140, 0.0, -(2.0**-140), -2.5, float("-inf")]
    for i, x in enumerate(scores):
        for j, y in enumerate(scores):
            assert kernels.library.host_compare_keys(x, 9, y, 9) == (i < j) - (i > j)
        row = ctypes.c_int64()
        back = kernels.library.host_key_round_trip(x, (1 << 32) - 2, ctypes.byref(row))
        assert row.value == (1 << 32) - 2 and (back == x or (back != back and x != x))
    assert kernels.library.host_compare_keys(-0.0, 3, 0.0, 4) == 1 == kernels.library.host_compare_keys(2.0, 3, 2.0, 4)


@pytest.mark.parametrize(
    ("count", "n", "bytes_", "k", "scaled"),
    [(3, 700, 13, 5, False), (9, 300, 68, 300, True), (70, 260, 16, 1, True), (1, 1500, 4, 20, False)],
)
def test_scan_of_signs(kernels, count, n, bytes_, k, scaled):
    generator = torch.Generator().manual_seed(1)
    store = torch.randint(0, 256, (n, bytes_), generator=generator, dtype=torch.uint8)
    queries = torch.randint(0, 256, (count, bytes_), generator=generator, dtype=torch.uint8)
    scale = randn(n, seed=3) if scaled else None
    expected = reference.scan_topk(queries, store, k, "1bit", scale)
    values, indices = both_ways(kernels, "scan_topk", queries[None], store, k, 0, 8 * bytes_, scale)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


def test_scan_of_nothing(kernels):
    values, indices = kernels.scan_topk(torch.empty(1, 3, 0, dtype=BF16), torch.empty(9, 0, dtype=BF16), 4, 3)
    assert torch.equal(values, torch.zeros(3, 4)) and torch.equal(indices, torch.arange(4).expand(3, 4))


def test_scan_of_int8(kernels):
    generator = torch.Generator().manual_seed(1)
    store = torch.randint(-127, 128, (500, 75), generator=generator, dtype=torch.int8)[:, :70]
    queries = torch.randint(-127, 128, (11, 70), generator=generator, dtype=torch.int8)
    expected = reference.scan_topk(queries.double(), store, 130, "int8", None)
    values, indices = both_ways(kernels, "scan_topk", queries[None], store, 130, 1)
    assert torch.equal(values.double(), expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize(("store_dtype", "query_dtype"), [(BF16, BF16), (BF16, FP32), (FP16, FP16)], ids=str)
def test_scan_of_floats(kernels, store_dtype, query_dtype):
    """Small integers, so that sums are exact and ties are many; then real values, by score."""
    whole = torch.randint(-2, 3, (400, 48), generator=torch.Generator().manual_seed(1))
    queries = torch.randint(-2, 3, (19, 48), generator=torch.Generator().manual_seed(2)).to(query_dtype)
    scale = torch.randint(0, 3, (400,), generator=torch.Generator().manual_seed(3)).float()
    kind, parts = cuda_backend.scan_layout(queries, whole.to(store_dtype), "bfloat16")
    cut = cuda_backend.cut_queries(queries, parts)
    expected = reference.scan_topk(queries, whole.to(store_dtype), 40, "bfloat16", scale)
    values, indices = both_ways(kernels, "scan_topk", cut, whole.to(store_dtype), 40, kind, 0, scale)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])
    store, queries = randn(400, 51, dtype=store_dtype)[:, :50], randn(2, 50, dtype=query_dtype, seed=4)
    scores = queries.double() @ store.double().T
    values, indices = both_ways(kernels, "scan_topk", cuda_backend.cut_queries(queries, parts), store, 40, kind)
    assert error(values, scores.topk(40).values) < 1e-6 and error(values, scores.gather(1, indices)) < 1e-6


@pytest.mark.parametrize("query_dtype", [BF16, FP16, FP32], ids=str)
def test_scan_of_int8_with_real_queries(kernels, query_dtype):
    store = torch.randint(-127, 128, (300, 100), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    queries = randn(5, 100, dtype=query_dtype)
    kind, parts = cuda_backend.scan_layout(queries, store, "int8")
    scores = queries.double() @ store.double().T
    values, indices = both_ways(kernels, "scan_topk", cuda_backend.cut_queries(queries, parts), store, 7, kind)
    assert error(values, scores.topk(7).values) < 1e-6 and error(values, scores.gather(1, indices)) < 1e-6


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("lengths", "d_out", "d_in", "k_g", "k_a", "given", "distribution"),
    [
        ([70, 0, 3, 130], 50, 37, 12, 100, "", "rademacher"),
        ([5, 16], 300, 40, 128, 33, "a", "rademacher"),
        ([9, 1], 40, 33, 5, 128, "g", "normal"),
    ],
)
def test_project_gradients(kernels, dtype, lengths, d_out, d_in, k_g, k_a, given, distribution):
    g, a, offsets = packed(lengths, d_out, d_in, dtype)
    P_g = randn(d_out, k_g, dtype=dtype, seed=5) if "g" in given else None
    P_a = randn(d_in, k_a + 7, dtype=dtype, seed=6)[:, :k_a] if "a" in given else None
    raised = [None if P is None else P.double() for P in (P_g, P_a)]
    expected = reference.project_gradients(
        g.double(), a.double(), offsets, *raised, k_g, k_a, 7, distribution, "float32"
    )[0]
    found = both_ways(kernels, "project_gradients", g, a, offsets, P_g, P_a, k_g, k_a, 7, distribution)[0]
    assert error(found, expected) < (1e-6 if dtype == FP32 else 2e-5)


@pytest.mark.parametrize("epilogue", ["bfloat16", "int8", "sign"])
def test_epilogues(kernels, epilogue):
    """What the kernel packs is what packing its float32 result gives, bit for bit."""
    g, a, offsets = packed([70, 0, 3], 20, 30, BF16)
    arguments = (g, a, offsets, None, None, 11, 13, 7, "rademacher")
    plain = kernels.project_gradients(*arguments)[0]
    out, scale = both_ways(kernels, "project_gradients", *arguments, epilogue)
    expected, expected_scale = reference.finish_projection(plain, epilogue)
    assert torch.equal(out, expected)
    assert epilogue != "int8" or torch.equal(scale, expected_scale)


@pytest.mark.parametrize("op", ["random_projection", "sparse_projection", "scan_topk", "project_gradients"])
def test_rows_past_two_to_the_31(kernels, op):
    """Offsets have 64 bits: the second row lies 2³¹ elements after the first. Untouched pages take no memory."""
    far = torch.empty((1 << 31) + 4096, dtype=torch.int8 if op == "scan_topk" else BF16)
    x = far.as_strided((2, 40), ((1 << 31) + 16, 1))
    x.copy_(randn(2, 40).mul(30) if op == "scan_topk" else randn(2, 40))
    near = x.clone()
    if op == "scan_topk":
        found, expected = (kernels.scan_topk(near[None], rows, 2, 1)[0] for rows in (x, near))
    elif op == "project_gradients":
        offsets = torch.tensor([0, 2])
        found, expected = (kernels.project_gradients(g, near, offsets, None, None, 3, 4)[0] for g in (x, near))
    else:
        project = getattr(kernels, op)
        found, expected = (project(v, 9, 1, 2 if op == "sparse_projection" else "rademacher") for v in (x, near))
    assert torch.equal(found, expected)


def damaged(folder, tmp_path, file, header, good, bad):
    """The kernels, one of them compiled from headers in which something was replaced."""
    shutil.copytree(ROOT / "csrc" / "include", tmp_path / "include")
    path = tmp_path / "include" / "pyinf" / header
    text = path.read_text()
    assert text.count(good) == 1
    path.write_text(text.replace(good, bad))
    return HostKernels(compile_library(tmp_path, folder, (file, tmp_path / "include")))


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        (BF16, "__pipeline_wait_prior(kStages - 2)", "__pipeline_wait_prior(kStages - 1)"),  # read before it arrived
        (BF16, "near.x << (7 - g)", "near.x << g"),  # another column's sign
        (BF16, "group % 2", "0"),  # signs drawn over those still in use
        (BF16, "static_cast<int>(left) : kVector", "kVector : kVector"),  # what lies past the last column
        (FP32, "if (kParts > 1 || !signs) __syncthreads();", ""),  # parts read before all were cut
    ],
)
def test_a_broken_projection_is_caught(kernels, folder, tmp_path, dtype, good, bad):
    broken = damaged(folder, tmp_path, "random_projection", "projection_tile.cuh", good, bad)
    x = torch.full((20, 608), float("nan"), dtype=dtype)
    x[:, :601] = randn(20, 601)
    x = x[:, :601]
    expected = reference.random_projection(x.double(), 40, 1, "rademacher")
    assert error(kernels.random_projection(x, 40, 1, "rademacher"), expected) < 1e-6
    assert error(broken.random_projection(x, 40, 1, "rademacher"), expected) > 1e-3


def test_chains_that_are_not_sorted_are_caught(kernels, folder, tmp_path):
    broken = damaged(
        folder, tmp_path, "sparse_projection", "sparse_projection.cuh", "(me & kNone) < (sorted & kNone)", "true"
    )
    x = randn(4, 4000)
    first = broken.sparse_projection(x, 300, 5, 1)
    broken.backwards(True)
    assert not torch.equal(broken.sparse_projection(x, 300, 5, 1), first)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("0xFFFFFFFFu - static_cast<std::uint32_t>(row))", "static_cast<std::uint32_t>(row))"),  # ties
        ("*threshold = keys[k - 1]", "*threshold = keys[0]"),  # the k-th best is turned away
    ],
)
def test_a_broken_scan_is_caught(folder, kernels, tmp_path, good, bad):
    broken = damaged(folder, tmp_path, "scan_topk", "scan_topk.cuh", good, bad)
    store = torch.randint(-2, 3, (500, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    expected = reference.scan_topk(store[:9], store, 5, "int8", None)
    assert torch.equal(kernels.scan_topk(store[None, :9], store, 5, 1)[1], expected[1])
    assert not torch.equal(broken.scan_topk(store[None, :9], store, 5, 1)[1], expected[1])
