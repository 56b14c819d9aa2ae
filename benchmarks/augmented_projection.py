"""Does a two-sided projection cost less when it rides along with the layer's own products?

    python -m benchmarks.augmented_projection [--rounds 7] [--tokens 2048]

A layer computes ``y = x Wᵀ`` and, in the backward, ``∂x = g W``; ``project_gradients`` needs ``x P_a`` and ``g P_g``
beside them. Separate: two products a side. Augmented: one, with ``[W; P_aᵀ]`` and ``[W, P_g]``, whose result is cut
into the layer's part and the projected rows. The layer's part is then no longer contiguous: "copied" adds the copy that
an op needs which cannot read it so. The augmented weights are made before the clock starts. Plain torch, float32 on
this CPU, medians of processor time over rounds in which the ways take turns, so that other work on the machine hardly
shows; writes benchmarks/results/cpu/augmented_projection.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ((768, 768), (3072, 768), (768, 3072), (2048, 2048))
SIDES = (16, 64, 128)
WAYS = ("layer alone", "separate", "augmented", "augmented, copied")


def ways(x: Tensor, W: Tensor, P: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The product of ``x [N, d]`` with the layer's matrix ``W [d, m]`` and with ``P [d, k]``, in each way."""
    both = torch.cat([W, P], dim=1)
    width = W.shape[1]

    def augmented() -> tuple[Tensor, ...]:
        out = x @ both
        return out[:, :width], out[:, width:]

    def copied() -> tuple[Tensor, ...]:
        out = x @ both
        return out[:, :width].contiguous(), out[:, width:].contiguous()

    return dict(zip(WAYS, (lambda: (x @ W,), lambda: (x @ W, x @ P), augmented, copied), strict=True))


def milliseconds(found: dict[str, Callable[[], tuple[Tensor, ...]]], rounds: int) -> dict[str, float]:
    """Median processor time of each way."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, call in found.items():
            begun = time.process_time()
            call()
            times[name].append(time.process_time() - begun)
    return {name: 1e3 * median(spent) for name, spent in times.items()}


def measure(tokens: int, rounds: int, layers: Sequence[tuple[int, int]], sides: Sequence[int]) -> list[dict]:
    """A row for each layer, side and k: median milliseconds of each way, and what the projection adds to the layer."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for d_out, d_in in layers:
        for side, d, m in (("forward", d_in, d_out), ("backward", d_out, d_in)):
            x, W = torch.randn(tokens, d, generator=generator), torch.randn(d, m, generator=generator) * d**-0.5
            for k in sides:
                found = ways(x, W, torch.randn(d, k, generator=generator) * k**-0.5)
                whole = found["separate"]()
                for name in WAYS[2:]:
                    for one, other in zip(whole, found[name](), strict=True):
                        assert torch.allclose(one, other, atol=1e-3), name
                times = milliseconds(found, rounds)
                row = {"d_out": d_out, "d_in": d_in, "side": side, "k": k, "tokens": tokens}
                row |= {f"{name} ms": round(t, 3) for name, t in times.items()}
                row["separate / augmented"] = round(times["separate"] / times["augmented"], 3)
                row["separate / copied"] = round(times["separate"] / times["augmented, copied"], 3)
                rows.append(row)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu" / "augmented_projection.csv"
    )
    given = parser.parse_args(arguments)
    rows = measure(given.tokens, given.rounds, LAYERS, SIDES)
    with given.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
