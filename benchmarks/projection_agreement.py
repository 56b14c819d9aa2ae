"""Inner products under pyinf's projections and under those they stand in for: the same distribution, or not.

python -m benchmarks.projection_agreement [--seeds 1000] [--traker FOLDER] [--out FILE]

``random_projection`` in place of TRAK's projector, ``sparse_projection`` in place of GraSS's SJLT. Pairs of vectors of
D coordinates with a given cosine are projected under many seeds; mean and variance of ``⟨Px, Py⟩`` are held to theory,
and its distribution to that of the other projector by the two-sample Kolmogorov–Smirnov statistic.

- ``dense``: a plain matrix of ±1/√k or normal elements over √k, drawn with torch.
- ``sjlt``: buckets and signs drawn with torch as ``sjlt.SJLTProjection`` draws them (its kernel needs CUDA).
- ``traker``: TRAK's ``BasicProjector`` itself, its output over √k, where ``--traker`` names the unpacked source
  distribution (``pip download --no-deps traker``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf import ops

RESULT = Path(__file__).parent / "results" / "projections" / "agreement.json"
COSINES = (0.0, 0.5, 1.0)
Projector = Callable[[Tensor, int], Tensor]


def pairs(size: int) -> Tensor:
    """``[2·cosines, D]`` unit vectors whose squares fall like 1/i, as gradients' do; each pair has its cosine."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, size + 1).double() ** -0.5
    out = []
    for cosine in COSINES:
        x, z = torch.randn(2, size, generator=generator, dtype=torch.float64) * scale
        x = x / x.norm()
        z = z - x * (x @ z)
        out += [x, cosine * x + math.sqrt(1 - cosine**2) * z / z.norm()]
    return torch.stack(out)


