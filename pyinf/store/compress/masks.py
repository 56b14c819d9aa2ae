"""Coordinate masks: random subsets, and masks learned so that masked inner products keep the scores (GraSS).

The selective mask of Hu et al. 2025 (arXiv 2505.18976, section 3) is the solution of

    max_S  mean_q corr_i(⟨g_q, g_i⟩, ⟨σ(S) ⊙ g_q, σ(S) ⊙ g_i⟩) − penalty · ‖σ(S)‖₁ / p,

σ the logistic function; of S the coordinates with the largest values are kept. For a linear layer there are two
vectors, ``σ(S_g)`` on the output gradients and ``σ(S_a)`` on the inputs, whose outer product masks the layer's
gradient. Found by Adam from ``S ≈ 0``. The paper's penalty is on the sum; divided by the number p of coordinates one
value serves every width. Queries are not known when masks are made: a quarter of the sampled training gradients stands
in for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.capture import Consumer, Layer
from pyinf.curvature.rotate import rotated_gradients
from pyinf.errors import ConfigError

__all__ = ["GradientSample", "draw_subset", "learn_factor_masks", "learn_mask", "mask_correlation"]

_START = 1e-2
_RATE = 0.05


def draw_subset(total: int, count: int, seed: int) -> Tensor:
    """A uniform subset of ``count`` of ``range(total)``, ascending, int64; all of it where ``count ≥ total``.

    Memory in the order of ``count`` when that is small beside ``total``.
    """
    if count >= total:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)
    if 4 * count >= total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    found = torch.zeros(0, dtype=torch.int64)
    while found.numel() < count:
        more = torch.randint(total, (2 * count - found.numel(),), generator=generator)
        found = torch.unique(torch.cat([found, more]))
    # any count of them are uniform, since their draws were exchangeable; the first ones would not be
    return found[torch.randperm(found.numel(), generator=generator)[:count]].sort().values


class GradientSample(Consumer):
    """Consumer that keeps whole per-sequence gradients of some layers: layer → list of ``[d_out, d_in(+1)]``."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.gradients: dict[str, list[Tensor]] = {}

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if layer.name in self.wanted:
            kept = self.gradients.setdefault(layer.name, [])
            kept += [G.clone() for G in rotated_gradients(g, a, offsets, None, None, layer.bias)]

    def stacked(self, name: str) -> Tensor | None:
        """``[n, d_out, d_in(+1)]``, or None where the loss does not reach the layer."""
        return torch.stack(self.gradients[name]) if name in self.gradients else None


def mask_correlation(exact: Tensor, masked: Tensor) -> Tensor:
    """Mean over queries of the correlation over training examples of ``[q, n]`` scores; constant rows are left out."""
    x = exact - exact.mean(1, keepdim=True)
    y = masked - masked.mean(1, keepdim=True)
    xx, yy = x.square().sum(1), y.square().sum(1)
    valid = (xx > 0) & (yy > 0)
    safe = torch.where(valid, xx * yy, torch.ones_like(xx)).sqrt()
    return (torch.where(valid, (x * y).sum(1) / safe, torch.zeros_like(xx)).sum()) / valid.sum().clamp(min=1)


def _split(G: Tensor) -> tuple[Tensor, Tensor]:
    """A quarter of the gradients as queries, the rest as training gradients, scaled to unit mean square norm."""
    if G.shape[0] < 8:
        raise ConfigError(f"a selective mask is learned from at least 8 training examples, not {G.shape[0]}")
    scale = G.square().sum(tuple(range(1, G.dim()))).mean().sqrt()
    G = G / scale.clamp(min=torch.finfo(G.dtype).tiny)
    queries = G.shape[0] // 4
    return G[:queries], G[queries:]


def _top(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest, ascending; equal ones: the lower index first."""
    return values.argsort(descending=True, stable=True)[:count].sort().values.cpu()


def _start(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return (_START * torch.randn(size, generator=generator, dtype=torch.float64)).to(like).requires_grad_(True)


def learn_mask(G: Tensor, keep: int, steps: int, penalty: float, seed: int) -> Tensor:
    """The selective mask of flat gradients ``G [n, p]``: ``keep`` coordinates, ascending.

    Raises:
        ConfigError: fewer than 8 gradients.
    """
    queries, train = _split(G)
    exact = queries @ train.T
    S = _start(G.shape[1], G, torch.Generator().manual_seed(seed & (1 << 63) - 1))
    optimiser = torch.optim.Adam([S], lr=_RATE)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            mask = torch.sigmoid(S)
            loss = penalty * mask.mean() - mask_correlation(exact, (queries * mask.square()) @ train.T)
            loss.backward()
            optimiser.step()
    return _top(S.detach(), keep)


def learn_factor_masks(
    G: Tensor, keep: tuple[int, int], steps: int, penalty: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The selective masks of one layer's gradients ``G [n, d_out, d_in(+1)]``: rows and columns kept, ascending.

    Raises:
        ConfigError: fewer than 8 gradients.
    """
    queries, train = _split(G)
    exact, flat = queries.flatten(1) @ train.flatten(1).T, train.flatten(1).T
    generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)
    S_g, S_a = _start(G.shape[1], G, generator), _start(G.shape[2], G, generator)
    optimiser = torch.optim.Adam([S_g, S_a], lr=_RATE)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            rows, columns = torch.sigmoid(S_g), torch.sigmoid(S_a)
            weighted = queries * rows.square()[:, None] * columns.square()
            loss = penalty * (rows.mean() + columns.mean()) - mask_correlation(exact, weighted.flatten(1) @ flat)
            loss.backward()
            optimiser.step()
    return _top(S_g.detach(), keep[0]), _top(S_a.detach(), keep[1])
