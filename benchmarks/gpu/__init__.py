"""Build, verify and measure the GPU kernels: ``bash benchmarks/gpu.sh`` (docs/benchmarks.md)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def locate_kernels() -> None:
    """Make ``pyinf.triton_kernels`` importable from a checkout that is not installed."""
    import pyinf

    if importlib.util.find_spec("pyinf.triton_kernels") is None:
        pyinf.__path__.append(str(ROOT))
