"""Fit and score on random Llamas, stage by stage: plain torch against what "auto" takes.

Weights are random (no network), which changes no shape. Sequences have 1024 tokens. At 1B only the first blocks are
traced: the eigendecompositions of all would take longer than the run has; the row says which. "auto" takes the kernels
that the correctness part of the same run verified.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.journal import Item
from benchmarks.gpu.options import Options
from pyinf.bench.timing import resolve_device

MODELS: dict[str, dict[str, Any]] = {
    "160m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32000,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}
WORK = {"160m": (64, 8, 1024, None), "1b": (32, 4, 1024, ["*.layers.0.*"]), "tiny": (6, 2, 12, None)}
"""Training sequences, queries, tokens of each, traced modules (None: all)."""


def items(shard: str, options: Options) -> Iterator[Item]:
    name = "tiny" if options.tiny else shard
    for backend in ("torch", "auto"):
        yield f"{shard} {backend}", lambda b=backend: run(name, b, options)


def run(name: str, backend: str, options: Options) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    import pyinf
    from pyinf.ops import verified

    os.environ["PYINF_CACHE"] = str(options.out)  # where the correctness part of this run put its record
    verified._records.cache_clear()
    device = resolve_device(options.device)
    train_count, query_count, length, modules = WORK[name]
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], max_position_embeddings=max(length, 64))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, config.vocab_size, (train_count + query_count, length), generator=generator)
    train = [{"input_ids": row} for row in rows[:train_count]]
    queries = [{"input_ids": row} for row in rows[train_count:]]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    attributor = pyinf.Attributor(
        model, method="ekfac", modules=modules, fisher="empirical", backend=backend, query_rank=None
    )
    begun = time.perf_counter()
    attributor.fit(train)
    fitted = time.perf_counter()
    scores = attributor.score(queries, train)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ended = time.perf_counter()
    row = {"model": name, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "modules": modules or "all"}
    row |= {"train": train_count, "queries": query_count, "tokens": length, "fit_seconds": fitted - begun}
    row |= {"score_seconds": ended - fitted, "stages": dict(attributor.timings)}
    row |= {"fit_tokens_per_second": train_count * length / (fitted - begun)}
    row |= {"peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}
    row |= {"finite": bool(torch.isfinite(scores.values).all()), "scores_norm": float(scores.values.double().norm())}
    del model, attributor
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row
