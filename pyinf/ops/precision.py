"""How the GPU kernels multiply float32 inputs: said once, by name, and never changed silently."""

from __future__ import annotations

from pyinf.errors import ConfigError

__all__ = ["PRECISIONS", "float32_precision", "set_float32_precision"]

PRECISIONS = ("ieee", "tf32x3", "tf32")
_current = "ieee"


def set_float32_precision(name: str) -> str:
    """Choose how pyinf's kernels multiply float32 inputs; returns the choice before. The default is ``"ieee"``.

    ``"ieee"``: float32 multiply-adds, no tensor cores. ``"tf32x3"``: three tensor-core products, about float32's error
    (7e-8 by operand rounding). ``"tf32"``: one, with the operands rounded to 11 bits of mantissa (3e-4). Sums are
    float32 in all three, and half-precision inputs are not concerned. Plain torch follows its own setting,
    ``torch.set_float32_matmul_precision``. Raises ``ConfigError`` for another name.
    """
    global _current
    if name not in PRECISIONS:
        raise ConfigError(f"unknown float32 precision {name!r}; choose one of: {', '.join(PRECISIONS)}")
    before, _current = _current, name
    return before


def float32_precision() -> str:
    """The setting in force."""
    return _current
