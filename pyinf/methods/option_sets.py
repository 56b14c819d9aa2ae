"""Options that several methods share, or that are long: curvatures, the subspace, trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyinf.errors import ConfigError
from pyinf.methods.options import Option, choice, count, number

__all__ = ["NORMALISER_OPTIONS", "SOURCE_OPTIONS", "SUBSPACE_OPTIONS", "TRACIN_OPTIONS", "approximation"]


def approximation(*kinds: str) -> dict[str, Option]:
    """Which curvature is fitted, the method's own first; see ``docs/curvatures.md``."""
    return {"approximation": Option(kinds[0], "the curvature fitted: " + ", ".join(kinds), choice(*kinds))}


def _share(name: str, value: Any) -> float | None:
    found = number(0, none=True, inclusive=True)(name, value)
    if found is not None and found > 1:
        raise ConfigError(f"{name} is {value!r}; it must lie in [0, 1]")
    return found


SUBSPACE_OPTIONS = {
    "subspace_gradients": Option(256, "training gradients that span the subspace", count()),
    "subspace_rank": Option(None, "leading directions kept of them; None: all", count(none=True)),
    "subspace_moments": Option(
        None, "training gradients outside the span that give the curvature in it: with sampled labels, so many "
        "sequences under another draw (None: all); with the data's, so many others (None: all); 0: those of the span",
        count(0, none=True),
    ),
    "subspace_curvature": Option(
        "gradients", "gradients: the curvature in the span comes from sampled gradients; ggn: from one exact "
        "Gauss-Newton product a direction", choice("gradients", "ggn"),
    ),
    "subspace_shrinkage": Option(None, "towards EK-FAC's expectation, in [0, 1]; None: estimated", _share),
    "subspace_complement": Option(None, "share of EK-FAC kept outside, in [0, 1]; None: estimated", _share),
}  # fmt: skip


def _sources(name: str, value: Any) -> list[Any] | None:
    """One source of tensors, or a list of them."""
    if value is None:
        return None
    if isinstance(value, (str, Path, Mapping)) or callable(value):
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{name} is {value!r}; give a list of safetensors files, directories of them, or callables")
    return list(value)


def _numbers(name: str, value: Any) -> list[float] | None:
    """One positive number, or a list of them."""
    if value is None:
        return None
    check = number(0)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [check(f"{name}[{i}]", v) for i, v in enumerate(value)]
    return [check(name, value)]


NORMALISER_OPTIONS = {
    "second_moments": Option(
        None, "the optimiser's bias-corrected second moments v by parameter: a safetensors file (or one a checkpoint)",
        _sources,
    ),
    "epsilon": Option(1e-8, "ε of √v + ε", number(0, inclusive=True)),
}  # fmt: skip
_SHARED = {
    "checkpoints": Option(
        None,
        "safetensors files, directories of them, or callables, in the order of training; None: the model",
        _sources,
    ),
    "learning_rates": Option(None, "one number, or one a checkpoint", _numbers),
}
_NORMALISE = {
    **NORMALISER_OPTIONS,
    "normalise": Option(
        "update", "update: the training gradient is divided by √v + ε, as Adam does; both: the query's too",
        choice("update", "both"),
    ),
}  # fmt: skip
TRACIN_OPTIONS = {**_SHARED, **_NORMALISE}
SOURCE_OPTIONS = {
    **_SHARED,
    **NORMALISER_OPTIONS,
    "steps": Option(None, "optimiser steps that each checkpoint stands for: one number, or one a checkpoint", _numbers),
    "segments": Option(
        None, "equal runs of checkpoints that share one curvature; None: one a checkpoint", count(none=True)
    ),
    "momentum": Option(
        0.0, "heavy-ball momentum β: learning rates are multiplied by 1/(1 − β)", number(0, 1, inclusive=True)
    ),
    "loss_unit": Option(
        "token", "what the training loss was a mean over: token (labelled ones; learning rates are divided by their "
        "mean number a sequence) or sequence (of sums over tokens)",
        choice("token", "sequence"),
    ),
    "curvature": Option("ekfac", "ekfac or kfac", choice("ekfac", "kfac")),
}  # fmt: skip
