"""A small Llama with random weights: what the demo and the retraining protocols train on the spot."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["small_llama"]


def small_llama(
    vocabulary: int,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    positions: int,
    seed: int,
    name: str,
    device: str | torch.device = "cpu",
) -> Any:
    """A ``LlamaForCausalLM`` of these sizes, embedding and head tied, token 0 for begin, end and padding.

    Its weights are a function of ``seed`` and the sizes; the caller's random state is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        name_or_path=name,
    )
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(place)
