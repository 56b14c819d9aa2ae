"""Factors, bases and corrected eigenvalues of the curvature, and the inverse they give."""

from pyinf.curvature.blocks import check_block
from pyinf.curvature.eigen import EIGENSOLVERS, eigenbasis, residuals
from pyinf.curvature.factors import Factors, InputFactor, LayerFactor, absolute_damping, check_damping
from pyinf.curvature.fit_moments import MOMENT_CURVATURES, fit_moments, planned_kind
from pyinf.curvature.fit_moments import fit_any as fit_factors

__all__ = [
    "EIGENSOLVERS",
    "MOMENT_CURVATURES",
    "Factors",
    "InputFactor",
    "LayerFactor",
    "absolute_damping",
    "check_block",
    "check_damping",
    "eigenbasis",
    "fit_factors",
    "fit_moments",
    "planned_kind",
    "residuals",
]
