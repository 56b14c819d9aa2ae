"""Factors, bases and corrected eigenvalues of the curvature, and the inverse they give."""

from pyinf.curvature.eigen import EIGENSOLVERS, eigenbasis, residuals
from pyinf.curvature.factors import Factors, InputFactor, LayerFactor, absolute_damping, check_damping
from pyinf.curvature.fit import fit_factors

__all__ = [
    "EIGENSOLVERS",
    "Factors",
    "InputFactor",
    "LayerFactor",
    "absolute_damping",
    "check_damping",
    "eigenbasis",
    "fit_factors",
    "residuals",
]
