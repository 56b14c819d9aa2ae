"""Which kind of run a method needs, and which factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pyinf.methods import Method
from pyinf.methods.projected import ProjectedRun
from pyinf.methods.solved import SolvedRun
from pyinf.methods.subspace import SubspaceRun
from pyinf.methods.trajectory import TrajectoryRun, follows_training
from pyinf.store.compress import REGISTRY

__all__ = ["run_of", "with_factors"]


def with_factors(method: Method, options: Mapping[str, Any]) -> Method:
    """The method with the factors that its options ask for."""
    if method.compressor is not None:
        return dataclasses.replace(method, factors=REGISTRY[method.compressor].needs(options))
    return dataclasses.replace(method, factors=options["approximation"]) if "approximation" in options else method


def run_of(method: Method, options: Mapping[str, Any]) -> type[SolvedRun]:
    """The class that fits and scores it."""
    if method.compressor is not None:
        return ProjectedRun
    if follows_training(method.name, options):
        return TrajectoryRun
    return SubspaceRun if method.solver == "subspace" else SolvedRun
