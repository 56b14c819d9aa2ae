"""Which kind of run a method needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinf.methods import Method
from pyinf.methods.solved import SolvedRun
from pyinf.methods.subspace import SubspaceRun
from pyinf.methods.trajectory import TrajectoryRun, follows_training

__all__ = ["run_of"]


def run_of(method: Method, options: Mapping[str, Any]) -> type[SolvedRun]:
    """The class that fits and scores it."""
    if follows_training(method.name, options):
        return TrajectoryRun
    return SubspaceRun if method.solver == "subspace" else SolvedRun
