"""The definition, plainly, in float64: explicit per-sequence gradients by autograd, dense linear algebra, no tricks.

For sequence i with the summed next-token loss f_i and a tracked layer with weight W (and bias b as a last column):
G_i = df_i/dW `[d_out, d_in]`; A = mean of a a^T over positions, S = mean of g g^T, U_A and U_S their eigenvectors;
Lambda = mean_i (U_S^T G_i U_A)^2; damping = 0.1 mean(Lambda);
score(q, i) = sum over layers <U_S [(U_S^T G_q U_A) / (Lambda + damping)] U_A^T, G_i>.

`positions` chooses what A is a mean over: "all" (pyinf, kronfluence) or "all_but_last" (bergson, dattri-llm: the last
position of a sequence carries no loss, hence no gradient). It matters to A alone, since g is zero there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import replace_conv1d, summed_loss


class _Statistics:
    """Sums of a a^T and g g^T of one layer, from hooks that are active only in the first pass."""

    def __init__(self, layer: Any, keep: slice) -> None:
        self.a: Any = 0.0
        self.s: Any = 0.0
        self.keep = keep
        self.handle = layer.register_forward_hook(self._forward)

    def _forward(self, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        import torch

        a = inputs[0].detach()[:, self.keep]
        if layer.bias is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        self.a = self.a + torch.einsum("bti,btj->ij", a, a)
        output.register_hook(self._backward)

    def _backward(self, g: Any) -> None:
        import torch

        self.s = self.s + torch.einsum("bti,btj->ij", g, g)


def reference_scores(
    model: Any, tracked: list[str], train: np.ndarray, queries: np.ndarray, damping: float, positions: str = "all"
) -> np.ndarray:
    """Scores `[queries, train]` float64. The model is converted to float64 in place.

    `damping` is relative to mean(Lambda) of each layer. Slow on purpose: one sequence at a time, three passes.
    """
    import torch

    model = model.double().eval()
    replace_conv1d(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in tracked}
    weights = [w for layer in layers.values() for w in (layer.weight, layer.bias) if w is not None]
    for weight in weights:
        weight.requires_grad_(True)

    def gradients(row: np.ndarray) -> dict[str, Any]:
        parts = iter(torch.autograd.grad(summed_loss(model, torch.from_numpy(row)[None]), weights))
        out = {}
        for name, layer in layers.items():
            weight = next(parts)
            out[name] = weight if layer.bias is None else torch.cat([weight, next(parts)[:, None]], 1)
        return out

    keep = slice(None) if positions == "all" else slice(None, -1)
    statistics = {name: _Statistics(layer, keep) for name, layer in layers.items()}
    for row in train:
        gradients(row)
    bases = {}
    for name, layer in statistics.items():
        layer.handle.remove()
        bases[name] = (torch.linalg.eigh(layer.s)[1], torch.linalg.eigh(layer.a)[1])
    spectrum = dict.fromkeys(layers, 0.0)
    for row in train:
        for name, gradient in gradients(row).items():
            u_s, u_a = bases[name]
            spectrum[name] = spectrum[name] + (u_s.T @ gradient @ u_a) ** 2 / len(train)
    inverted = {name: [] for name in layers}
    for row in queries:
        for name, gradient in gradients(row).items():
            (u_s, u_a), values = bases[name], spectrum[name]
            rotated = (u_s.T @ gradient @ u_a) / (values + damping * values.mean())
            inverted[name].append(u_s @ rotated @ u_a.T)
    stacked = {name: torch.stack(parts).flatten(1) for name, parts in inverted.items()}
    columns = [sum(stacked[name] @ gradient.flatten() for name, gradient in gradients(row).items()) for row in train]
    return torch.stack(columns, 1).numpy()


def agreement(scores: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Lowest Pearson correlation of a query's row, and relative difference of the whole, of `scores` to `target`."""
    scores, target = scores.astype(np.float64), target.astype(np.float64)
    x, y = scores - scores.mean(1, keepdims=True), target - target.mean(1, keepdims=True)
    pearson = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return float(pearson.min()), float(np.linalg.norm(scores - target) / np.linalg.norm(target))


def main() -> None:
    """Command line: `reference.py --inputs DIR --out FILE.npy [--positions all|all_but_last]`."""
    parser = argparse.ArgumentParser(description="Float64 reference scores.")
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", choices=("all", "all_but_last"), default="all")
    options = parser.parse_args()
    import json

    import torch
    from inputs import DAMPING, SHAPES
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    shape = SHAPES[json.loads((options.inputs / "inputs.json").read_text())["shape"]["name"]]
    model = AutoModelForCausalLM.from_pretrained(options.inputs / "model", dtype=torch.float64)
    train, queries = np.load(options.inputs / "train.npy"), np.load(options.inputs / "queries.npy")
    np.save(options.out, reference_scores(model, shape.tracked(), train, queries, DAMPING, options.positions))


if __name__ == "__main__":
    main()
