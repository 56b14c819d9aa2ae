"""Squared norms of per-sequence gradients under one positive weight a parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer
from pyinf.curvature.rotate import input_rows, rotated_gradients, working

__all__ = ["WeightedNorms"]


class WeightedNorms(Consumer):
    """Consumer: ``Σ_layers Σ_ij w_ij (G_b)²_ij`` of every sequence, float64 ``[B]``; without weights ``‖G_b‖²``."""

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        self.weights = weights
        self.scores: Tensor | None = None

    def start_batch(self) -> WeightedNorms:
        """Forget the last batch."""
        self.scores = None
        return self

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if self.weights is None:
            values = ops.gradient_norm(working(g), input_rows(a, layer.bias), offsets).double().square()
        else:
            weight = self.weights[layer.name]
            gradients = rotated_gradients(g, a, offsets, None, None, layer.bias)
            values = torch.stack([(G.square() * weight).sum() for G in gradients]).double()
        self.scores = values if self.scores is None else self.scores + values
