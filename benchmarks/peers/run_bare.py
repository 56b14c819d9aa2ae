"""The model alone over the training tokens, and the matrix rates of this machine: what no library can go below."""

from __future__ import annotations

import time

import torch
from common import Run, summed_loss


def _rate(n: int, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of the best of several `n x n` products, at least `seconds` long in all."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    out = torch.empty(n, n, dtype=dtype)
    best, spent = float("inf"), 0.0
    while spent < seconds:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        took = time.perf_counter() - started
        best, spent = min(best, took), spent + took
    return 2 * n**3 / best


def main() -> None:
    """Run and write the result. Stages: forward; backward to the activations only; backward with weight gradients."""
    run = Run(__doc__ or "")
    with run.recorder.stage("setup"):
        model = run.model()
        train = torch.from_numpy(run.train)
        batches = [train[i : i + run.shape.batch] for i in range(0, len(train), run.shape.batch)]
        with torch.no_grad():
            summed_loss(model, batches[0])
        small = run.shape.width < 256
        rates = {
            "float32": _rate(256 if small else 2048, torch.float32, 0.05 if small else 2.0),
            "float64": _rate(256 if small else 1536, torch.float64, 0.05 if small else 1.0),
        }
    with run.recorder.stage("forward"), torch.no_grad():
        for batch in batches:
            summed_loss(model, batch)
    model.requires_grad_(False)
    input_side = model.transformer.wpe if run.shape.family == "gpt2" else model.model.embed_tokens
    input_side.requires_grad_(True)
    with run.recorder.stage("activations"):
        for batch in batches:
            summed_loss(model, batch).backward()
            input_side.weight.grad = None
    model.requires_grad_(True)
    with run.recorder.stage("weights"):
        for batch in batches:
            summed_loss(model, batch).backward()
            model.zero_grad(set_to_none=True)
    run.finish(None, "bare", torch.__version__, "one pass over the training tokens, fp32", rates=rates)


if __name__ == "__main__":
    main()
