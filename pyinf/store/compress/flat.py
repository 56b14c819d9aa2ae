"""Flat random projections of whole gradients: dense (Johnson–Lindenstrauss) or sparse, without holding a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Layer
from pyinf.curvature.gradients import LayerGradients
from pyinf.curvature.rotate import input_rows, working
from pyinf.store.compress.base import layer_seed

__all__ = ["FlatProjection", "gradient_blocks", "row_blocks"]

KINDS = ("rademacher", "normal", "sparse")
_BLOCK = 1 << 18  # coordinates projected at a time; part of the definition of the matrix, hence the same everywhere
_WORKSPACE = 1 << 24  # elements of formed gradients at a time: 64 MiB in float32

Elementwise = Callable[[Layer, slice, slice, Tensor], Tensor]


def row_blocks(layer: Layer) -> list[slice]:
    """Rows of the layer's gradient that are projected together: at most 2¹⁸ coordinates, by its shape alone."""
    step = max(1, _BLOCK // layer.columns)
    return [slice(start, min(start + step, layer.d_out)) for start in range(0, layer.d_out, step)]


def gradient_blocks(layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Iterator[tuple[slice, int, slice, Tensor]]:
    """Every gradient of the batch in pieces: ``(sequences, number of the block, its rows, [b, r, d_in(+1)])``."""
    g, a = working(g), input_rows(a, layer.bias)
    marks = offsets.tolist()
    blocks = row_blocks(layer)
    together = max(1, _WORKSPACE // (blocks[0].stop * layer.columns))
    for first in range(0, len(marks) - 1, together):
        part = marks[first : first + together + 1]
        tokens = slice(part[0], part[-1])
        gradients = LayerGradients(g[tokens], a[tokens], [mark - part[0] for mark in part])
        for number, rows in enumerate(blocks):
            yield slice(first, first + len(part) - 1), number, rows, gradients.rows(rows)


class FlatProjection:
    """``vec(G) P / √k`` of every sequence: ``[B, k]``.

    ``P``'s elements are independent, ±1 (``rademacher``) or standard normal, drawn from Philox with a seed for every
    layer and block of 2¹⁸ coordinates, so that the sum over layers is the projection of the concatenated gradient.
    ``sparse``: every coordinate goes with a random sign to one random of the k buckets (SJLT, Kane and Nelson 2014);
    ``2·T·D`` operations a sequence in place of ``2·D·(T + k)``. ``elementwise`` changes a block of gradients first.

    The gradients of a block are formed: for ``T ≥ 2`` tokens and ``k ≥ 2`` that costs less than ``Σ_t g_tᵀR_ja_t`` for
    each of the k columns.
    """

    def __init__(self, k: int, seed: int, kind: str, elementwise: bool = False) -> None:
        self.k, self.seed, self.kind, self.elementwise = k, seed, kind, elementwise

    def __call__(
        self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor, change: Elementwise | None = None
    ) -> Tensor:
        """``change(layer, sequences, rows, block)`` is applied to every block; only with ``elementwise``."""
        assert change is None or self.elementwise
        if self.kind == "sparse" and not self.elementwise:
            seed = layer_seed(self.seed, layer.name, "sparse")
            return ops.sparse_projection_factors(working(g), input_rows(a, layer.bias), offsets, k=self.k, seed=seed)
        out: Tensor | None = None
        for sequences, number, rows, block in gradient_blocks(layer, a, g, offsets):
            if out is None:
                out = torch.zeros(offsets.numel() - 1, self.k, dtype=block.dtype, device=block.device)
            if change is not None:
                block = change(layer, sequences, rows, block)
            seed = layer_seed(self.seed, layer.name, f"block {number}")
            flat = block.flatten(1)
            if self.kind == "sparse":
                out[sequences] += ops.sparse_projection(flat, self.k, seed)
            else:
                out[sequences] += ops.random_projection(flat, self.k, seed, self.kind)
        assert out is not None
        return out
