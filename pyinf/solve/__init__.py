"""Inverse-Hessian-vector products to a tolerance: curvature products, solvers, certificates."""

from pyinf.solve.cg import block_cg, cg
from pyinf.solve.ggn import GGNOperator
from pyinf.solve.layout import Layout
from pyinf.solve.operators import Damped, MatrixOperator, Operator, Outcome, Solution

__all__ = [
    "Damped",
    "GGNOperator",
    "Layout",
    "MatrixOperator",
    "Operator",
    "Outcome",
    "Solution",
    "block_cg",
    "cg",
]
