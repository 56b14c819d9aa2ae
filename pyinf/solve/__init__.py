"""Inverse-Hessian-vector products to a tolerance: curvature products, solvers, certificates."""

from pyinf.solve.certificate import Convergence, HeldBatch, Measured, entries, hold, measure, verdict
from pyinf.solve.cg import block_cg, cg
from pyinf.solve.closed import datainf, dense_matrix, hyperinf, schulz, woodbury
from pyinf.solve.fisher import FisherOperator, GradientRows
from pyinf.solve.ggn import GGNOperator
from pyinf.solve.iterative import Schedule, lissa_settings, power_iteration, richardson, trace
from pyinf.solve.krylov import arnoldi, lanczos
from pyinf.solve.layout import Layout
from pyinf.solve.operators import Damped, MatrixOperator, Operator, Outcome, Solution

__all__ = [
    "Convergence",
    "Damped",
    "FisherOperator",
    "GGNOperator",
    "GradientRows",
    "HeldBatch",
    "Layout",
    "MatrixOperator",
    "Measured",
    "Operator",
    "Outcome",
    "Schedule",
    "Solution",
    "arnoldi",
    "block_cg",
    "cg",
    "datainf",
    "dense_matrix",
    "entries",
    "hold",
    "hyperinf",
    "lanczos",
    "lissa_settings",
    "measure",
    "power_iteration",
    "richardson",
    "schulz",
    "trace",
    "verdict",
    "woodbury",
]
