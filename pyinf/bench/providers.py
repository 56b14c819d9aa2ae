"""Who can run an op in a benchmark: the backends of pyinf, plain torch, and the projections of other packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyinf.bench.cases import backends, function, supports
from pyinf.bench.formulations import FORMULATIONS
from pyinf.errors import ConfigError

__all__ = ["PROVIDERS", "Unavailable", "parse_providers", "runners"]

PROVIDERS = ("torch", "triton", "cuda", "cpu", "fast_jl", "sjlt")
"""Names that ``--providers`` takes. "torch" is the fastest of all plain torch formulations of the op."""


class Unavailable(Exception):
    """A provider that cannot run a case; the message is the reason."""


def parse_providers(text: str) -> list[str]:
    """``"torch,triton"`` to names. Raises ``ConfigError`` for an unknown one."""
    names = [item.strip() for item in text.split(",") if item.strip()]
    for name in names:
        if name not in PROVIDERS:
            raise ConfigError(f"unknown provider {name!r}; choose among: {', '.join(PROVIDERS)}")
    if not names:
        raise ConfigError(f"no provider given; choose among: {', '.join(PROVIDERS)}")
    return list(dict.fromkeys(names))


def runners(op: str, provider: str, args: Sequence[Any]) -> dict[str, Callable[..., Any]]:
    """Functions of the op's arguments by which ``provider`` runs it, by label ("" where there is one only).

    A function of a pyinf backend must be called with that backend forced (``cases.forced``). Raises
    :class:`Unavailable` with the reason.
    """
    if provider in ("fast_jl", "sjlt"):
        return {"": (_fast_jl if provider == "fast_jl" else _sjlt)(op, args)}
    if provider not in backends(op):
        reason = supports(op, provider, tuple(args))
        raise Unavailable(reason or f"{provider} does not serve {op}")
    reason = supports(op, provider, tuple(args))
    if reason is not None:
        raise Unavailable(reason)
    if provider != "torch":
        return {"": function(op)}
    return {"pyinf's torch backend": function(op)} | FORMULATIONS[op]


def _installed(name: str, op: str, wanted: str, args: Sequence[Any]) -> Tensor:
    if op != wanted:
        raise Unavailable(f"{name} does {wanted} only")
    x = args[0]
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"{name} is not installed; pip install {name.replace('_', '-')} (it needs nvcc and torch)")
    if not x.is_cuda:
        raise Unavailable(f"{name} runs on CUDA devices only; the inputs are on {x.device}")
    return x


def _fast_jl(op: str, args: Sequence[Any]) -> Callable[..., Tensor]:
    """MadryLab's fast_jl (TRAK): float16 or float32 input, k a multiple of 512, unscaled."""
    x = _installed("fast_jl", op, "random_projection", args)
    k, distribution = args[1], args[3]
    if x.dtype not in (torch.float16, torch.float32) or k % 512 or not x.is_contiguous():
        raise Unavailable(f"fast_jl takes contiguous float16 or float32 and k a multiple of 512; got {x.dtype}, k={k}")
    import fast_jl

    rows = next((n for n in (32, 16, 8) if x.shape[0] % n == 0), None)
    if rows is None:
        raise Unavailable(f"fast_jl takes batches that are multiples of 8; got {x.shape[0]}")
    project = getattr(fast_jl, f"project_{distribution}_{rows}")
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count
    return lambda x, k, seed, distribution: project(x, k, seed & 0x7FFFFFFF, blocks) / k**0.5


def _sjlt(op: str, args: Sequence[Any]) -> Callable[..., Tensor]:
    """TRAIS-Lab's sjlt (GraSS); its indices are drawn once, before the first call."""
    x = _installed("sjlt", op, "sparse_projection", args)
    from sjlt import SJLTProjection

    made = SJLTProjection(x.shape[1], args[1], c=args[3])
    made = made.to(x.device) if hasattr(made, "to") else made
    return lambda x, k, seed, nnz: made(x)


def projection_error(x: Tensor, projected: Tensor) -> float:
    """For another package's random matrix: the error of inner products against what theory allows, as a ratio.

    ``E|⟨Px, Py⟩ − ⟨x, y⟩|² ≤ 2‖x‖²‖y‖²/k``; the root mean square over pairs of rows over that bound's root. About 1 or
    less for a projection that keeps inner products; NaN counts as infinite.
    """
    wide, out = x.double(), projected.double()
    norms = wide.norm(dim=1)
    off = (out @ out.T - wide @ wide.T) / (norms[:, None] * norms[None, :]).clamp_min(1e-300)
    value = float(off.square().mean().sqrt()) / (2.0 / out.shape[1]) ** 0.5
    return value if value == value else float("inf")
