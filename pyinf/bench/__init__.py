"""Are the kernels right, and how fast are they? What ``pyinf bench``, ``pyinf doctor --verify`` and the scripts of
``benchmarks/`` share: inputs and work of every op, verification against float64, timing.
"""

from __future__ import annotations

from pyinf.bench.cases import LAYOUTS, OPS, Inputs, Op
from pyinf.bench.measure import Row, Target, measure, targets, write_csv
from pyinf.bench.providers import PROVIDERS, parse_providers
from pyinf.bench.shapes import MODELS, ODD, Shape, model_shapes, parse_shape
from pyinf.bench.timing import Clock, Timing, ceilings
from pyinf.bench.verify import DTYPES, Case, Outcome, cases, check, verified_ops, verify_all

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "MODELS",
    "ODD",
    "OPS",
    "PROVIDERS",
    "Case",
    "Clock",
    "Inputs",
    "Op",
    "Outcome",
    "Row",
    "Shape",
    "Target",
    "Timing",
    "cases",
    "ceilings",
    "check",
    "measure",
    "model_shapes",
    "parse_providers",
    "parse_shape",
    "targets",
    "verified_ops",
    "verify_all",
    "write_csv",
]
