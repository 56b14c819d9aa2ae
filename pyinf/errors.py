"""Errors of pyinf. Every message names the thing that is wrong and what to do about it, in one or two lines."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackendUnavailableError",
    "ConfigError",
    "DataError",
    "ModelError",
    "ModuleSelectionError",
    "NonFiniteError",
    "PyinfError",
    "ResourceError",
    "SolverError",
]


class PyinfError(Exception):
    """Base of every error that pyinf raises on purpose. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class ConfigError(PyinfError, ValueError):
    """An option has a value that cannot work (damping ≤ 0, unknown method, unknown configuration key)."""

    exit_code = 2


class DataError(PyinfError, ValueError):
    """A dataset is empty, lacks a field, or holds token ids or lengths that the model cannot take."""

    exit_code = 3


class ModelError(PyinfError, ValueError):
    """A model cannot be loaded, or cannot be traced as asked."""

    exit_code = 4


class ModuleSelectionError(ModelError):
    """No layer matched the selection, or a layer asked for by name is of an unsupported kind."""


class NonFiniteError(PyinfError, ArithmeticError):
    """An activation, gradient, factor or score is NaN or infinite; names the layer and the example."""

    exit_code = 5


class ArtifactError(PyinfError, OSError):
    """A file or directory on disk is damaged, truncated, tampered with, or belongs to something else."""

    exit_code = 6


class ResourceError(PyinfError, RuntimeError):
    """The plan needs more memory or disk than there is."""

    exit_code = 7


class BackendUnavailableError(PyinfError, RuntimeError):
    """A backend was forced that cannot serve the call; the message carries its reason."""

    exit_code = 8


class SolverError(PyinfError, ArithmeticError):
    """An iterative solver diverged, or met an operator that is not positive definite; says what to change."""

    exit_code = 9
