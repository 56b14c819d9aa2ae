"""A tiny model, its explicit per-sequence gradients by plain autograd, and consumers fed without a model."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 23


def tiny(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A GPT-2 of one block of width 8, weights large enough that nothing is nearly linear."""
    torch.manual_seed(seed)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def examples(n: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"input_ids": [rng.randrange(1, VOCAB) for _ in range(rng.randrange(3, 12))]} for _ in range(n)]


def gradients(model: nn.Module, data: list[dict[str, Any]], names: list[str]) -> dict[str, Tensor]:
    """Layer → ``[n, d_out, d_in + 1]``: gradients of the summed next-token losses, written without the library."""
    modules = dict(model.named_modules())
    out: dict[str, list[Tensor]] = {name: [] for name in names}
    for example in data:
        model.zero_grad()
        ids = torch.as_tensor(example["input_ids"])[None]
        logits = model(input_ids=ids).logits
        nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        for name in names:
            module = modules[name]
            out[name].append(torch.cat([module.weight.grad.T, module.bias.grad[:, None]], 1).clone())
    model.zero_grad()
    return {name: torch.stack(parts) for name, parts in out.items()}


def error(found: Tensor, wanted: Tensor) -> float:
    """``‖found − wanted‖ / ‖wanted‖``."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def tokens(lengths: list[int], d_out: int, d_in: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``g``, ``a`` and ``offsets`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    g = torch.randn(n, d_out, generator=generator, dtype=torch.float64)
    a = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    return g, a, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def dense(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """``Σ_t g_t a_tᵀ`` of every sequence."""
    marks = offsets.tolist()
    return torch.stack([g[i:j].T @ a[i:j] for i, j in pairwise(marks)])
