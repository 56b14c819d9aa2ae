"""RapidIn: the whole gradient shuffled, signed and summed in blocks.

Source: Lin et al. 2024, "Token-wise Influential Training Data Retrieval for Large Language Models", arXiv 2405.11724.

What is done, for a flat gradient of P elements (layers in their order, each row by row, a bias as last column):

1. zeros are appended up to ``D = K·⌈P/K⌉`` elements;
2. ``rounds`` times, the vector is reshaped to ``[d, D/d]`` and its rows permuted, then reshaped to ``[D/d', d']`` and
   its columns permuted; ``d`` and ``d'`` are products of a quarter to a half of D's prime factors, drawn each time;
3. every element gets a random sign;
4. K blocks of ``D/K`` consecutive elements are summed.

This is a count sketch whose buckets all have the same size: ``E⟨Sx, Sy⟩ = ⟨x, y⟩`` over the signs. The permutations
are worked out for every coordinate once, so that a row costs one read of the gradient. Two things differ from the
paper's code: sums are formed in float32 (there: float16), and zeros fill up to a multiple of K (there: of 2²⁴).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf.capture import Layer, LayerSelection
from pyinf.curvature.rotate import rotated_gradients
from pyinf.errors import ConfigError
from pyinf.ops.philox import random_matrix
from pyinf.store.compress.base import Compressor, Context, LayerRows, layer_seed, register
from pyinf.store.sections import layout

__all__ = ["RapidIn", "Shuffle"]

_SIGN_STREAM = 17


def prime_factors(n: int) -> list[int]:
    """Prime factors, ascending."""
    found = []
    divisor = 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            found.append(divisor)
            n //= divisor
        divisor += 1
    return [*found, n] if n > 1 else found


class Shuffle:
    """The permutation of step 2, as where each coordinate goes; and the signs of step 3.

    ``rounds`` rounds are ``2·rounds`` permutations of some of D's divisors' lengths, seldom far above ``√D``.
    """

    def __init__(self, size: int, buckets: int, rounds: int, seed: int) -> None:
        if not 1 <= buckets < 1 << 30:
            raise ConfigError(f"k is {buckets}; it must be from 1 to 2**30 − 1")
        self.size, self.buckets, self.seed = size, buckets, seed
        self.block = -(-size // buckets)
        self.padded = buckets * self.block
        self.steps: list[tuple[int, Tensor]] = []  # (d, where each of the d rows or columns goes), in turns
        factors, generator = prime_factors(self.padded), torch.Generator().manual_seed(seed & (1 << 63) - 1)
        for _ in range(2 * rounds if factors else 0):
            low, high = len(factors) // 4, len(factors) // 2
            count = max(1, int(torch.randint(low, high + 1, (), generator=generator)))
            chosen = torch.randperm(len(factors), generator=generator)[:count].tolist()
            d = 1
            for i in chosen:
                d *= factors[i]
            order = torch.randperm(d, generator=generator)
            goes = torch.empty_like(order)
            goes[order] = torch.arange(d)  # row order[i] comes to stand at i
            self.steps.append((d, goes))

    def positions(self, start: int, stop: int) -> Tensor:
        """Where elements ``start:stop`` stand after the shuffling: int64."""
        at = torch.arange(start, stop)
        for number, (d, goes) in enumerate(self.steps):
            rest = self.padded // d
            if number % 2 == 0:  # rows of [d, D/d]
                row = torch.div(at, rest, rounding_mode="floor")
                at = goes[row] * rest + (at - row * rest)
            else:  # columns of [D/d, d]
                row = torch.div(at, d, rounding_mode="floor")
                at = row * d + goes[at - row * d]
        return at

    def codes(self, start: int, stop: int) -> Tensor:
        """Bucket and sign of elements ``start:stop``: int32, ``2·bucket + (1 where the sign is −)``."""
        signs = random_matrix((0, 1), (start, stop), self.seed, _SIGN_STREAM)[0]
        bucket = torch.div(self.positions(start, stop), self.block, rounding_mode="floor")
        return (2 * bucket + (signs < 0)).to(torch.int32)


@register
@dataclass
class RapidIn(Compressor):
    """Row: the shuffled sketch of the whole gradient, ``[k]``; score ``⟨q, r⟩``, or their cosine.

    Options: ``k`` (65,536 in the paper), ``rounds`` (20), ``similarity`` (``dot``, as in the paper; ``cosine``).
    Four bytes a traced parameter are held for buckets and signs. Cost of a row: one read of the dense gradient, layer
    by layer; nothing of the low rank of a layer's gradient is used.

    Source: Lin et al. 2024, arXiv 2405.11724; see the module for what exactly is done.
    """

    name: ClassVar[str] = "rapidin"
    defaults: ClassVar[Mapping[str, Any]] = {"k": 65536, "rounds": 20, "similarity": "dot"}
    offsets: dict[str, int] = field(default_factory=dict)
    shuffle: Shuffle | None = None
    _codes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def damped(self) -> bool:
        """Whether the scores depend on the damping: there is no curvature."""
        return False

    @property
    def layered(self) -> bool:
        """Whether every layer has sections of its own."""
        return False

    @property
    def normalise(self) -> str:
        """See :class:`Compressor`."""
        return "both" if self.options["similarity"] == "cosine" else "none"

    def prepare(self, context: Context) -> None:
        """Draw the permutations."""
        super().prepare(context)
        self._open(context.selection)

    def _open(self, selection: LayerSelection) -> None:
        total = 0
        for layer in selection.layers:
            self.offsets[layer.name] = total
            total += layer.numel
        self.shuffle = Shuffle(total, self.options["k"], self.options["rounds"], layer_seed(self.seed, "", "shuffle"))
        self.sections = layout([("", "vector", (self.options["k"],))])

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """The same for training examples and queries."""
        return LayerRows(self.sections, self._layer_rows)

    def _layer_rows(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        codes = self._codes.get(layer.name)
        if codes is None:
            assert self.shuffle is not None
            first = self.offsets[layer.name]
            codes = self._codes[layer.name] = self.shuffle.codes(first, first + layer.numel).to(g.device)
        bucket = torch.div(codes, 2, rounding_mode="floor")
        signs = 1 - 2 * (codes & 1)
        rows = []
        for G in rotated_gradients(g, a, offsets, None, None, layer.bias):
            signed = G.reshape(-1) * signs
            row = signed.new_zeros(self.options["k"])
            if row.is_cuda:  # index_put_ sorts there, so the order of the additions is fixed; index_add_ does not
                row.index_put_((bucket.long(),), signed, accumulate=True)
            else:
                row.index_add_(0, bucket, signed)
            rows.append(row)
        return torch.stack(rows) if rows else g.new_zeros(0, self.options["k"])

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """The rows; of length one for a cosine."""
        if self.normalise == "none":
            return rows
        norms = rows.norm(dim=1, keepdim=True)
        return rows / torch.where(norms > 0, norms, torch.ones_like(norms))

    def row_norms(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``‖r‖``."""
        return rows.norm(dim=1)

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection) -> RapidIn:
        """Everything is drawn again from the seed."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, RapidIn)
        out._open(selection)
        if out.shuffle is not None and settings.get("elements", out.shuffle.size) != out.shuffle.size:
            raise ConfigError("the rows were made from layers of other sizes; use the model of the build")
        return out

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        return {**super().settings(), "elements": 0 if self.shuffle is None else self.shuffle.size}

    def to(self, device: torch.device) -> RapidIn:
        """Move its tensors."""
        self._codes = {name: codes.to(device) for name, codes in self._codes.items()}
        super().to(device)
        return self
