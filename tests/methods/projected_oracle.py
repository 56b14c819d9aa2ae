"""A tiny model with its explicit gradients, projection matrices written out, and dense scores of projected methods."""

from __future__ import annotations

from typing import Any

import core_oracle as oracle
import torch
from torch import Tensor

import pyinf
from pyinf.ops.philox import random_matrix, sparse_coordinates
from pyinf.store.compress import layer_seed
from pyinf.store.compress.flat import row_blocks

LAYERS = {"gpt2": ["*.0.attn.c_proj", "*.1.attn.c_attn"], "llama": ["*.0.*k_proj", "*.0.*v_proj", "*.1.*up_proj"]}
STREAM_G, STREAM_A = 1, 2


class Case:
    """Training sequences and two queries of ragged lengths, float64; gpt2's layers have a bias, llama's none."""

    def __init__(self, name: str = "gpt2", train: int = 7) -> None:
        self.model, self.modules = oracle.make(name), LAYERS[name]
        self.train, self.queries = oracle.data(train, 1), oracle.data(2, 2)
        self.selection = pyinf.Attributor(self.model, "grad_dot", modules=self.modules).selection
        self.layers, self.names = self.selection.layers, self.selection.names
        self.G, self.V = self.gradients(self.train), self.gradients(self.queries)

    def gradients(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``{layer: [n, d_out, d_in(+1)]}``."""
        found = oracle.gradients(self.model, examples, self.names)
        return {n: torch.stack([G[n] for G in found]) for n in self.names}

    def attributor(self, method: str, **options: Any) -> pyinf.Attributor:
        options = {"fisher": "empirical", "eigensolver": "fp64", **options}
        return pyinf.Attributor(self.model, method, modules=self.modules, **options)

    def scores(self, method: str, batch_size: int | None = None, **options: Any) -> Tensor:
        return self.attributor(method, **options).run(self.train, self.queries, batch_size).values

    def tokens(self) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        """Inputs (with their ones) and output gradients of every training sequence."""
        return oracle.tokens_seen(self.model, self.train, self.names)


def flat(G: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g.flatten(1) for n, g in G.items()}


def two_sided(layers: Any, k: int, seed: int = 0) -> dict[str, Tensor]:
    """``P_g ⊗ P_a`` of every layer, ``[d_out·d_in(+1), k_g·k_a]``; a side no wider than k is left whole."""
    out = {}
    for layer in layers:
        own = layer_seed(seed, layer.name)
        P_g, P_a = (
            torch.eye(d).double()
            if k >= d
            else random_matrix((0, d), (0, k), own, stream, "rademacher", dtype=torch.float64) / k**0.5
            for d, stream in ((layer.d_out, STREAM_G), (layer.columns, STREAM_A))
        )
        out[layer.name] = torch.kron(P_g, P_a)
    return out


def dense_matrix(layer: Any, k: int, seed: int, kind: str) -> Tensor:
    """The flat projection of one layer, ``[d_out·d_in(+1), k]``."""
    if kind == "sparse":
        size = layer.numel
        bucket, sign = sparse_coordinates((0, size), k, 1, layer_seed(seed, layer.name, "sparse"))
        out = torch.zeros(size, k, dtype=torch.float64)
        out[torch.arange(size), bucket[:, 0]] = sign[:, 0].double()
        return out
    parts = []
    for number, rows in enumerate(row_blocks(layer)):
        size = (rows.stop - rows.start) * layer.columns
        own = layer_seed(seed, layer.name, f"block {number}")
        parts.append(random_matrix((0, size), (0, k), own, 0, kind, dtype=torch.float64) / k**0.5)
    return torch.cat(parts)


def solve(R: Tensor, Q: Tensor, damping: float, mode: str = "relative") -> Tensor:
    """``Q (RᵀR/n + λ)⁻¹``."""
    K = R.T @ R / len(R)
    lam = damping * K.diagonal().mean() if mode == "relative" else damping
    return Q @ torch.linalg.inv(K + lam * torch.eye(len(K)).double())


def hadamard_matrix(n: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / n**0.5
