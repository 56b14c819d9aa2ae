"""Tiny models and dense curvature matrices from explicit Jacobians, written without the library's products."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 13


def data(n: int, seed: int = 0, low: int = 3, high: int = 9, vocab: int = VOCAB) -> list[dict[str, Any]]:
    """``n`` random sequences of ragged lengths."""
    rng = random.Random(seed)
    return [{"input_ids": [rng.randrange(1, vocab) for _ in range(rng.randrange(low, high))]} for _ in range(n)]


def gpt2(layers: int = 1, width: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A GPT-2 with larger weights than at initialisation, so that nothing is nearly linear."""
    torch.manual_seed(seed)
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = tf.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() >= 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The traced layers' parameters by their full name."""
    modules = dict(model.named_modules())
    return {f"{n}.{k}": p.detach() for n in names for k, p in modules[n].named_parameters(recurse=False)}


def flatten(model: nn.Module, names: Sequence[str], grads: dict[str, Tensor]) -> Tensor:
    """``[R, …]`` by parameter → ``[R, D]`` in the order ``[d_out, d_in(+1)]`` of each layer."""
    modules = dict(model.named_modules())
    parts = []
    for name in names:
        weight = grads[f"{name}.weight"]
        if type(modules[name]).__name__ == "Conv1D":
            weight = weight.transpose(1, 2)
        if getattr(modules[name], "bias", None) is not None:
            weight = torch.cat([weight, grads[f"{name}.bias"].unsqueeze(2)], dim=2)
        parts.append(weight.flatten(1))
    return torch.cat(parts, dim=1)


def jacobian(model: nn.Module, names: Sequence[str], example: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``(J [T, V, D], logits [T, V])`` of the positions that predict a counted label."""
    ids = torch.as_tensor(example["input_ids"])[None]
    labels = torch.as_tensor(example["labels"]) if example.get("labels") is not None else ids[0]
    counted = labels[1:] != -100

    def logits(w: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, w, (), {"input_ids": ids}).logits[0, :-1][counted]

    w = weights(model, names)
    z = logits(w)
    J = torch.func.jacrev(logits)(w)
    flat = {k: v.reshape(z.numel(), *v.shape[2:]) for k, v in J.items()}
    return flatten(model, names, flat).reshape(*z.shape, -1), z.detach()


def ggn(model: nn.Module, names: Sequence[str], examples: Sequence[dict[str, Any]]) -> Tensor:
    """Dense ``mean_i Σ_t Jᵀ(diag(p) − ppᵀ)J`` ``[D, D]``."""
    total = None
    for example in examples:
        J, z = jacobian(model, names, example)
        p = z.softmax(-1)
        H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        part = J.reshape(-1, J.shape[-1]).T @ (H @ J).reshape(-1, J.shape[-1])
        total = part if total is None else total + part
    return total / len(examples)


def gradients(model: nn.Module, names: Sequence[str], examples: Sequence[dict[str, Any]]) -> Tensor:
    """``[N, D]``: gradients of each sequence's summed loss, from its Jacobian."""
    rows = []
    for example in examples:
        J, z = jacobian(model, names, example)
        labels = torch.as_tensor(example.get("labels", example["input_ids"]))[1:]
        g = z.softmax(-1) - nn.functional.one_hot(labels[labels != -100], z.shape[-1]).to(z.dtype)
        rows.append(torch.einsum("tv,tvd->d", g, J))
    return torch.stack(rows)


def error(found: Tensor, wanted: Tensor) -> float:
    """``‖found − wanted‖ / ‖wanted‖``."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300))


def spd(size: int, condition: float = 1e4, seed: int = 0) -> Tensor:
    """A random symmetric positive definite matrix with eigenvalues spread evenly in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    return (Q * values) @ Q.T
