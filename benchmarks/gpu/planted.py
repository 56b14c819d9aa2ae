"""A Triton kernel that is wrong on purpose: the control of the sanitizer."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_beyond(x, beyond, BLOCK: tl.constexpr):
    """Writes ``BLOCK`` elements that start ``beyond`` elements after ``x``."""
    index = beyond + tl.arange(0, BLOCK)
    tl.store(x + index, index.to(tl.float32))
