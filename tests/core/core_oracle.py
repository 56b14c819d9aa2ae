"""Tiny models, tiny data, and dense linear algebra on explicit per-sequence gradients to hold the core to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 41


def data(n: int, seed: int = 0, low: int = 3, high: int = 14, vocab: int = VOCAB) -> list[dict[str, Any]]:
    """``n`` random sequences of ragged lengths."""
    rng = random.Random(seed)
    return [{"input_ids": [rng.randrange(1, vocab) for _ in range(rng.randrange(low, high))]} for _ in range(n)]


def classified(n: int, seed: int = 0, classes: int = 3) -> list[dict[str, Any]]:
    """Random sequences with one label each."""
    rng = random.Random(seed + 1000)
    return [{**example, "labels": rng.randrange(classes)} for example in data(n, seed)]


_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32))


def _neox() -> nn.Module:
    config = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**config))


def _bert() -> nn.Module:
    config = {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
    return tf.BertForSequenceClassification(tf.BertConfig(**config, num_labels=3))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SMALL, head_dim=4)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_SMALL, sliding_window=8)),
    "gpt_neox": _neox,
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_SMALL, head_dim=4)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_SMALL, head_dim=4, final_logit_softcapping=5.0, attn_logit_softcapping=5.0)
    ),
    "bert": _bert,
}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 4.0) -> nn.Module:
    """A tiny model; its weights are made larger than at initialisation so that nothing is nearly linear or zero."""
    torch.manual_seed(seed)
    model = ZOO[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def weight_gradient(module: nn.Module) -> Tensor:
    """``[d_out, d_in(+1)]`` from ``.grad``, the bias as last column."""
    weight = module.weight.grad
    if weight is None:
        weight = torch.zeros_like(module.weight)
    if type(module).__name__ == "Conv1D":
        weight = weight.T
    bias = getattr(module, "bias", None)
    if bias is not None:
        column = torch.zeros_like(bias) if bias.grad is None else bias.grad
        weight = torch.cat([weight, column[:, None]], dim=1)
    return weight.clone()


def causal_loss(model: nn.Module, example: dict[str, Any]) -> Tensor:
    """Summed next-token loss of one sequence, written without the library."""
    ids = torch.as_tensor(example["input_ids"])[None]
    labels = torch.as_tensor(example["labels"])[None] if example.get("labels") is not None else ids
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")


def class_loss(model: nn.Module, example: dict[str, Any]) -> Tensor:
    """Loss of one classified sequence."""
    logits = model(input_ids=torch.as_tensor(example["input_ids"])[None]).logits
    return nn.functional.cross_entropy(logits, torch.tensor([int(example["labels"])]), reduction="sum")


def gradients(
    model: nn.Module, examples: Sequence[dict[str, Any]], names: Sequence[str], loss: Callable = causal_loss
) -> list[dict[str, Tensor]]:
    """Explicit per-sequence gradients by plain autograd."""
    modules = dict(model.named_modules())
    out = []
    for example in examples:
        model.zero_grad()
        value = loss(model, example)
        if value.requires_grad and float(value.detach()) != 0.0:
            value.backward()
        out.append({n: weight_gradient(modules[n]) for n in names})
    model.zero_grad()
    return out


def tokens_seen(
    model: nn.Module, examples: Sequence[dict[str, Any]], names: Sequence[str], loss: Callable = causal_loss
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Per layer and sequence: inputs (with ones for a bias) and output gradients, by full backward hooks of autograd."""  # noqa: E501
    modules = dict(model.named_modules())
    inputs: dict[str, list[Tensor]] = {n: [] for n in names}
    grads: dict[str, list[Tensor]] = {n: [] for n in names}
    for example in examples:
        kept: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str, kept: dict = kept) -> Callable:
            def run(module: nn.Module, args: Any, output: Tensor) -> None:
                output.retain_grad()
                kept[name] = (args[0].detach(), output)

            return run

        handles = [modules[n].register_forward_hook(hook(n)) for n in names]
        model.zero_grad()
        loss(model, example).backward()
        for handle in handles:
            handle.remove()
        for n in names:
            a, out = kept[n]
            a = a.reshape(-1, a.shape[-1])
            if getattr(modules[n], "bias", None) is not None:
                a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
            g = torch.zeros_like(out) if out.grad is None else out.grad
            inputs[n].append(a.clone())
            grads[n].append(g.reshape(-1, g.shape[-1]).clone())
    model.zero_grad()
    return inputs, grads


def dot(left: Sequence[dict[str, Tensor]], right: Sequence[dict[str, Tensor]]) -> Tensor:
    """``[len(left), len(right)]`` inner products summed over layers."""
    return torch.stack([torch.stack([sum((x[n] * y[n]).sum() for n in x) for y in right]) for x in left])


def error(found: Tensor, wanted: Tensor) -> float:
    """``‖found − wanted‖ / ‖wanted‖``."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300))


def padded(example: dict[str, Any], left: int, right: int) -> dict[str, Any]:
    """The same sequence with padding marked by its attention mask."""
    ids, n = list(example["input_ids"]), len(example["input_ids"])
    out = {"input_ids": [7] * left + ids + [9] * right, "attention_mask": [0] * left + [1] * n + [0] * right}
    if isinstance(example.get("labels"), list):
        out["labels"] = [-100] * left + example["labels"] + [-100] * right
    elif "labels" in example:
        out["labels"] = example["labels"]
    return out
