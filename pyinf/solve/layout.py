"""All traced weights of a block of queries as one matrix ``[Q, D]``, with a view for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyinf.capture import Layer
from pyinf.errors import ConfigError

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Where each layer's ``[d_out, d_in(+1)]`` stands in a row of ``D`` numbers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Layout:
        """The layout of some traced layers, in their order."""
        return cls(tuple(layer.name for layer in layers), tuple((layer.d_out, layer.columns) for layer in layers))

    @property
    def size(self) -> int:
        """``D``."""
        return sum(o * i for o, i in self.shapes)

    def pack(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """``{layer: [Q, d_out, d_in(+1)]}`` → ``[Q, D]``.

        Raises:
            ConfigError: a layer is missing or has another shape.
        """
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in vectors or tuple(vectors[name].shape[1:]) != shape:
                found = tuple(vectors[name].shape) if name in vectors else "absent"
                raise ConfigError(f"'{name}' takes [Q, {shape[0]}, {shape[1]}], got {found}")
        return torch.cat([vectors[name].reshape(vectors[name].shape[0], -1) for name in self.names], dim=1)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """``[Q, D]`` → ``{layer: [Q, d_out, d_in(+1)]}``, views."""
        parts = flat.split([o * i for o, i in self.shapes], dim=1)
        return {n: p.unflatten(1, s) for n, s, p in zip(self.names, self.shapes, parts, strict=True)}

    def spread(self, values: Mapping[str, float], like: Tensor) -> Tensor:
        """One number a layer (a damping) → ``[D]``."""
        out = like.new_empty(self.size)
        start = 0
        for name, (o, i) in zip(self.names, self.shapes, strict=True):
            out[start : start + o * i] = values[name]
            start += o * i
        return out
