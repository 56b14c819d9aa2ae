"""Named recipes. ``pyinf.methods()`` lists them; each composes the layers below and holds no mathematics of its own."""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyinf.errors import ConfigError
from pyinf.methods.option_sets import (
    NORMALISER_OPTIONS,
    SOURCE_OPTIONS,
    SUBSPACE_OPTIONS,
    TRACIN_OPTIONS,
    approximation,
)
from pyinf.methods.options import Option, choice, count, flag, number
from pyinf.methods.projected_options import (
    LESS_OPTIONS,
    LOGRA_OPTIONS,
    ONEBIT_OPTIONS,
    TRACKSTAR_OPTIONS,
    TRAK_OPTIONS,
)
from pyinf.methods.sketch_options import FACTORS_OPTIONS, GRASS_OPTIONS, LORIF_OPTIONS, RAPIDIN_OPTIONS

__all__ = ["METHODS", "Method", "get"]


@dataclass(frozen=True)
class Method:
    """What a method is and needs.

    ``factors`` names the curvature it fits (None: none), ``normalise`` divides by both gradient norms, ``kind`` says
    whether it works on gradients or on the tokens themselves. ``solver`` is a key of
    ``pyinf.methods.solved.SOLVERS``: what turns query gradients into preconditioned ones (None: the factors' own
    inverse). ``compressor`` is a key of ``pyinf.store.compress.REGISTRY``: what makes a short row of every gradient.
    ``options`` are the method's own, beside those that every method takes.
    """

    name: str
    summary: str
    source: str
    needs: str
    factors: str | None = None
    normalise: bool = False
    kind: str = "gradient"
    solver: str | None = None
    compressor: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.summary} ({self.source}); needs {self.needs}"


_TOL = Option(1e-2, "a query is solved once its relative residual and its error bound are at most this", number(0, 1))
_FIT_BATCHES = Option(
    None, "batches of training data that make the curvature, drawn with the seed; None: all of them", count(none=True)
)
_CURVATURE = Option(
    "ggn", "ggn: the exact Gauss-Newton matrix; fisher: gradients of the fit's labels", choice("ggn", "fisher")
)
_SYSTEM = {"tol": _TOL, "fit_batches": _FIT_BATCHES, "curvature": _CURVATURE}


_POSITIVE = number(0, none=True)