def theory(X: Tensor, k: int, kind: str, nnz: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``⟨Px, Py⟩`` of every pair, over projections.

    Signs: ``(‖x‖²‖y‖² + ⟨x,y⟩² − 2Σx²y²)/k``; normal: without the last term; sparse: that of signs, and
    ``2(c − 1)/(ck) Σx²y²`` more with c buckets a coordinate, drawn independently.
    """
    x, y = X[0::2], X[1::2]
    exact = (x * y).sum(1)
    variance = x.square().sum(1) * y.square().sum(1) + exact.square()
    fourth = (x.square() * y.square()).sum(1)
    if kind != "normal":
        variance = variance - 2 * fourth
    if kind == "sparse":
        variance = variance + 2 * (nnz - 1) / nnz * fourth
    return exact, variance / k


def dense(k: int, kind: str) -> Projector:
    def project(X: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if kind == "normal":
            P = torch.randn(X.shape[1], k, generator=generator)
        else:
            P = 2 * torch.randint(0, 2, (X.shape[1], k), generator=generator).float() - 1
        return X.float() @ P / k**0.5

    return project


def sjlt(k: int, nnz: int) -> Projector:
    def project(X: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        buckets = torch.randint(0, k, (X.shape[1], nnz), generator=generator)
        signs = 2 * torch.randint(0, 2, (X.shape[1], nnz), generator=generator).float() - 1
        out = torch.zeros(X.shape[0], k)
        for s in range(nnz):
            out.index_add_(1, buckets[:, s], X.float() * signs[:, s])
        return out / nnz**0.5

    return project


def traker(folder: Path, size: int, k: int, kind: str) -> Projector:
    """TRAK's own projector for the CPU, from its source; the package around it is not imported."""
    package = types.ModuleType("trak_source")
    package.__path__ = [str(folder / "trak")]
    sys.modules["trak_source"] = package
    spec = importlib.util.spec_from_file_location("trak_source.projectors", folder / "trak" / "projectors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trak_source.projectors"] = module
    spec.loader.exec_module(module)

    def project(X: Tensor, seed: int) -> Tensor:
        projector = module.BasicProjector(size, k, 100_000 * seed, kind, torch.device("cpu"), block_size=k)
        return projector.project(X.float(), 0) / k**0.5

    return project


def inner_products(X: Tensor, project: Projector, seeds: int) -> Tensor:
    """``[seeds, pairs]``."""
    out = []
    for seed in range(seeds):
        Y = project(X, seed).double()
        out.append((Y[0::2] * Y[1::2]).sum(1))
    return torch.stack(out)


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest distance of the two empirical distribution functions."""
    points = torch.cat([a, b]).sort().values
    one = torch.searchsorted(a.sort().values, points, right=True) / a.numel()
    two = torch.searchsorted(b.sort().values, points, right=True) / b.numel()
    return float((one - two).abs().max())


def compare(X: Tensor, values: dict[str, Tensor], k: int, kind: str, nnz: int, ours: str) -> list[dict[str, Any]]:
    """One entry a projector and pair: deviations in standard errors, and the distance from pyinf's distribution."""
    exact, variance = theory(X, k, kind, nnz)
    entries = []
    for name, found in values.items():
        n = found.shape[0]
        centred = found - found.mean(0)
        sample = centred.square().sum(0) / (n - 1)
        fourth = centred.pow(4).mean(0)
        spread = ((fourth - sample.square()) / n).clamp(min=1e-300).sqrt()  # standard error of the variance
        for pair, cosine in enumerate(COSINES):
            entry = {
                "kind": kind if kind != "sparse" else f"sparse, {nnz} a coordinate",
                "projector": name,
                "cosine": cosine,
                "mean": float(found[:, pair].mean()),
                "mean_error_in_standard_errors": float(
                    (found[:, pair].mean() - exact[pair]) / (sample[pair] / n).clamp(min=1e-300).sqrt()
                ),
                "variance_over_theory": float(sample[pair] / variance[pair]),
                "variance_error_in_standard_errors": float((sample[pair] - variance[pair]) / spread[pair]),
            }
            if name != ours:
                entry["distance_from_pyinf"] = kolmogorov_smirnov(values[ours][:, pair], found[:, pair])
                entry["distance_expected_at_most"] = 1.628 * math.sqrt(2 / n)  # 1 % level
            entries.append(entry)
    return entries


def run(size: int, k: int, seeds: int, source: Path | None) -> dict[str, Any]:
    """All comparisons."""
    X = pairs(size)
    entries = []
    for kind in ("rademacher", "normal"):
        projectors: dict[str, Projector] = {
            "pyinf": lambda X, seed, kind=kind: ops.random_projection(X.float(), k, seed, kind),
            "dense": dense(k, kind),
        }
        if source is not None:
            projectors["traker"] = traker(source, size, k, kind)
        values = {name: inner_products(X, project, seeds) for name, project in projectors.items()}
        entries += compare(X, values, k, kind, 1, "pyinf")
    for nnz in (1, 4):
        projectors = {
            "pyinf": lambda X, seed, nnz=nnz: ops.sparse_projection(X.float(), k, seed, nnz),
            "sjlt": sjlt(k, nnz),
        }
        values = {name: inner_products(X, project, seeds) for name, project in projectors.items()}
        entries += compare(X, values, k, "sparse", nnz, "pyinf")
    return {"coordinates": size, "k": k, "seeds": seeds, "traker": source is not None, "entries": entries}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| projection | projector | cosine | mean of ⟨Px, Py⟩ (error in s.e.) | variance / theory (error in s.e.) "
        "| KS distance from pyinf (1 % level) |",
        "|---|---|---|---|---|---|",
    ]
    for e in result["entries"]:
        far = "" if "distance_from_pyinf" not in e else (
            f"{e['distance_from_pyinf']:.3f} ({e['distance_expected_at_most']:.3f})"
        )  # fmt: skip
        lines.append(
            f"| {e['kind']} | {e['projector']} | {e['cosine']} | {e['mean']:.4f} "
            f"({e['mean_error_in_standard_errors']:+.1f}) | {e['variance_over_theory']:.3f} "
            f"({e['variance_error_in_standard_errors']:+.1f}) | {far} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--traker", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result = run(args.size, args.k, args.seeds, args.traker)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**result, "torch": torch.__version__}, indent=1) + "\n")
    text = table(result)
    args.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
