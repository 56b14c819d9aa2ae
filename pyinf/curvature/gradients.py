"""A set of per-sequence gradients in the layers' eigenbases, held as their factors and formed a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyinf.capture import Consumer, Layer
from pyinf.curvature.factors import Factors
from pyinf.curvature.rotate import rotate_input, rotate_output

__all__ = ["GradientSet", "LayerGradients", "transposed", "turned"]

_WORKSPACE = 1 << 22  # elements of formed gradients at a time: 16 MiB in float32


@dataclass
class LayerGradients:
    """One layer's gradients ``G̃_i = Σ_t g̃_t ã_tᵀ`` of ``n`` sequences: ``g [N, d_out]``, ``a [N, d_in(+1)]``."""

    g: Tensor
    a: Tensor
    bounds: list[int]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def rows(self, rows: slice) -> Tensor:
        """Rows ``rows`` of every gradient: ``[n, r, d_in(+1)]``."""
        g, count = self.g[:, rows], len(self)
        length = self.bounds[-1] // max(1, count)
        if self.bounds == list(range(0, length * count + 1, max(1, length))) and length:
            return torch.bmm(g.reshape(count, length, -1).transpose(1, 2), self.a.reshape(count, length, -1))
        out = g.new_empty(count, g.shape[1], self.a.shape[1])
        for i in range(count):
            part = slice(self.bounds[i], self.bounds[i + 1])
            torch.mm(g[part].T, self.a[part], out=out[i])
        return out

    def blocks(self, others: int = 0) -> Iterator[slice]:
        """Rows at a time such that the formed gradients, and ``others`` more of their size, fit the workspace."""
        per_row = max(1, (len(self) + others) * self.a.shape[1])
        step = max(1, _WORKSPACE // per_row)
        for start in range(0, self.g.shape[1], step):
            yield slice(start, min(start + step, self.g.shape[1]))


def turned(V: Tensor, U_S: Tensor | None, U_A: Tensor | None) -> Tensor:
    """``U_Sᵀ V U_A`` (None: the identity); V ``[Q, d_out, d_in(+1)]`` or ``[d_out, d_in(+1)]``."""
    V = V if U_A is None else V @ U_A
    return V if U_S is None else U_S.T @ V


def transposed(*bases: Tensor | None) -> tuple[Tensor | None, ...]:
    """The way back: every basis transposed."""
    return tuple(None if basis is None else basis.T for basis in bases)


class _Collector(Consumer):
    """Keeps the rotated factors of the layers in ``wanted``; an input that several of them read is rotated once."""

    def __init__(self, factors: Factors, wanted: set[str]) -> None:
        self.factors, self.wanted = factors, wanted
        self.inputs: dict[str, list[Tensor]] = {}
        self.grads: dict[str, list[Tensor]] = {}
        self.bounds: dict[str, list[int]] = {}
        self._seen: set[str] = set()

    def start_batch(self) -> _Collector:
        self._seen.clear()
        return self

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if layer.name not in self.wanted:
            return
        factor = self.factors.layers[layer.name]
        if factor.group not in self._seen:
            self._seen.add(factor.group)
            basis = self.factors.inputs[factor.group].basis
            self.inputs.setdefault(factor.group, []).append(rotate_input(a, basis, layer.bias))
        self.grads.setdefault(layer.name, []).append(rotate_output(g, factor.basis))
        bounds = self.bounds.setdefault(layer.name, [0])
        bounds.extend((offsets[1:] + bounds[-1]).tolist())


class GradientSet:
    """The gradients of some sequences, layer by layer.

    They are held as factors, ``4N(d_in + d_out)`` bytes a layer in float32, if all of them fit ``budget`` bytes;
    otherwise every walk runs the model again for as many layers as fit.

    Args:
        run: makes one pass over the sequences; it is given a function that names the consumer of each batch.
        factors: whose eigenbases the gradients are put into.
        tokens: counted positions of all sequences.
        budget: bytes that the held factors may take.
        batches: which sequences, in the order of the gradients.
    """

    def __init__(
        self,
        run: Callable[[Callable[[], Consumer]], None],
        factors: Factors,
        tokens: int,
        budget: int,
        batches: list[list[int]] | None = None,
    ) -> None:
        self.run, self.factors, self.batches = run, factors, batches or []
        self.groups = self._layer_groups(tokens, budget)
        self._held: dict[str, LayerGradients] | None = None

    def _layer_groups(self, tokens: int, budget: int) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        used = 0
        for name, layer in self.factors.layers.items():
            d_out, columns = layer.corrected.shape
            size = tokens * (d_out + columns) * layer.corrected.element_size()
            if groups[-1] and used + size > budget:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
        return groups

    def walk(self) -> Iterator[tuple[str, LayerGradients]]:
        """Every layer that the loss reaches, once, in the factors' order."""
        if self._held is not None:
            yield from self._held.items()
            return
        for names in self.groups:
            found = self._collect(names)
            if len(self.groups) == 1:
                self._held = found
            yield from found.items()

    def _collect(self, names: list[str]) -> dict[str, LayerGradients]:
        collector = _Collector(self.factors, set(names))
        self.run(collector.start_batch)
        inputs = {group: torch.cat(parts) for group, parts in collector.inputs.items()}
        return {
            name: LayerGradients(
                torch.cat(collector.grads[name]), inputs[self.factors.layers[name].group], collector.bounds[name]
            )
            for name in names
            if name in collector.grads
        }
