"""The rows of the board: what runs, with which options, and which dampings it may choose from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MANY = (1e-5, 1e-4, 0.001, 0.01, 0.1, 1.0)
WIDE = (0.1, 10.0, 1e3, 1e5)  # dense matrices of rank n among D dimensions: λ is small against eigenvalues until D/n


@dataclass(frozen=True)
class Row:
    """One row: ``library`` runs ``method``; one damping in ``dampings`` means that there is none to choose."""

    library: str
    method: str
    dampings: tuple[float, ...] = MANY
    options: dict[str, Any] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """What the row's files say about it."""
        return {"library": self.library, "method": self.method, "options": self.options}


# Refined rows, of both libraries, have one budget: so many iterations, all training sequences in the curvature's
# products, and the same dampings to choose from on the same tuning queries. A sample of the sequences would damp those
# that are in it and not the others.
TRAIN = 512
ITERATIONS = (1, 3)
_REFINED = (0.1, 10.0)


def _refined() -> dict[str, Row]:
    rows = {}
    for steps in ITERATIONS:
        own = {"max_iterations": steps, "tol": 1e-4, "certify": False}  # bergson measures no residual either
        rows[f"ekfac_cg_{steps}"] = Row("pyinf", "ekfac_cg", _REFINED, own)
        rows[f"bergson_ekfac_cg_{steps}"] = Row("bergson", "ekfac_cg", _REFINED, {"steps": steps, "documents": TRAIN})
    return rows


ROWS: dict[str, Row] = {
    "grad_dot": Row("pyinf", "grad_dot", (0.1,)),
    "grad_cos": Row("pyinf", "grad_cos", (0.1,)),
    "bm25": Row("pyinf", "bm25", (0.1,)),
    "diagonal": Row("pyinf", "diagonal"),
    "kfac": Row("pyinf", "kfac"),
    "ekfac": Row("pyinf", "ekfac"),
    "ec_shampoo": Row("pyinf", "ec_shampoo"),
    "datainf": Row("pyinf", "datainf"),
    "ekfac_subspace": Row("pyinf", "ekfac_subspace"),
    "ekfac_subspace_64": Row("pyinf", "ekfac_subspace", options={"subspace_gradients": 64}),
    "ekfac_subspace_512": Row("pyinf", "ekfac_subspace", options={"subspace_gradients": 512}),
    "shampoo2": Row("pyinf", "kfac", options={"approximation": "shampoo2"}),
    # The damped empirical Fisher matrix, and one of sampled labels, inverted exactly: Woodbury on 512 × 512.
    "exact_empirical": Row("pyinf", "exact", WIDE, {"curvature": "fisher", "fisher": "empirical", "certify": False}),
    "exact_sampled": Row("pyinf", "exact", WIDE, {"curvature": "fisher", "certify": False}),
    **_refined(),
    "ekfac_astra": Row("pyinf", "ekfac_astra", _REFINED, {"max_iterations": 20, "batch": 32}),
    "lissa": Row("pyinf", "lissa", _REFINED, {"max_iterations": 60}),
    "kronfluence_ekfac": Row("kronfluence", "ekfac"),
    "bergson_ekfac": Row("bergson", "ekfac"),
}
