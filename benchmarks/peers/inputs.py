"""The common inputs: one model folder and two token files a shape, made once and read by every library.

Weights are random (fixed seed) and saved as safetensors with their Hugging Face configuration; tokens are uniform
random ids saved as `.npy`. The folder carries a small word-level tokenizer because one of the peers refuses to start
without one, although it only ever sees token ids.

    python benchmarks/peers/inputs.py small_llama runs/peers/small_llama/inputs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20261122
DAMPING = 0.1


@dataclass(frozen=True)
class Shape:
    """One workload: `train` and `queries` sequences of `length` tokens, `batch` at a time, and the model's sizes."""

    name: str
    family: str  # "llama" or "gpt2"
    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    positions: int
    train: int
    queries: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.train * self.length

    def linear_layers(self) -> list[tuple[str, int, int, str]]:
        """Tracked layers of one block: (name, d_in with the bias column, d_out, the input it shares)."""
        d, m = self.width, self.mlp
        if self.family == "gpt2":
            return [
                ("attn.c_attn", d + 1, 3 * d, "ln_1"),
                ("attn.c_proj", d + 1, d, "attn"),
                ("mlp.c_fc", d + 1, m, "ln_2"),
                ("mlp.c_proj", m + 1, d, "act"),
            ]
        return [
            ("self_attn.q_proj", d, d, "norm_1"),
            ("self_attn.k_proj", d, d, "norm_1"),
            ("self_attn.v_proj", d, d, "norm_1"),
            ("self_attn.o_proj", d, d, "attn"),
            ("mlp.gate_proj", d, m, "norm_2"),
            ("mlp.up_proj", d, m, "norm_2"),
            ("mlp.down_proj", m, d, "act"),
        ]

    def tracked(self) -> list[str]:
        """Names of the tracked layers, in the order of the blocks."""
        prefix = "transformer.h" if self.family == "gpt2" else "model.layers"
        return [f"{prefix}.{i}.{layer[0]}" for i in range(self.layers) for layer in self.linear_layers()]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "llama", 2, 32, 64, 4, 48, 128, 24, 3, 16, 8),
        Shape("tiny_gpt2", "gpt2", 2, 32, 64, 4, 48, 128, 24, 3, 16, 8),
        Shape("small_llama", "llama", 4, 256, 1024, 4, 2048, 2048, 256, 16, 128, 16),
        Shape("gpt2_small", "gpt2", 12, 768, 3072, 12, 50257, 1024, 32, 8, 128, 8),
    )
}


def build_model(shape: Shape) -> Any:
    """Random-init float32 model of `shape`, from the fixed seed. Weights may differ between torch versions."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    if shape.family == "gpt2":
        config = GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.positions,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.mlp,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def build_tokens(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Training ids `[train, length]` and query ids `[queries, length]`, int64."""
    generator = np.random.default_rng(SEED)
    train = generator.integers(0, shape.vocabulary, (shape.train, shape.length), dtype=np.int64)
    return train, generator.integers(0, shape.vocabulary, (shape.queries, shape.length), dtype=np.int64)


def _save_tokenizer(shape: Shape, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(shape.vocabulary)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="0").save_pretrained(folder)


def make_inputs(shape: Shape, folder: Path) -> str:
    """Write the inputs of `shape` to `folder` unless they are there. Returns their fingerprint (sha256 over the files).

    Layout: `model/` (config, safetensors, tokenizer), `train.npy`, `queries.npy`, `inputs.json`.
    """
    note = folder / "inputs.json"
    if note.is_file():
        known = json.loads(note.read_text())
        if known["shape"] == asdict(shape) and known["seed"] == SEED:
            return known["fingerprint"]
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_model(shape).save_pretrained(folder / "model")
    _save_tokenizer(shape, folder / "model")
    train, queries = build_tokens(shape)
    np.save(folder / "train.npy", train)
    np.save(folder / "queries.npy", queries)
    digest = hashlib.sha256()
    for path in (folder / "model" / "model.safetensors", folder / "train.npy", folder / "queries.npy"):
        digest.update(path.read_bytes())
    fingerprint = digest.hexdigest()
    note.write_text(json.dumps({"shape": asdict(shape), "seed": SEED, "fingerprint": fingerprint}, indent=1))
    return fingerprint


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the common inputs of one shape.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(make_inputs(SHAPES[options.shape], options.folder))


if __name__ == "__main__":
    main()
