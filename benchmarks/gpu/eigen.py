"""Eigensolvers on this device: seconds and residuals on covariances whose spectrum falls as a power of the rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.journal import Item
from benchmarks.gpu.options import Options
from pyinf.bench.timing import resolve_device
from pyinf.curvature.eigen import eigenbasis, residuals
from pyinf.curvature.eigen_gpu import batched_eigh, divide_and_conquer

SIZES = (512, 1024, 2048, 4096, 8192, 14336)
BATCHES = ((128, 64), (64, 256), (32, 512), (16, 1024))


def covariance(n: int, device: torch.device, seed: int = 0) -> Tensor:
    """Of samples with variances ``1/i`` in a random basis, and as few samples as twice the size."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(2 * n, n, generator=generator, device=device)
    x *= torch.arange(1, n + 1, device=device, dtype=torch.float32).rsqrt()
    mix = torch.randn(n, n, generator=generator, device=device) / n**0.5
    x = x @ mix
    return x.T @ x / (2 * n)


SOLVERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "fp32": lambda A: eigenbasis(A, "fp32"),
    "fp64": lambda A: eigenbasis(A, "fp64"),
    # the tolerance is wide here so that the residual is seen; the library's is 1e-5
    "divide-and-conquer ieee": lambda A: divide_and_conquer(A, precision="ieee", tolerance=1.0),
    "divide-and-conquer tf32x3": lambda A: divide_and_conquer(A, precision="tf32x3", tolerance=1.0),
}


def items(shard: str, options: Options) -> Iterator[Item]:
    device = resolve_device(options.device)
    for count, n in ((3, 16),) if options.tiny else BATCHES:
        for how in ("one at a time", "batched"):
            yield f"{count} of {n} {how}", lambda a=(count, n, how): _many(device, *a)
    for n in (48,) if options.tiny else SIZES:
        for name in SOLVERS:
            if n > 8192 and name == "fp64":
                continue
            yield f"{name} {n}", lambda a=(name, n): _one(device, *a)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _one(device: torch.device, name: str, n: int) -> dict[str, Any]:
    SOLVERS[name](covariance(64, device))  # handles and modules are loaded
    A = covariance(n, device)
    _wait(device)
    begun = time.perf_counter()
    Q, d = SOLVERS[name](A)
    _wait(device)
    seconds = time.perf_counter() - begun
    found = residuals(A, Q, d)
    return {
        "solver": name,
        "rows": n,
        "count": 1,
        "seconds": seconds,
        "decomposition": found.decomposition,
        "orthogonality": found.orthogonality,
    }


def _many(device: torch.device, count: int, n: int, how: str) -> dict[str, Any]:
    matrices = [covariance(n, device, seed) for seed in range(count)]
    solve = batched_eigh if how == "batched" else lambda part: [eigenbasis(A, "fp64") for A in part]
    solve(matrices[:2])
    _wait(device)
    begun = time.perf_counter()
    pairs = solve(matrices)
    _wait(device)
    seconds = time.perf_counter() - begun
    found = [residuals(A, Q, d) for A, (Q, d) in zip(matrices, pairs, strict=True)]
    return {
        "solver": f"fp64 {how}",
        "rows": n,
        "count": count,
        "seconds": seconds,
        "decomposition": max(f.decomposition for f in found),
        "orthogonality": max(f.orthogonality for f in found),
    }
