"""Philox in Triton draws the numbers of pyinf/ops/philox.py, whatever the tile; so does every projection kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyinf.ops import philox as ours
from pyinf.ops import reference
from pyinf.triton_kernels import philox
from tests.triton.harness import quick
from tests.triton.philox_kernels import box_muller_kernel, sparse_fill_kernel


def drawn(rows, columns, first_row, first_column, seed, stream, normal, R=16, K=32):
    out = torch.full((rows, columns), float("nan"))
    low, high = philox.key(seed)
    grid = (-(-rows // R), -(-columns // K))
    philox.fill_kernel[grid](
        out, rows, columns, first_row, first_column, low, high, STREAM=stream, NORMAL=normal, R=R, K=K
    )
    return out


_ends = [0, 1, -1, 1 << 31, (1 << 63) - 1, -(1 << 63)]
seeds = st.one_of(st.sampled_from(_ends), st.integers(-(1 << 63), (1 << 63) - 1))


@quick
@given(seeds, st.integers(0, 3), st.integers(0, 1 << 40), st.integers(1, 20))
def test_signs_are_equal_bit_for_bit(seed, stream, first, rows):
    for K in (16, 32, 64, 128):
        found = drawn(rows, K, first, 256, seed, stream, False, K=K)
        assert torch.equal(found, ours.random_matrix((first, first + rows), (256, 256 + K), seed, stream))


@pytest.mark.parametrize("first", [0, (1 << 32) - 3, 1 << 33])
def test_row_numbers_have_64_bits(first):
    found = drawn(7, 128, first, 128, 5, 1, False, R=8, K=128)
    assert torch.equal(found, ours.random_matrix((first, first + 7), (128, 256), 5, 1))


def test_windows_and_tiles_do_not_matter():
    whole = drawn(40, 128, 3, 0, 9, 0, False, R=64, K=128)
    assert torch.equal(whole[:, :32], drawn(40, 32, 3, 0, 9, 0, False, R=16, K=32))
    assert torch.equal(whole[5:], drawn(35, 128, 8, 0, 9, 0, False, R=16, K=128))


@quick
@given(seeds, st.integers(0, 1 << 40), st.integers(0, 50))
def test_normal_numbers_agree_to_the_last_places(seed, first, block):
    found = drawn(16, 64, first, 64 * block, seed, 2, True, K=64)
    want = ours.random_matrix((first, first + 16), (64 * block, 64 * block + 64), seed, 2, "normal")
    assert torch.allclose(found, want, rtol=4e-7, atol=4e-7)


def test_normal_numbers_at_the_ends_of_the_range():
    """The largest and the smallest radius, and every quadrant of the angle, against float64."""
    words = torch.tensor([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFF00, 0xFFFFFFFE, 0xFFFFFFFF])
    log, cosine, sine = (torch.full((16,), float("nan")) for _ in range(3))
    padded = torch.zeros(16, dtype=torch.int64)
    padded[: words.numel()] = words
    box_muller_kernel[(1,)](padded, log, cosine, sine, N=16)
    u = (padded.double() + 1) / 2**32
    angle = 2 * torch.pi * padded.double() / 2**32
    assert torch.allclose(log.double(), -torch.log(u), rtol=3e-7, atol=0)
    assert torch.allclose(cosine.double(), torch.cos(angle), rtol=0, atol=2e-7)
    assert torch.allclose(sine.double(), torch.sin(angle), rtol=0, atol=2e-7)


def test_sparse_coordinates():
    n, k, nnz, seed = 64, 1000, 3, -77
    low, high = philox.key(seed)
    for first in (0, (1 << 32) - 7):
        buckets, signs = torch.full((nnz, n), -1, dtype=torch.int64), torch.zeros(nnz, n)
        sparse_fill_kernel[(nnz,)](buckets, signs, first, k, low, high, N=n)
        want = ours.sparse_coordinates((first, first + n), k, nnz, seed, 0)
        assert torch.equal(buckets.T, want[0]) and torch.equal(signs.T, want[1])


def test_streams_are_those_of_the_reference():
    found = philox.STREAM_PROJECTION, philox.STREAM_G, philox.STREAM_A
    assert found == (reference.STREAM_PROJECTION, reference.STREAM_G, reference.STREAM_A)
