"""The k best of a stream of scores, equal scores in the order of the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.errors import NonFiniteError

__all__ = ["TopK"]

_REFINE = 4  # candidates, as a multiple of what is kept, above which a block is cut before it is merged


class TopK:
    """Keeps values and rows ``[Q, ≤ k]``, best first; of equal scores the lower row first.

    Blocks must come in the order of their rows.
    """

    def __init__(self, queries: int, k: int, device: torch.device | None = None) -> None:
        self.k = k
        self.values = torch.empty(queries, 0, device=device)
        self.rows = torch.empty(queries, 0, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, first: int) -> None:
        """Scores ``[Q, b]`` of rows ``first`` to ``first + b``."""
        count, size = scores.shape
        if not (count and size and self.k):
            return
        full = self.values.shape[1] == self.k
        if full:  # a later row must be better, not as good
            candidates = scores > self.values[:, -1:]
        if not full or int(candidates.sum()) > _REFINE * count * self.k:
            threshold = scores.topk(min(self.k, size), dim=1).values[:, -1:]
            candidates = scores >= threshold if not full else candidates & (scores >= threshold)
        query, column = candidates.nonzero(as_tuple=True)
        held = self.values.shape[1]
        owner = torch.arange(count, device=scores.device).repeat_interleave(held)
        self._merge(
            torch.cat([owner, query]),
            torch.cat([self.values.flatten(), scores[candidates].float()]),
            torch.cat([self.rows.flatten(), column + first]),
            min(self.k, held + size),
        )

    def _merge(self, query: Tensor, values: Tensor, rows: Tensor, keep: int) -> None:
        # Two stable sorts, the lesser key first: by value, then by query. Rows rise within a query at the start.
        order = values.sort(descending=True, stable=True).indices
        order = order[query[order].sort(stable=True).indices]
        sizes = torch.bincount(query, minlength=self.values.shape[0])
        if bool((sizes < keep).any()):
            raise NonFiniteError("scores are NaN: queries and rows are too large for float32")
        starts = sizes.cumsum(0) - sizes
        picked = order[starts[:, None] + torch.arange(keep, device=starts.device)]
        self.values, self.rows = values[picked], rows[picked]

    def add_hits(self, values: Tensor, rows: Tensor) -> None:
        """The best ``[Q, ≤ k]`` of the next block as :func:`pyinf.ops.scan_topk` finds them, numbered in the store."""
        both = torch.cat([self.values, values.float()], 1)
        all_rows = torch.cat([self.rows, rows], 1)
        ordered, index = both.sort(dim=1, descending=True, stable=True)
        self.values = ordered[:, : self.k].contiguous()
        self.rows = all_rows.gather(1, index[:, : self.k])
