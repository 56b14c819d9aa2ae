"""The rows of the board: what runs, with which options, and which dampings it may choose from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FEW = (0.1, 1.0, 10.0)
MANY = (1e-5, 1e-4, 0.001, 0.01, 0.1, 1.0)


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


# Refined rows, of both libraries, have one budget: so many iterations, this many training sequences in the curvature's
# products (four batches of 32: 2,048 tokens each), and the same dampings to choose from on the same tuning queries.
DOCUMENTS, _FIT_BATCHES = 128, 4
ITERATIONS = (1, 5, 20)


def _refined() -> dict[str, Row]:
    rows = {}
    for steps in ITERATIONS:
        own = {"max_iterations": steps, "tol": 1e-4, "fit_batches": _FIT_BATCHES}
        rows[f"ekfac_cg_{steps}"] = Row("pyinf", "ekfac_cg", FEW, own)
        rows[f"bergson_ekfac_cg_{steps}"] = Row("bergson", "ekfac_cg", FEW, {"steps": steps, "documents": DOCUMENTS})
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
    "exact_empirical": Row("pyinf", "exact", options={"curvature": "fisher", "fisher": "empirical"}),
    "exact_sampled": Row("pyinf", "exact", options={"curvature": "fisher"}),
    **_refined(),
    "ekfac_astra": Row("pyinf", "ekfac_astra", FEW, {"max_iterations": 20, "batch": 32, "fit_batches": _FIT_BATCHES}),
    "lissa": Row("pyinf", "lissa", FEW, {"max_iterations": 60, "fit_batches": _FIT_BATCHES}),
    "kronfluence_ekfac": Row("kronfluence", "ekfac"),
    "bergson_ekfac": Row("bergson", "ekfac"),
}
