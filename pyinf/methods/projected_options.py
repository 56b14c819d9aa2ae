"""Options of the projected methods; their defaults are those of the compressors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinf.methods.option_sets import _numbers, _share, _sources
from pyinf.methods.options import Check, Option, choice, count, flag, number
from pyinf.store.compress import Less, LoGra, OneBit, TrackStar, Trak
from pyinf.store.quantise import FORMATS

__all__ = ["LESS_OPTIONS", "LOGRA_OPTIONS", "ONEBIT_OPTIONS", "TRACKSTAR_OPTIONS", "TRAK_OPTIONS", "options_of"]

_DISTRIBUTION = ("elements of the projection: rademacher (±1) or normal", choice("rademacher", "normal"))
_PROJECTION = (
    "rademacher or normal (dense), or sparse (SJLT: every coordinate to one bucket)",
    choice("rademacher", "normal", "sparse"),
)
_CHECKPOINTS = ("safetensors files, directories of them, or callables; None: the model", _sources)
_SECOND = (
    "the optimiser's second moments by parameter (one a checkpoint); None: the mean square of training gradients",
    _sources,
)


def options_of(
    defaults: Mapping[str, Any], checks: Mapping[str, tuple[str, Check]], format: str = "float32"
) -> dict[str, Option]:
    """An :class:`Option` for each of a compressor's ``defaults``, and ``format``, how the rows are held."""
    out = {name: Option(default, *checks[name]) for name, default in defaults.items()}
    out["format"] = Option(format, "how rows are held: " + ", ".join(FORMATS), choice(*FORMATS))
    return out


LOGRA_OPTIONS = options_of(
    LoGra.defaults,
    {
        "rank": ("k: rows are k·k values a layer", count()),
        "init": (
            "random (Philox) or factors (leading eigenvectors of K-FAC's factors)",
            choice("random", "factors"),
        ),
        "curvature": (
            "raw: second moment of the rows; kfac, ekfac: Kronecker-factored in the projected space, one more pass; "
            "none",
            choice("raw", "kfac", "ekfac", "none"),
        ),
        "normalise": (
            "none; relatif: divided by the root of the training example's self-influence; cosine: by both",
            choice("none", "relatif", "cosine"),
        ),
        "distribution": _DISTRIBUTION,
    },
)
TRAK_OPTIONS = options_of(
    Trak.defaults,
    {
        "rank": ("k: values of a row (of a layer, unless joint)", count()),
        "joint": ("one projection of all layers together; false: one for every layer", flag),
        "projection": _PROJECTION,
        "checkpoints": _CHECKPOINTS,
        "output": (
            "loss: gradients of the training loss; margin: of log(p/(1−p)), weighted with 1−p as in the paper",
            choice("loss", "margin"),
        ),
    },
)
TRACKSTAR_OPTIONS = options_of(
    TrackStar.defaults,
    {
        "rank": ("k: rows are k·k values a layer", count()),
        "mix": ("share of the queries' own second moment in the curvature, in [0, 1]", _share),
        "moments": (
            "factored: row and column means of the second moments (Adafactor's); full: all of them",
            choice("factored", "full"),
        ),
        "second_moments": _SECOND,
        "epsilon": ("ε beside √v", number(0, inclusive=True)),
        "distribution": _DISTRIBUTION,
    },
)
LESS_OPTIONS = options_of(
    Less.defaults,
    {
        "rank": ("k: values of a row and checkpoint", count()),
        "projection": _PROJECTION,
        "checkpoints": _CHECKPOINTS,
        "learning_rates": ("weights of the checkpoints: one number, or one each; None: 1", _numbers),
        "first_moments": ("the optimiser's first moments by parameter; None: the mean training gradient", _sources),
        "second_moments": _SECOND,
        "beta1": ("Adam's β₁", number(0, 1, inclusive=True)),
        "beta2": ("Adam's β₂", number(0, 1, inclusive=True)),
        "epsilon": ("ε under the root", number(0, inclusive=True)),
        "loss_unit": (
            "unit of the gradients that meet the moments: token (divided by the example's labels) or sequence",
            choice("token", "sequence"),
        ),
    },
)
ONEBIT_OPTIONS = options_of(
    OneBit.defaults,
    {
        "approximation": (
            "the curvature that gives bases and eigenvalues: ekfac, ec_shampoo, ec_tkfac, kfac",
            choice("ekfac", "ec_shampoo", "ec_tkfac", "kfac"),
        ),
        "coordinates": ("m: coordinates kept of a layer, those of the largest eigenvalues", count()),
        "rotation": (
            "pca: principal directions of sampled rows; hadamard: a drawn Hadamard rotation; none",
            choice("pca", "hadamard", "none"),
        ),
        "rank": ("k: values of a layer after the rotation", count()),
        "pca_sequences": ("training examples sampled for the principal directions; k is at most that", count()),
        "spread": ("turn the principal directions among themselves, so that one scale suits them all", flag),
    },
    format="1bit",
)
