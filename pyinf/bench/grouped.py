"""Verification of the grouped launches (pyinf/ops/grouped.py): many layers of one shape in one Triton kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyinf.ops import grouped, reference, registry

__all__ = ["GROUPED", "verify_grouped"]

GROUPED = ("accumulate_covariance", "accumulate_squared_gradients")
"""Ops with a grouped kernel; their records are kept under "<op>_group"."""

_OFFSETS = torch.tensor([0, 5, 5, 305, 306, 370, 881])
_SHAPES = ((768, 768), (131, 77))
_LAYERS = 5


def _relative(out: Tensor, exact: Tensor) -> float:
    return float((out.double().cpu() - exact).norm() / exact.norm())


def _run(op: str, g: Sequence[Tensor], a: Sequence[Tensor]) -> list[Tensor]:
    size = (g[0].shape[1], a[0].shape[1]) if op == "accumulate_squared_gradients" else (a[0].shape[1],) * 2
    totals = [torch.zeros(size, device=a[0].device) for _ in a]
    if op == "accumulate_squared_gradients":
        grouped.accumulate_squared_gradients_group(totals, g, a, _OFFSETS)
    else:
        grouped.accumulate_covariance_group(totals, a, [False] * len(a))
    return totals


def _exact(op: str, g: Tensor, a: Tensor) -> Tensor:
    g, a = g.double().cpu(), a.double().cpu()
    if op == "accumulate_squared_gradients":
        total = torch.zeros(g.shape[1], a.shape[1], dtype=torch.float64)
        reference.accumulate_squared_gradients(total, g, a, _OFFSETS)
    else:
        total = torch.zeros(a.shape[1], a.shape[1], dtype=torch.float64)
        reference.accumulate_covariance(total, a)
    return total


def verify_grouped(
    op: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
    shapes: Sequence[tuple[int, int]] = _SHAPES,
    run: Callable[[str, Sequence[Tensor], Sequence[Tensor]], list[Tensor]] = _run,
) -> tuple[bool, list[str]]:
    """Compare the grouped kernel of ``op`` with float64, for layers that share a shape.

    It passes where the largest error ``‖out − ref‖/‖ref‖`` over layers is at most twice that of the same layers one by
    one in plain torch (1e-6 where that is smaller), with the same bits twice. ``run`` makes the grouped call.

    Returns:
        ``(passed, lines)``: one line for each dtype and shape.
    """
    lines, passed = [], True
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        for d_out, d_in in shapes:
            rows = int(_OFFSETS[-1])
            g = [torch.randn(rows, d_out, generator=generator).to(dtype).to(device) for _ in range(_LAYERS)]
            a = [torch.randn(rows, d_in, generator=generator).to(dtype).to(device) for _ in range(_LAYERS)]
            exact = [_exact(op, left, right) for left, right in zip(g, a, strict=True)]
            with registry.use_backend("torch", op):
                plain = [out.tril() if op == GROUPED[0] else out for out in _run(op, g, a)]
            with registry.use_backend("triton", op):
                twice = [[out.tril() if op == GROUPED[0] else out for out in run(op, g, a)] for _ in range(2)]
            error = max(_relative(out, ref) for out, ref in zip(twice[0], exact, strict=True))
            torch_error = max(_relative(out, ref) for out, ref in zip(plain, exact, strict=True))
            same = all(torch.equal(x, y) for x, y in zip(*twice, strict=True))
            good = same and error <= max(2 * torch_error, 1e-6)  # a NaN is not at most anything
            passed = passed and good
            lines.append(
                f"{'ok' if good else 'WRONG'} {device} {op}_group triton {dtype} {_LAYERS} x {d_out}x{d_in}: "
                f"error {error:.1e} where plain torch has {torch_error:.1e}"
                + ("" if same else "; other bits the second time")
            )
    return passed, lines
