"""First and second moments of single sequences' gradients, in the place of an optimiser's where none is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer
from pyinf.curvature.rotate import input_rows, working
from pyinf.data.checkpoints import TensorSource, layer_matrices, load_named_tensors
from pyinf.errors import ConfigError
from pyinf.store.compress.base import Context

__all__ = ["estimated_moments", "given_moments", "per_checkpoint"]


def per_checkpoint(name: str, values: Sequence | None, wanted: int, default: object = None) -> list:
    """One value for every checkpoint.

    Raises:
        ConfigError: neither one value nor one for each.
    """
    if values is None:
        return [default] * wanted
    if len(values) not in (1, wanted):
        raise ConfigError(f"{name} has {len(values)} entries for {wanted} checkpoints; give one, or one for each")
    return list(values) if len(values) == wanted else list(values) * wanted


def given_moments(context: Context, source: TensorSource, what: str) -> dict[str, Tensor]:
    """An optimiser's moments of the traced layers, ``{layer: [d_out, d_in(+1)]}``."""
    tensors = load_named_tensors(source, f"{what}s")
    if what == "second moment":
        return layer_matrices(context.model, context.selection.layers, tensors)
    # layer_matrices refuses values below zero, which a first moment may have: both signs are passed apart.
    above = layer_matrices(
        context.model, context.selection.layers, {n: t.clamp(min=0) for n, t in tensors.items()}, what
    )
    below = layer_matrices(
        context.model, context.selection.layers, {n: (-t).clamp(min=0) for n, t in tensors.items()}, what
    )
    return {name: above[name] - below[name] for name in above}


class _Sums(Consumer):
    """``Σ_i w_i G_i`` and ``Σ_i (w_i G_i)²`` elementwise; ``w_i`` is one, or one over the sequence's labels."""

    def __init__(self, labels: Sequence[int] | None, first: bool) -> None:
        self.labels, self.want_first = labels, first
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self._indices: Sequence[int] = ()

    def for_batch(self, indices: Sequence[int]) -> _Sums:
        self._indices = indices
        return self

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        a, g = input_rows(a, layer.bias), working(g)
        if self.labels is not None:
            weights = g.new_tensor([1 / max(1, self.labels[i]) for i in self._indices])
            g = g * torch.repeat_interleave(weights, (offsets[1:] - offsets[:-1]).to(g.device)).unsqueeze(1)
        if layer.name not in self.second:
            self.second[layer.name] = g.new_zeros(layer.d_out, layer.columns)
            if self.want_first:
                self.first[layer.name] = g.new_zeros(layer.d_out, layer.columns)
        ops.accumulate_squared_gradients(self.second[layer.name], g, a, offsets)
        if self.want_first:
            self.first[layer.name].addmm_(g.T, a)


def estimated_moments(
    context: Context, per_label: bool, first: bool = True, checkpoint: int = 0
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """``(mean_i w_iG_i, mean_i (w_iG_i)²)`` over the training set; ``w_i`` = one over its labels with ``per_label``.

    What an optimiser keeps are moving averages of batch means, whose squares are smaller by about the batch size.
    """
    sums = _Sums(context.data.label_counts if per_label else None, first)
    context.run(sums.for_batch, "train", "moments of the gradients", checkpoint=checkpoint)
    count = max(1, len(context.data))
    return {n: t / count for n, t in sums.first.items()}, {n: t / count for n, t in sums.second.items()}
