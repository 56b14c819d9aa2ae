"""Plain torch against the C++ kernels on this CPU, shape by shape.

    python benchmarks/cpu_ops.py [--ops NAME ...] [--repeats 15] [--threads 2] [--budget SECONDS] [--out FILE.csv]

Random inputs, several copies of them in turn (together larger than the second-level caches), the two backends
interleaved, medians and quartiles of wall time. The error of each backend against float64 is measured first: a backend
whose error is more than twice that of plain torch, or not finite, gets no speed. ``auto`` is the backend that "auto"
takes for the shape; C++ is taken only where it was measured ahead of torch.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyinf import ops
from pyinf.ops import registry

ROOT = Path(__file__).resolve().parent
FIELDS = [
    "op", "shape", "dtype", "threads", "backend", "median_ms", "low_ms", "high_ms", "rate", "unit", "ratio_to_torch",
    "error", "auto",
]  # fmt: skip
COPIES = 3


@dataclass
class Case:
    """One shape: inputs of a call, what to call on them, and the work of one call (operations, or bytes)."""

    op: str
    shape: str
    inputs: Callable[[int], tuple]
    call: Callable[..., Tensor]
    work: float
    unit: str = "GFLOP/s"


def layer(lengths: list[int], d_out: int, d_in: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(n, d_out, generator=generator), torch.randn(n, d_in, generator=generator), offsets


def _squared(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    Lam = torch.zeros(g.shape[1], a.shape[1], dtype=g.dtype if g.dtype == torch.float64 else torch.float32)
    return ops.accumulate_squared_gradients(Lam, g, a, offsets)


def _covariance(x: Tensor) -> Tensor:
    C = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    return ops.accumulate_covariance(C, x).tril()


def cases() -> Iterator[Case]:
    for d_out, d_in, length, count in (
        (256, 256, 128, 32),
        (768, 256, 128, 16),
        (768, 768, 128, 16),
        (768, 769, 128, 16),
        (3072, 768, 128, 8),
        (768, 3072, 128, 8),
        (1024, 1024, 32, 32),
        (1024, 1024, 128, 16),
        (1024, 1024, 512, 4),
        (3072, 3072, 128, 4),
    ):
        yield Case(
            "accumulate_squared_gradients",
            f"{d_out}x{d_in} T={length} B={count}",
            lambda s, t=(d_out, d_in, length, count): layer([t[2]] * t[3], t[0], t[1], s),
            _squared,
            2.0 * length * count * d_out * d_in,
        )
    for d, n in ((256, 4096), (768, 2048), (1024, 2048), (3072, 2048)):
        yield Case(
            "accumulate_covariance",
            f"d={d} N={n}",
            lambda s, t=(d, n): (torch.randn(t[1], t[0], generator=torch.Generator().manual_seed(s)),),
            _covariance,
            1.0 * n * d * (d + 1),
        )
    for batch, d, k in ((8, 100_000, 512), (32, 100_000, 2048), (8, 100_000, 100)):
        yield Case(
            "random_projection",
            f"{batch}x{d} k={k}",
            lambda s, t=(batch, d): (torch.randn(*t, generator=torch.Generator().manual_seed(s)),),
            lambda x, k=k: ops.random_projection(x, k),
            2.0 * batch * d * k,
        )
    for batch, d, k, nnz in ((8, 500_000, 4096, 1), (32, 100_000, 4096, 2)):
        yield Case(
            "sparse_projection",
            f"{batch}x{d} k={k} nnz={nnz}",
            lambda s, t=(batch, d): (torch.randn(*t, generator=torch.Generator().manual_seed(s)),),
            lambda x, k=k, nnz=nnz: ops.sparse_projection(x, k, nnz=nnz),
            4.0 * batch * d,
            "GB/s",
        )
    for queries, n, bits in ((1, 100_000, 1024), (16, 50_000, 4096)):
        yield Case(
            "scan_topk",
            f"1bit Q={queries} N={n} bits={bits}",
            lambda s, t=(queries, n, bits): (
                torch.randn(t[0], t[2], generator=torch.Generator().manual_seed(s)),
                torch.randint(0, 256, (t[1], t[2] // 8), generator=torch.Generator().manual_seed(s), dtype=torch.uint8),
            ),
            lambda q, rows: ops.scan_topk(q, rows, 20, "1bit")[0],
            1.0 * n * bits / 8,
            "GB/s",
        )


def reference(case: Case, inputs: tuple) -> Tensor:
    """The op in float64: by its reference, or by torch where the reference would hold a whole random matrix."""
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    with ops.use_backend("torch" if case.op in ("random_projection", "sparse_projection") else "reference"):
        return case.call(*exact)


def measure(case: Case, repeats: int, budget: float) -> list[dict[str, object]]:
    """One row for each backend: speeds only where the values are right."""
    copies = [case.inputs(s) for s in range(COPIES)]
    chosen = auto_backend(case, copies[0])
    exact = reference(case, copies[0])
    scale = exact.norm().item()
    errors: dict[str, float] = {}
    for backend in ("torch", "cpu"):
        if any(i.backend == backend for i in registry._implementations[case.op]):
            with ops.use_backend(backend):
                errors[backend] = ((case.call(*copies[0]).double() - exact).norm().item()) / scale
    allowed = max(2 * errors["torch"], 1e-6)
    right = [b for b, e in errors.items() if e <= allowed]
    times: dict[str, list[float]] = {b: [] for b in right}
    start = time.perf_counter()
    for turn in range(repeats):
        for backend in right if turn % 2 else reversed(right):
            with ops.use_backend(backend):
                inputs = copies[turn % COPIES]
                begun = time.perf_counter()
                case.call(*inputs)
                times[backend].append(time.perf_counter() - begun)
        if turn >= 4 and time.perf_counter() - start > budget:
            break
    rows = []
    for backend, error in errors.items():
        row: dict[str, object] = {"op": case.op, "shape": case.shape, "dtype": "float32", "backend": backend}
        row |= {"threads": torch.get_num_threads(), "error": f"{error:.1e}", "unit": case.unit, "auto": chosen}
        if backend in times:
            quartiles = statistics.quantiles(times[backend], n=4)
            median = statistics.median(times[backend])
            row |= {"median_ms": f"{median * 1e3:.3f}", "low_ms": f"{quartiles[0] * 1e3:.3f}"}
            row |= {"high_ms": f"{quartiles[2] * 1e3:.3f}", "rate": f"{case.work / median * 1e-9:.1f}"}
            row["ratio_to_torch"] = f"{statistics.median(times['torch']) / median:.2f}"
        else:
            row["rate"] = "values are wrong"
        rows.append(row)
    return rows


def auto_backend(case: Case, inputs: tuple) -> str:
    """The backend that "auto" takes, seen by asking the registry during the call."""
    seen: list[str] = []
    original = registry.select

    def watching(op: str, args: tuple) -> registry.Implementation:
        entry = original(op, args)
        seen.append(entry.backend)
        return entry

    registry.select = watching
    try:
        with ops.use_backend("auto"):
            case.call(*inputs)
    finally:
        registry.select = original
    return seen[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", help="only these ops")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a shape, after five repeats")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "ops.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    wrong = 0
    for case in cases():
        if options.ops and case.op not in options.ops:
            continue
        for row in measure(case, options.repeats, options.budget):
            rows.append(row)
            wrong += row["rate"] == "values are wrong"
            text = f"{row['op']:30} {row['shape']:28} {row['backend']:6} {row.get('median_ms', '-'):>10} ms"
            text += f" {row['rate']:>8} {row['unit']:8} x{row.get('ratio_to_torch', '-'):5} error {row['error']}"
            print(text + (" <- auto" if row["auto"] == row["backend"] else ""), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
