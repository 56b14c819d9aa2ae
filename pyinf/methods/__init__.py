"""Named recipes. ``pyinf.methods()`` lists them; each composes the layers below and holds no mathematics of its own."""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyinf.errors import ConfigError
from pyinf.methods.options import Option, choice, count, flag, number

__all__ = ["METHODS", "Method", "get"]


@dataclass(frozen=True)
class Method:
    """What a method is and needs.

    ``factors`` names the curvature it fits (None: none), ``normalise`` divides by both gradient norms, ``kind`` says
    whether it works on gradients or on the tokens themselves. ``solver`` is a key of
    ``pyinf.methods.solved.SOLVERS``: what turns query gradients into preconditioned ones (None: the factors' own
    inverse). ``options`` are the method's own, beside those that every method takes.
    """

    name: str
    summary: str
    source: str
    needs: str
    factors: str | None = None
    normalise: bool = False
    kind: str = "gradient"
    solver: str | None = None
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
        ),
        Method(
            "kfac",
            "influence with the Kronecker-factored curvature, uncompressed",
            "Martens & Grosse 2015, arXiv 1503.05671",
            "one pass to fit, one to score",
            factors="kfac",
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
