"""Second moments behind the curvatures beside K-FAC: TKFAC's trace-weighted covariances and Shampoo's left and right
second moments of per-sequence gradients. Streamed; never a ``[B, d_out, d_in]`` tensor.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer
from pyinf.curvature.rotate import input_rows, working

__all__ = ["Moments", "ShampooMoments", "TraceMoments", "gram_is_cheaper"]


class Moments(Consumer):
    """Consumer that keeps two second moments a layer, ``A`` on the input side and ``S`` on the output side.

    Both are sums whose lower triangles count. Unlike K-FAC's, ``A`` depends on the layer's own gradients, so that each
    layer has one even where several read the same input. ``rows`` counts positions, as the K-FAC fit does.
    """

    def __init__(self) -> None:
        self.A: dict[str, Tensor] = {}
        self.S: dict[str, Tensor] = {}
        self.rows: Counter[str] = Counter()

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        a, g = input_rows(a, layer.bias), working(g)
        if layer.name not in self.A:
            self.A[layer.name] = a.new_zeros(a.shape[1], a.shape[1])
            self.S[layer.name] = g.new_zeros(g.shape[1], g.shape[1])
        self.accumulate(self.A[layer.name], self.S[layer.name], a, g, offsets)
        self.rows[f"A:{layer.name}"] += a.shape[0]
        self.rows[f"S:{layer.name}"] += g.shape[0]

    def accumulate(self, A: Tensor, S: Tensor, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Add one batch: ``a`` ``[N, d_in(+1)]``, ``g`` ``[N, d_out]``, sequences by ``offsets`` ``[B+1]``."""
        raise NotImplementedError

    def divisor(self, name: str, sequences: int) -> int:
        """What turns the sums of layer ``name`` into the means that the factors hold."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"A:{k}": v for k, v in self.A.items()} | {f"S:{k}": v for k, v in self.S.items()}

    def restore(self, tensors: dict[str, Tensor], rows: dict[str, int], device: torch.device) -> None:
        """From a checkpoint."""
        for key, value in tensors.items():
            side, _, name = key.partition(":")
            {"A": self.A, "S": self.S}[side][name] = value.to(device)
        self.rows = Counter(rows)


class TraceMoments(Moments):
    """TKFAC: ``A = E[|g|² a aᵀ]``, ``S = E[|a|² g gᵀ]``, means over counted positions; ``tr A = tr S = E[|a|²|g|²]``.

    Source: Gao et al. 2021, arXiv 2011.10741.
    """

    def accumulate(self, A: Tensor, S: Tensor, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Add one batch; cost ``N(d_in² + d_out²)``."""
        ops.accumulate_covariance(A, a * torch.linalg.vector_norm(g, dim=1, keepdim=True))
        ops.accumulate_covariance(S, g * torch.linalg.vector_norm(a, dim=1, keepdim=True))

    def divisor(self, name: str, sequences: int) -> int:
        """Counted positions."""
        return max(1, self.rows[f"S:{name}"])


def gram_is_cheaper(tokens: float, d_out: int, d_in: int) -> bool:
    """Whether ``GᵀG`` and ``GGᵀ`` of one sequence cost less through its tokens' Gram matrices than through ``G``.

    Through the Gram matrices: ``4T²(d_in + d_out) + 2T(d_in² + d_out²)`` operations. Through ``G``: ``2T·d_in·d_out``
    to form it and ``d_in·d_out(d_in + d_out)`` for one triangle of each product.
    """
    gram = 4 * tokens * tokens * (d_in + d_out) + 2 * tokens * (d_in * d_in + d_out * d_out)
    return gram < 2 * tokens * d_in * d_out + d_in * d_out * (d_in + d_out)


class ShampooMoments(Moments):
    """Shampoo: ``A = E[GᵀG]`` and ``S = E[GGᵀ]``, means over sequences of ``G = Σ_t g_t a_tᵀ``; ``tr A = tr S``.

    ``GᵀG = aᵀ(g gᵀ)a`` and ``GGᵀ = gᵀ(a aᵀ)g``, so a short sequence never forms ``G``; a long one forms one ``G`` at
    a time. Source: Gupta et al. 2018, arXiv 1802.09568.
    """

    def accumulate(self, A: Tensor, S: Tensor, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Add one batch, by the cheaper of the two routes."""
        bounds = offsets.tolist()
        mean = a.shape[0] / max(1, len(bounds) - 1)
        if gram_is_cheaper(mean, g.shape[1], a.shape[1]):
            left, right = torch.empty_like(g), torch.empty_like(a)
            for start, stop in pairwise(bounds):
                own_a, own_g = a[start:stop], g[start:stop]
                torch.mm(own_a @ own_a.T, own_g, out=left[start:stop])
                torch.mm(own_g @ own_g.T, own_a, out=right[start:stop])
            A.addmm_(a.T, right)
            S.addmm_(g.T, left)
            return
        G = g.new_empty(g.shape[1], a.shape[1])
        for start, stop in pairwise(bounds):
            if stop > start:
                torch.mm(g[start:stop].T, a[start:stop], out=G)
                ops.accumulate_covariance(A, G)
                ops.accumulate_covariance(S, G.T)

    def divisor(self, name: str, sequences: int) -> int:
        """Sequences."""
        return max(1, sequences)
