"""Does the eigensolver matter? Every solver of ``pyinf.curvature.EIGENSOLVERS`` on a small Llama, trained and not.

    python -m benchmarks.eigensolvers [--threads 1] [--quick] [--out FOLDER]

For each solver: CPU seconds of the eigen stage, which other work on the machine hardly changes (median, fastest and
slowest of interleaved repetitions on the very matrices that the fit of the model makes), and the fastest wall time;
the largest residuals ``‖AQ − QΛ‖/‖A‖`` and ``‖QᵀQ − I‖/√n`` over those matrices; and how far the EK-FAC scores of a
whole fit with that solver stand from those with float64: the lowest Pearson correlation of a query and the largest
relative difference. The model is trained on the spot on docstrings of the standard library. Writes
``eigensolvers.csv`` and ``eigensolvers.json`` (the conditions) to ``benchmarks/results/eigen``; downloads nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pyinf
from pyinf import artifacts
from pyinf.curvature import EIGENSOLVERS, eigenbasis, residuals
from pyinf.curvature import fit as fitting
from pyinf.data import Examples, load_examples
from pyinf.demo.corpus import standard_library_passages
from pyinf.demo.model import Recipe, train_model, train_tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "eigen"
FULL = Recipe(
    examples=256, max_length=128, vocabulary=2048, hidden=256, intermediate=1024, layers=4, heads=4, epochs=3,
    tokenizer_characters=600_000, batch_tokens=1024, learning_rate=2e-3,
)  # fmt: skip
QUICK = Recipe(
    examples=32, max_length=48, vocabulary=512, hidden=32, intermediate=64, layers=2, heads=2, epochs=1,
    tokenizer_characters=40_000,
)  # fmt: skip
TRACED = 96  # of the training examples: enough for every factor to have full rank, small enough to repeat
BAR = 0.999
REFERENCE = "fp64"


def corpus(recipe: Recipe, queries: int) -> tuple[Examples, Examples]:
    """Training examples and queries that are none of them, cut from the same shuffled docstrings."""
    passages = [p.text for p in standard_library_passages() if p.kind == "docstring"]
    random.Random(recipe.seed).shuffle(passages)
    learnt, size = [], 0
    for text in passages:
        if size >= recipe.tokenizer_characters:
            break
        learnt.append(text)
        size += len(text)
    tokenizer = train_tokenizer(learnt, recipe.vocabulary)
    rows = [{"text": text} for text in passages[: recipe.examples + queries]]
    examples = load_examples(rows, tokenizer, max_length=recipe.max_length, name="docstrings")
    return examples[: recipe.examples], examples[recipe.examples :]


@contextlib.contextmanager
def keeping_matrices(kept: dict[str, Tensor]) -> Iterator[None]:
    """Copies of the covariances that a fit decomposes, by name."""

    def keep(matrix: Tensor, solver: str, name: str) -> tuple[Tensor, Tensor]:
        kept[name] = matrix.clone()
        return eigenbasis(matrix, solver, name)

    with mock.patch.object(fitting, "eigenbasis", keep):
        yield


def scores_with(model: Any, train: Examples, queries: Examples, solver: str) -> Tensor:
    """EK-FAC scores ``[Q, N]`` of a whole fit with one eigensolver, in float64."""
    return pyinf.attribute(model, train, queries, method="ekfac", eigensolver=solver).values.double()


def compare(scores: Tensor, reference: Tensor) -> tuple[float, float]:
    """Lowest Pearson correlation over queries, and the largest relative difference of a query's row."""
    pearson = min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(scores, reference, strict=True))
    relative = ((scores - reference).norm(dim=1) / reference.norm(dim=1)).max()
    return pearson, float(relative)


def measure(label: str, model: Any, train: Examples, queries: Examples, repeats: int) -> list[dict[str, Any]]:
    """One row a solver."""
    matrices: dict[str, Tensor] = {}
    with keeping_matrices(matrices):
        reference = scores_with(model, train, queries, REFERENCE)
    seconds: dict[str, list[float]] = {solver: [] for solver in EIGENSOLVERS}
    wall: dict[str, list[float]] = {solver: [] for solver in EIGENSOLVERS}
    worst = dict.fromkeys(EIGENSOLVERS, (0.0, 0.0))
    for repeat in range(repeats):  # interleaved, so that a busy minute slows every solver
        for solver in EIGENSOLVERS:
            found = {}
            started, busy = time.perf_counter(), time.process_time()
            for name, matrix in matrices.items():
                found[name] = eigenbasis(matrix, solver, name)
            seconds[solver].append(time.process_time() - busy)
            wall[solver].append(time.perf_counter() - started)
            if repeat == 0:
                errors = [residuals(matrices[name], *pair) for name, pair in found.items()]
                worst[solver] = (max(e.decomposition for e in errors), max(e.orthogonality for e in errors))
    rows = []
    for solver in EIGENSOLVERS:
        scores = scores_with(model, train, queries, solver)  # the reference too: what two runs of it differ by
        pearson, relative = compare(scores, reference)
        rows.append(
            {
                "model": label,
                "solver": solver,
                "CPU seconds": f"{median(seconds[solver]):.2f}",
                "fastest": f"{min(seconds[solver]):.2f}",
                "slowest": f"{max(seconds[solver]):.2f}",
                "wall seconds": f"{min(wall[solver]):.2f}",
                "decomposition": f"{worst[solver][0]:.1e}",
                "orthogonality": f"{worst[solver][1]:.1e}",
                "lowest Pearson": f"{pearson:.7f}",
                "largest difference": f"{relative:.1e}",
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """The solvers that are faster than ``auto`` on every model and reach the bar of correlation on every one."""
    good = []
    for solver in EIGENSOLVERS:
        own = [r for r in rows if r["solver"] == solver]
        auto = [r for r in rows if r["solver"] == "auto"]
        # the spread of the runs decides, not the median alone: near-ties are no win
        faster = all(float(r["slowest"]) < float(a["fastest"]) for r, a in zip(own, auto, strict=True))
        if faster and all(float(r["lowest Pearson"]) >= BAR for r in own):
            good.append(solver)
    return good


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = QUICK if options.quick else FULL
    train, queries = corpus(recipe, options.queries)
    vocabulary = len(train.tokenizer)
    trained = train_model(train, vocabulary, recipe, torch.device("cpu"))
    torch.manual_seed(recipe.seed)
    untrained = type(trained)(trained.config).eval()  # the very weights that the trained one began from
    traced = train[:TRACED]
    print("trained; measuring", flush=True)
    rows = measure("trained", trained, traced, queries, options.repeats)
    rows += measure("untrained", untrained, traced, queries, options.repeats)

    better = verdict(rows)
    conditions = {
        "cpu": _cpu(),
        "threads": options.threads,
        "torch": torch.__version__,
        "pyinf": pyinf.__version__,
        "repeats": options.repeats,
        "llama": {k: getattr(recipe, k) for k in ("layers", "hidden", "intermediate", "heads", "epochs")},
        "vocabulary": vocabulary,
        "train": len(traced),
        "train_tokens": sum(traced.lengths),
        "queries": len(queries),
        "faster_than_auto_and_as_good": better,
    }
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    artifacts.atomic_write_bytes(options.out / "eigensolvers.csv", text.getvalue().encode())
    artifacts.atomic_write_json(options.out / "eigensolvers.json", conditions)
    print(json.dumps(conditions, indent=2))
    print(f"faster than auto on both models with every Pearson ≥ {BAR}: {', '.join(better) or 'none'}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
