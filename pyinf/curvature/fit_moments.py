"""Fitting TKFAC, Shampoo and their eigenvalue-corrected forms: the passes of K-FAC with other second moments."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from pyinf import progress
from pyinf.capture import PassSource
from pyinf.checkpoint import Checkpoint
from pyinf.curvature.blocks import block_eigenbases, block_eigenbasis, check_block, factor_label
from pyinf.curvature.factors import Factors, InputFactor
from pyinf.curvature.fit import (
    _assemble,
    _bases_in,
    _bases_out,
    _covariance_pass,
    _groups_state,
    _lambda_pass,
    _SquaredGradients,
    fit_factors,
)
from pyinf.curvature.moments import Moments, ShampooMoments, TraceMoments
from pyinf.errors import ConfigError

__all__ = [
    "MOMENT_CURVATURES",
    "fit_any",
    "fit_moments",
    "planned_kind",
    "shampoo_eigenvalues",
    "trace_restricted_eigenvalues",
]

MOMENT_CURVATURES = {
    "tkfac": "trace-restricted K-FAC: the trace of every layer's curvature is exact",
    "ec_tkfac": "TKFAC's eigenbases, eigenvalues corrected",
    "shampoo": "E[GGᵀ]^½ ⊗ E[GᵀG]^½, scaled to the exact trace",
    "shampoo2": "E[GGᵀ] ⊗ E[GᵀG], scaled to the exact trace",
    "ec_shampoo": "Shampoo's eigenbases, eigenvalues corrected",
}


def _scaled_product(d_S: Tensor, d_A: Tensor, trace: Tensor) -> Tensor:
    """``trace · (d_S/Σd_S)(d_A/Σd_A)ᵀ``; zero where a side is zero."""
    product = torch.outer(d_S, d_A)
    total = d_S.sum() * d_A.sum()
    return product.mul_(torch.where(total > 0, trace / total, torch.zeros_like(total)))


def trace_restricted_eigenvalues(d_S: Tensor, d_A: Tensor, tokens_per_sequence: float) -> Tensor:
    """TKFAC's ``Λ = n δ (d_S/Σd_S)(d_A/Σd_A)ᵀ``, ``[d_out, d_in(+1)]``, were tokens independent.

    ``d_A``, ``d_S`` are the eigenvalues of ``E[|g|² a aᵀ]`` and ``E[|a|² g gᵀ]`` (means over counted positions), ``δ =
    Σd_A = Σd_S = E[|a|²|g|²]`` and ``n`` the counted positions of a mean sequence, so that ``ΣΛ`` is the sum over
    positions of the exact trace. Source: Gao et al. 2021, arXiv 2011.10741, equation 9.
    """
    return _scaled_product(d_S, d_A, d_A.sum() * tokens_per_sequence)


def shampoo_eigenvalues(d_S: Tensor, d_A: Tensor, power: float) -> Tensor:
    """Shampoo's ``Λ = E‖G‖² (d_S^p/Σd_S^p)(d_A^p/Σd_A^p)ᵀ``, ``[d_out, d_in(+1)]``.

    ``d_A``, ``d_S`` are the eigenvalues of ``E[GᵀG]`` and ``E[GGᵀ]`` (means over sequences), ``Σd_A = Σd_S = E‖G‖²``.
    With ``p = ½`` this is the curvature whose inverse square root Shampoo applies (Gupta et al. 2018, arXiv 1802.09568)
    in units of a second moment and with its exact trace; with ``p = 1`` it is one power-iteration step towards the
    nearest Kronecker product (Morwani et al. 2024, arXiv 2406.17748), where the scale ``1/tr`` comes out by itself.
    """
    return _scaled_product(d_S.pow(power), d_A.pow(power), d_A.sum())


def _moments_of(kind: str) -> Moments:
    if kind not in MOMENT_CURVATURES:
        raise ConfigError(f"unknown curvature '{kind}'; choose one of {', '.join(MOMENT_CURVATURES)}")
    return TraceMoments() if kind.endswith("tkfac") else ShampooMoments()


def fit_moments(
    source: PassSource,
    kind: str,
    loss: str,
    sequences: int,
    eigensolver: str = "auto",
    checkpoint: Checkpoint | None = None,
    keep_captured: bool = False,
    keep_rotated: bool = False,
    timings: dict[str, float] | None = None,
    factor_block: int | None = None,
) -> Factors:
    """Fit TKFAC or Shampoo factors from the batches of ``source``; arguments as :func:`pyinf.curvature.fit_factors`.

    Each layer gets an input factor of its own, also where several layers read one input: its second moment is weighted
    by the layer's gradients.

    Args:
        kind: a key of :data:`MOMENT_CURVATURES`; the ``ec_`` kinds make a second pass, for ``Λ = E[(U_Sᵀ G U_A)²]``.
        factor_block: the widest factor decomposed in one piece; wider ones are split into diagonal blocks.

    Raises:
        ConfigError: unknown kind, or a block below 1.
        NonFiniteError: a moment is NaN or infinite; names the layer.

    Sources: Gao et al. 2021 (arXiv 2011.10741), Gupta et al. 2018 (arXiv 1802.09568), Morwani et al. 2024 (arXiv
    2406.17748), George et al. 2018 (arXiv 1806.03884) for the correction.
    """
    moments, limit = _moments_of(kind), check_block(factor_block)
    timings = timings if timings is not None else {}
    loaded = checkpoint.load() if checkpoint is not None else None
    state, sets = loaded if loaded is not None else ({"stage": "covariance", "batch": 0, "rows": {}}, {})
    # One basis a layer on the input side, so every layer is a group of its own from here on.
    source.session.groups.of_layer = {name: name for name in source.session.selection.names}
    device = source.session.device
    corrected_kind = kind.startswith("ec_")
    if state["stage"] == "covariance":
        if sets:
            moments.restore(sets["covariance"], state["rows"], device)
        _covariance_pass(source, moments, loss, int(state["batch"]), checkpoint, keep_captured, timings)
        rows = moments.rows
        inputs, bases, spectra = _decompose(moments, sequences, eigensolver, limit, timings)
        state = {"stage": "lambda", "batch": 0, "rows": dict(rows), "groups": _groups_state(source)}
        if checkpoint is not None and corrected_kind:
            checkpoint.save(state, drop=("covariance",), bases=_bases_out(inputs, bases, spectra))
    else:
        rows = Counter(state["rows"])
        inputs, bases, spectra = _bases_in(sets["bases"], rows, device)
    if corrected_kind:
        squares = _SquaredGradients(inputs, bases, keep_rotated)
        squares.rows = rows
        if "lambda" in sets:
            squares.Lam = {k: v.to(device) for k, v in sets["lambda"].items()}
        _lambda_pass(source, squares, loss, int(state["batch"]), checkpoint, False, timings)
        corrected = {name: Lam.div_(max(1, sequences)) for name, Lam in squares.Lam.items()}
    else:
        corrected = {
            name: _kronecker(kind, inputs[name], spectra[name], rows[f"S:{name}"], sequences) for name in bases
        }
    return _assemble(source, kind, inputs, bases, spectra, corrected, rows, sequences)


def planned_kind(kind: str | None) -> str | None:
    """The K-FAC curvature whose passes and shapes those of ``kind`` are."""
    return kind if kind not in MOMENT_CURVATURES else "ekfac" if kind.startswith("ec_") else "kfac"


def fit_any(source: PassSource, kind: str, *args: Any, **options: Any) -> Factors:
    """Fit factors of any kind; arguments as :func:`pyinf.curvature.fit.fit_factors`."""
    return (fit_moments if kind in MOMENT_CURVATURES else fit_factors)(source, kind, *args, **options)


def _decompose(
    moments: Moments, sequences: int, solver: str, limit: int | None, timings: dict[str, float]
) -> tuple[dict[str, InputFactor], dict[str, Tensor | None], dict[str, Tensor | None]]:
    started = time.perf_counter()
    inputs: dict[str, InputFactor] = {}
    bases: dict[str, Tensor | None] = {}
    spectra: dict[str, Tensor | None] = {}
    with progress.stage("eigenbases", 2 * len(moments.A), "factors") as running:
        matrices: dict[str, Tensor] = {}
        for name in moments.A:
            divisor = moments.divisor(name, sequences)
            matrices[factor_label("A", name)] = moments.A[name].div_(divisor)
            matrices[factor_label("S", name)] = moments.S[name].div_(divisor)
        ready = block_eigenbases(matrices, solver, limit)
        for name in list(moments.A):
            del moments.A[name], moments.S[name]
            input_side, output_side = factor_label("A", name), factor_label("S", name)
            found = [
                ready.pop(side, None) or block_eigenbasis(matrices.pop(side), solver, side, limit)
                for side in (input_side, output_side)
            ]
            inputs[name] = InputFactor(*found[0], moments.rows[f"A:{name}"])
            bases[name], spectra[name] = found[1]
            running.advance(2)
    timings["eigendecomposition"] = timings.get("eigendecomposition", 0.0) + time.perf_counter() - started
    return inputs, bases, spectra


def _kronecker(kind: str, shared: InputFactor, spectrum: Tensor | None, rows: int, sequences: int) -> Tensor:
    assert spectrum is not None and shared.eigenvalues is not None
    if kind == "tkfac":
        return trace_restricted_eigenvalues(spectrum, shared.eigenvalues, rows / max(1, sequences))
    return shampoo_eigenvalues(spectrum, shared.eigenvalues, 0.5 if kind == "shampoo" else 1.0)
