"""A byte-pair tokenizer and a Llama of a few thousand weights, saved to a folder as a user would have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<s>", "</s>")


def save_tokenizer(
    folder: Path, texts: Iterable[str], vocabulary: int = 320, special: tuple[str, ...] = SPECIAL
) -> Any:
    """Train a tokenizer on ``texts`` and save it; ``special``: begin and end, or none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet)
    core.train_from_iterator(list(texts), trainer)
    names = dict(zip(("bos_token", "eos_token"), special, strict=False))
    words = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    words.save_pretrained(folder)
    return words


def save_llama(folder: Path, texts: Iterable[str], positions: int = 64) -> None:
    """A tokenizer trained on ``texts`` and a Llama with random weights, in one folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = save_tokenizer(folder, texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
