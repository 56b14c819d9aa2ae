"""What all backends of the projections agree on: the options that there are, sizes of both sides, the form of results.

``torch.ops.pyinf.project_gradients`` and ``random_projection`` check and resolve them once, before a backend is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.errors import ConfigError
from pyinf.ops.philox import need_distribution

__all__ = ["EPILOGUES", "empty_result", "need_options", "result_shape", "side_sizes", "too_wide"]

EPILOGUES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "sign": torch.uint8,
}
"""What becomes of the projected gradients, and the dtype it is stored in ("float32" is float64 for such inputs)."""


def need_options(distribution: str, epilogue: str = "float32") -> None:
    """Raise ``ConfigError`` for a distribution or an epilogue that there is not."""
    need_distribution(distribution)
    if epilogue not in EPILOGUES:
        raise ConfigError(f"unknown epilogue {epilogue!r}; choose one of: {', '.join(EPILOGUES)}")


def side_sizes(P_g: Tensor | None, P_a: Tensor | None, k_g: int, k_a: int) -> tuple[int, int]:
    """Columns of both sides: those of a matrix that is given, else the number."""
    return k_g if P_g is None else P_g.shape[1], k_a if P_a is None else P_a.shape[1]


def too_wide(kernel: str, largest: int, k_g: int, k_a: int) -> str | None:
    """Why the ``kernel`` does not serve these sizes, or None."""
    if max(k_g, k_a) <= largest:
        return None
    return f"the {kernel} kernel projects to at most {largest} columns a side; got {k_g} and {k_a}"


def result_shape(count: int, k_g: int, k_a: int, epilogue: str) -> tuple[int, ...]:
    """``[B, k_g, k_a]``, or bytes of packed signs ``[B, ⌈k_g·k_a / 8⌉]``."""
    return (count, (k_g * k_a + 7) // 8) if epilogue == "sign" else (count, k_g, k_a)


def empty_result(count: int, k_g: int, k_a: int, epilogue: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised values in the epilogue's dtype, and a float32 scale ``[B]`` for "int8", else ``[0]``."""
    values = torch.empty(result_shape(count, k_g, k_a, epilogue), dtype=EPILOGUES[epilogue], device=device)
    return values, torch.empty(count if epilogue == "int8" else 0, dtype=torch.float32, device=device)
