"""Kernels that only tests need: the parts of philox.py one by one."""

import triton
import triton.language as tl

from pyinf.triton_kernels.philox import _cos_sin, _minus_log, sparse_draw


@triton.jit
def box_muller_kernel(words, log, cosine, sine, N: tl.constexpr):
    at = tl.arange(0, N)
    w = tl.load(words + at).to(tl.uint32)
    c, s = _cos_sin(w)
    tl.store(log + at, _minus_log(w))
    tl.store(cosine + at, c)
    tl.store(sine + at, s)


@triton.jit
def sparse_fill_kernel(buckets, signs, first, k, low, high, N: tl.constexpr):
    s = tl.program_id(0)
    at = tl.arange(0, N)
    bucket, negative = sparse_draw(first + at.to(tl.int64), s, k, low, high, 0)
    tl.store(buckets + s * N + at, bucket.to(tl.int64))
    tl.store(signs + s * N + at, tl.where(negative == 1, -1.0, 1.0))