def _most(default: int) -> Option:
    return Option(default, "iterations, at most", count())


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "ekfac",
            "influence with the eigenvalue-corrected Kronecker-factored curvature, uncompressed",
            "Grosse et al. 2023, arXiv 2308.03296",
            "two passes to fit, one to score",
            factors="ekfac",
            options=approximation("ekfac", "ec_shampoo", "ec_tkfac"),
        ),
        Method(
            "kfac",
            "influence with the Kronecker-factored curvature, uncompressed",
            "Martens & Grosse 2015, arXiv 1503.05671",
            "one pass to fit, one to score",
            factors="kfac",
            options=approximation("kfac", "tkfac", "shampoo", "shampoo2"),
        ),
        Method(
            "ec_shampoo",
            "influence with Shampoo's eigenbases and corrected eigenvalues, uncompressed",
            "Gupta et al. 2018, arXiv 1802.09568; George et al. 2018, arXiv 1806.03884",
            "two passes to fit, one to score",
            factors="ec_shampoo",
        ),
        Method(
            "ekfac_subspace",
            "EK-FAC with a Newton step in the span of sampled gradients, across layers",
            "pyinf (docs/curvatures.md)",
            "two passes to fit, one to score, and the sampled gradients",
            factors="ekfac",
            solver="subspace",
            options={**approximation("ekfac", "ec_shampoo", "ec_tkfac"), **SUBSPACE_OPTIONS},
        ),
        Method(
            "diagonal",
            "influence with the diagonal of the Fisher matrix",
            "Kirkpatrick et al. 2017, arXiv 1612.00796",
            "one pass to fit, one to score",
            factors="diagonal",
        ),
        Method(
            "grad_dot",
            "dot product of gradients: influence with the identity for curvature",
            "Pruthi et al. 2020 (TracIn, last checkpoint), arXiv 2002.08484",
            "one pass to score",
            options=NORMALISER_OPTIONS,
        ),
        Method(
            "grad_cos",
            "cosine of gradients, in [−1, 1]",
            "Barshan et al. 2020, arXiv 2003.11630",
            "one pass to score",
            normalise=True,
        ),
        Method(
            "ekfac_cg",
            "EK-FAC refined by block conjugate gradients on the exact Gauss-Newton matrix, to a tolerance",
            "Grosse et al. 2023, arXiv 2308.03296; O'Leary 1980",
            "two passes to fit, one to score, and curvature products until tol holds",
            factors="ekfac",
            solver="cg",
            options={
                **_SYSTEM,
                "max_iterations": _most(200),
                "block": Option(True, "queries search one shared Krylov space", flag),
                "preconditioner_damping": Option(
                    10.0, "damping of the preconditioner, times the mean eigenvalue; at least the system's", number(0)
                ),
            },
        ),
        Method(
            "cg",
            "conjugate gradients on the exact Gauss-Newton matrix, without a preconditioner",
            "Martens 2010 (Hessian-free optimization)",
            "one pass to fit the damping, one to score, and curvature products until tol holds",
            factors="diagonal",
            solver="cg",
            options={
                **_SYSTEM,
                "max_iterations": _most(1000),
                "block": Option(False, "queries search one shared Krylov space", flag),
            },
        ),
        Method(
            "ekfac_astra",
            "EK-FAC refined by preconditioned steps with momentum on sampled curvature",
            "Wang et al. 2025 (ASTRA), arXiv 2507.14740",
            "two passes to fit, one to score, and curvature products of a sampled batch a step",
            factors="ekfac",
            solver="astra",
            options={
                **_SYSTEM,
                "max_iterations": _most(200),
                "batch": Option(256, "sequences sampled a step; all of them where there are no more", count()),
                "step": Option(None, "step size; None: one over the largest preconditioned eigenvalue", _POSITIVE),
                "momentum": Option(0.9, "share of the last step that is taken again", number(0, 1, inclusive=True)),
                "decay": Option(0.5, "factor of the step size every decay_every iterations", number(0, 1.0001)),
                "decay_every": Option(50, "iterations between decays", count()),
            },
        ),
        Method(
            "lissa",
            "stochastic Neumann series, its scale, batch and depth set from the spectrum",
            "Agarwal et al. 2017, arXiv 1602.03943; Klochkov & Liu 2024, arXiv 2409.17357",
            "one pass to fit the damping, one to score, and curvature products of a sampled batch a step",
            factors="diagonal",
            solver="lissa",
            options={
                **_SYSTEM,
                "max_iterations": _most(1000),
                "scale": Option(None, "divisor of the curvature; None: 1.1 times its largest eigenvalue", _POSITIVE),
                "batch": Option(None, "sequences a step; None: by trace and largest eigenvalue", count(none=True)),
            },
        ),
        Method(
            "neumann",
            "Neumann series on the whole curvature, nothing sampled",
            "Koh & Liang 2017, arXiv 1703.04730",
            "one pass to fit the damping, one to score, and curvature products until tol holds",
            factors="diagonal",
            solver="neumann",
            options={
                **_SYSTEM,
                "max_iterations": _most(1000),
                "scale": Option(None, "divisor of the curvature; None: 1.1 times its largest eigenvalue", _POSITIVE),
            },
        ),
        Method(
            "arnoldi",
            "the curvature's leading eigenvectors from a Krylov space, the rest dropped",
            "Schioppa et al. 2022, arXiv 2112.03052",
            "one pass to fit the damping, one to score, and one curvature product a step",
            factors="diagonal",
            solver="arnoldi",
            options={
                **_SYSTEM,
                "steps": Option(60, "Krylov steps", count()),
                "rank": Option(None, "eigenvectors kept; None: all that the steps found", count(none=True)),
                "complement": Option(False, "keep the rest of the space, as if its curvature were zero", flag),
            },
        ),
        Method(
            "datainf",
            "the mean of single examples' inverses for the inverse of their mean, layer by layer",
            "Kwon et al. 2024, arXiv 2310.00902",
            "one pass to fit the damping, one for the gradients, one to score",
            factors="diagonal",
            solver="datainf",
            options={"fit_batches": _FIT_BATCHES},
        ),
        Method(
            "hyperinf",
            "one side of each layer's gradients, inverted by the Schulz iteration",
            "Zhou et al. 2024, arXiv 2410.05090",
            "one pass to fit the damping, one for the gradients, one to score",
            factors="diagonal",
            solver="hyperinf",
            options={
                "fit_batches": _FIT_BATCHES,
                "side": Option("output", "which side of the gradients makes the matrix", choice("output", "input")),
            },
        ),
        Method(
            "exact",
            "the damped system solved directly: dense Gauss-Newton matrix, or Woodbury on the examples' Gram matrix",
            "Koh & Liang 2017, arXiv 1703.04730",
            "one pass to fit the damping, the matrix in memory, one pass to score",
            factors="diagonal",
            solver="exact",
            options={
                **_SYSTEM,
                "limit": Option(10_000, "traced parameters, at most, for the dense matrix", count()),
            },
        ),
        Method(
            "tracin",
            "dot products of gradients, summed over checkpoints of the training run",
            "Pruthi et al. 2020, arXiv 2002.08484",
            "checkpoints; one pass a checkpoint to score",
            solver="checkpoints",
            options=TRACIN_OPTIONS,
        ),
        Method(
            "source",
            "influence by approximate unrolling of the training run (plain SGD or Adam)",
            "Bae et al. 2024, arXiv 2405.12186",
            "checkpoints; two passes a checkpoint to fit, one to score",
            solver="checkpoints",
            options=SOURCE_OPTIONS,
        ),
        Method(
            "logra",
            "gradients projected on both sides, under the curvature of the projected ones",
            "Choe et al. 2024, arXiv 2405.13954",
            "one pass for the rows (and one for kfac or ekfac curvature, or the fit of factors)",
            compressor="logra",
            options=LOGRA_OPTIONS,
        ),
        Method(
            "trak",
            "a flat random projection of the gradient, the features' Gram inverse, a mean over checkpoints",
            "Park et al. 2023, arXiv 2303.14186",
            "one pass a checkpoint for the rows",
            compressor="trak",
            options=TRAK_OPTIONS,
        ),
        Method(
            "trackstar",
            "cosine of gradients over the optimiser's root mean square, projected, under a mixed curvature",
            "Chang et al. 2024, arXiv 2410.17413",
            "the optimiser's second moments or a pass for an estimate; one pass for the rows",
            compressor="trackstar",
            options=TRACKSTAR_OPTIONS,
        ),
        Method(
            "less",
            "cosines of projected Adam directions with projected query gradients, over checkpoints",
            "Xia et al. 2024, arXiv 2402.04333",
            "the optimiser's moments or a pass a checkpoint for an estimate; one pass a checkpoint for the rows",
            compressor="less",
            options=LESS_OPTIONS,
        ),
        Method(
            "onebit",
            "EK-FAC's strongest whitened coordinates, rotated, one bit each",
            "EOGP (eigenbasis-corrected one-bit gradient projection), 2026",
            "two passes to fit, a sampled one for principal directions, one for the rows",
            factors="ekfac",
            compressor="onebit",
            options=ONEBIT_OPTIONS,
        ),
        Method(
            "grass",
            "gradients cut to some coordinates, then a sparse random projection, under their second moment",
            "Hu et al. 2025, arXiv 2505.18976",
            "one pass for the rows (and one over sampled examples for selective masks)",
            compressor="grass",
            options=GRASS_OPTIONS,
        ),
        Method(
            "rapidin",
            "dot products of the whole gradient, shuffled, signed and summed in blocks",
            "Lin et al. 2024, arXiv 2405.11724",
            "one pass for the rows; four bytes a traced parameter",
            compressor="rapidin",
            options=RAPIDIN_OPTIONS,
        ),
        Method(
            "lorif",
            "projected gradients kept as a few outer products, under a low-rank curvature",
            "LoRIF 2026, arXiv 2601.21929",
            "one pass for the rows",
            compressor="lorif",
            options=LORIF_OPTIONS,
        ),
        Method(
            "factors",
            "gradients kept as a few outer products, unprojected; queries under any fitted factors",
            "pyinf (docs/sketches.md)",
            "one pass for the rows (and the fit of factors, where a curvature is wanted)",
            compressor="factors",
            options=FACTORS_OPTIONS,
        ),
        Method(
            "bm25",
            "lexical overlap of the texts (Okapi BM25); uses no model",
            "Robertson & Zaragoza 2009",
            "the texts or token ids",
            kind="tokens",
        ),
    )
}


def get(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ConfigError: unknown; the nearest names are shown.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(str(name), METHODS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"unknown method '{name}'; {hint}available: {', '.join(METHODS)}")


class _Callable(types.ModuleType):
    """Lets ``pyinf.methods()`` be the public listing although ``pyinf.methods`` is a package."""

    def __call__(self) -> dict[str, str]:
        """Name → one-line summary, source and what the method needs."""
        return {name: str(method) for name, method in METHODS.items()}


sys.modules[__name__].__class__ = _Callable
