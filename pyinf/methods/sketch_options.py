"""Options of the sketching and factoring methods: GraSS, RapidIn, LoRIF, factor rows."""

from __future__ import annotations

from pyinf.methods.options import choice, count, flag, number
from pyinf.methods.projected_options import options_of
from pyinf.store.compress import FactorRows, GraSS, LoRIF, RapidIn

__all__ = ["FACTORS_OPTIONS", "GRASS_OPTIONS", "LORIF_OPTIONS", "RAPIDIN_OPTIONS"]

GRASS_OPTIONS = options_of(
    GraSS.defaults,
    {
        "factorised": ("FactGraSS: masks of every layer's outputs and inputs; false: one mask of all layers", flag),
        "k": ("values of a row: of a layer with factorised, else of all", count()),
        "mask_g": ("outputs of a layer that are kept (factorised)", count()),
        "mask_a": ("inputs of a layer that are kept (factorised)", count()),
        "mask_size": ("coordinates that the one mask keeps; None: 4k", count(none=True)),
        "mask": ("random; selective: learned from sampled training gradients", choice("random", "selective")),
        "mask_examples": ("training examples that a selective mask is learned from", count(8)),
        "mask_steps": ("steps of Adam for a selective mask", count()),
        "mask_penalty": ("weight of a selective mask's mean size", number(0, inclusive=True)),
        "nnz": ("non-zeros a coordinate in the sparse transform", count()),
        "curvature": ("gram: second moment of the rows; none", choice("gram", "none")),
    },
)
RAPIDIN_OPTIONS = options_of(
    RapidIn.defaults,
    {
        "k": ("values of a row", count()),
        "rounds": ("times that rows and columns are shuffled", count()),
        "similarity": ("dot or cosine", choice("dot", "cosine")),
    },
)
LORIF_OPTIONS = options_of(
    LoRIF.defaults,
    {
        "shrink": ("f: both sides are projected to a share 1/f; 1: not at all", count()),
        "rank": ("c: outer products a row and layer", count()),
        "curvature_rank": ("r: eigenvectors of each layer's curvature", count()),
        "damping_unit": (
            "damping is relative to the mean of the r + 10 largest eigenvalues (leading) or of all (mean)",
            choice("leading", "mean"),
        ),
    },
)
FACTORS_OPTIONS = options_of(
    FactorRows.defaults,
    {
        "rank": ("c: outer products a row and layer", count()),
        "curvature": ("inverse applied to the queries: none, ekfac, kfac", choice("none", "ekfac", "kfac")),
    },
)
