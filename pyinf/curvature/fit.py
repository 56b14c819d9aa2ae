"""Fitting the factors: covariances, eigenbases, corrected eigenvalues. Streaming, resumable, bit-identical when
resumed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from pyinf import ops, progress
from pyinf.capture import CapturedBatch, Consumer, Layer, LayerSelection, PassSource
from pyinf.checkpoint import Checkpoint
from pyinf.curvature.blocks import block_eigenbases, block_eigenbasis, check_block, factor_label
from pyinf.curvature.eigen import SMALL_FACTOR
from pyinf.curvature.factors import Factors, InputFactor, LayerFactor
from pyinf.curvature.rotate import (
    input_rows,
    rotate_input,
    rotate_output,
    rotated_gradients,
    rotation_is_first,
    working,
)
from pyinf.errors import ArtifactError, ModelError, NonFiniteError

__all__ = ["fit_factors"]


class _Covariances(Consumer):
    """Consumer: ``A += Σ a aᵀ`` per distinct input, ``S += Σ g gᵀ`` per layer; lower triangles."""

    def __init__(self) -> None:
        self.A: dict[str, Tensor] = {}
        self.S: dict[str, Tensor] = {}
        self.rows: Counter[str] = Counter()
        self._small: list[tuple[Tensor, Tensor, bool]] = []

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        if first:
            if group not in self.A:
                self.A[group] = _square(layer.columns, a)
            self._add(self.A[group], a, layer.bias)
            self.rows[f"A:{group}"] += a.shape[0]
        if layer.name not in self.S:
            self.S[layer.name] = _square(layer.d_out, g)
        self._add(self.S[layer.name], g, False)
        self.rows[f"S:{layer.name}"] += g.shape[0]

    def _add(self, total: Tensor, x: Tensor, bias: bool) -> None:
        if ops.grouped.is_small(total):
            self._small.append((total, x, bias))  # a launch of its own would cost more than the work
        else:
            ops.accumulate_covariance(total, x, bias)

    def finish_batch(self) -> None:
        small, self._small = self._small, []
        if small:
            totals, rows, biases = zip(*small, strict=True)
            ops.grouped.accumulate_covariance_group(totals, rows, biases)

    def tensors(self) -> dict[str, Tensor]:
        return {f"A:{k}": v for k, v in self.A.items()} | {f"S:{k}": v for k, v in self.S.items()}

    def restore(self, tensors: dict[str, Tensor], rows: dict[str, int], device: torch.device) -> None:
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            {"A": self.A, "S": self.S}[kind][name] = value.to(device)
        self.rows = Counter(rows)


def _square(size: int, like: Tensor) -> Tensor:
    # Close eigenvalues make eigenvectors follow the last bit of the sum, hence the batch size: measured 1e-5 of the
    # scores with float32 sums and 1e-7 with float64 ones. Small factors get them where float64 is not slow.
    wide = like.dtype == torch.float64 or (like.device.type == "cpu" and size <= SMALL_FACTOR)
    return torch.zeros(size, size, dtype=torch.float64 if wide else torch.float32, device=like.device)


class _SquaredGradients(Consumer):
    """Consumer: ``Λ += Σ_b (U_Sᵀ G_b U_A)²``; never a per-sequence gradient for the whole batch."""

    def __init__(self, inputs: dict[str, InputFactor], bases: dict[str, Tensor | None], keep_rotated: bool) -> None:
        self.inputs, self.bases, self.keep_rotated = inputs, bases, keep_rotated
        self._kept: CapturedBatch | None = None
        self.Lam: dict[str, Tensor] = {}
        self.rows: Counter[str] = Counter()
        self._rotated: dict[str, Tensor] = {}
        self._small: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}

    def start_batch(self) -> _SquaredGradients:
        self._rotated.clear()
        self._small.clear()
        self._kept = CapturedBatch(rotated=True) if self.keep_rotated else None
        return self

    def take_rotated(self) -> CapturedBatch | None:
        """The batch in the eigenbases, if scores will want it so; None where a layer was rotated after the
        contraction.
        """
        kept, self._kept = self._kept, None
        return kept

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        factor = self.inputs.setdefault(group, InputFactor(None, None, 0))
        U_A, U_S = factor.basis, self.bases.get(layer.name)
        if layer.name not in self.Lam:
            dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
            self.Lam[layer.name] = torch.zeros(layer.d_out, layer.columns, dtype=dtype, device=g.device)
        Lam = self.Lam[layer.name]
        if U_A is None:
            if first:
                self.rows[f"A:{group}"] += a.shape[0]
            self.rows[f"S:{layer.name}"] += g.shape[0]
        tokens = g.shape[0] / max(1, offsets.numel() - 1)
        both_first = U_A is None or (
            rotation_is_first(tokens, layer.d_out) and rotation_is_first(tokens, layer.columns)
        )
        if both_first:
            if group not in self._rotated:
                self._rotated[group] = input_rows(a, layer.bias) if U_A is None else rotate_input(a, U_A, layer.bias)
            rotated_g = rotate_output(g, U_S)
            if ops.grouped.is_small(Lam):
                marks = tuple(offsets.tolist())  # on the CPU; nearly always the same for all layers
                self._small.setdefault(marks, []).append((Lam, rotated_g, self._rotated[group]))
            else:
                ops.accumulate_squared_gradients(Lam, rotated_g, self._rotated[group], offsets)
            if self._kept is not None:
                self._kept.inputs[group] = self._rotated[group]
                self._kept.grads[layer.name], self._kept.offsets[layer.name] = rotated_g, offsets
            return
        self._kept = None
        for rotated in rotated_gradients(g, a, offsets, U_S, U_A, layer.bias):
            Lam.addcmul_(rotated, rotated)

    def finish_batch(self) -> None:
        for marks, layers in self._small.items():
            totals, g, a = zip(*layers, strict=True)
            ops.grouped.accumulate_squared_gradients_group(totals, g, a, torch.tensor(marks))
        self._small.clear()


def _groups_state(source: PassSource) -> dict[str, str]:
    return dict(source.session.groups.of_layer)


def fit_factors(
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
    """Fit K-FAC, EK-FAC or diagonal factors from the batches of ``source``.

    Args:
        kind: ``ekfac`` (corrected eigenvalues), ``kfac`` (outer product of the factors' own, times the mean sequence
            length), ``diagonal`` (identity bases).
        loss: ``sampled`` (true Fisher) or ``train`` (empirical Fisher).
        sequences: how many sequences the means are over (those without a counted position have zero gradient).
        checkpoint: where an unfinished fit is kept, if anywhere.
        keep_captured: put captured batches in the source's cache for the later passes.
        keep_rotated: leave them there in the eigenbases, for scores that are formed there.
        timings: seconds by stage are added here.
        factor_block: the widest factor decomposed in one piece; wider ones are split into diagonal blocks.

    Raises:
        ConfigError: a block below 1.
        NonFiniteError: a factor is NaN or infinite; names the layer.

    Sources: Grosse et al. 2023 (arXiv 2308.03296), George et al. 2018 (arXiv 1806.03884).
    """
    timings = timings if timings is not None else {}
    loaded = checkpoint.load() if checkpoint is not None else None
    state, sets = loaded if loaded is not None else ({"stage": "covariance", "batch": 0, "rows": {}}, {})
    if state.get("groups"):
        source.session.groups.of_layer = dict(state["groups"])
    device = source.session.device
    selection = source.session.selection
    inputs: dict[str, InputFactor] = {}
    bases: dict[str, Tensor | None] = {}
    spectra: dict[str, Tensor | None] = {}
    rows: Counter[str] = Counter(state["rows"])
    if kind != "diagonal":
        if state["stage"] == "covariance":
            covariances = _Covariances()
            if sets:
                covariances.restore(sets["covariance"], state["rows"], device)
            _covariance_pass(source, covariances, loss, int(state["batch"]), checkpoint, keep_captured, timings)
            dtype = _factor_dtype(source)
            inputs, bases, spectra = _eigenbases(covariances, eigensolver, timings, check_block(factor_block), dtype)
            rows = covariances.rows
            state = {"stage": "lambda", "batch": 0, "rows": dict(rows), "groups": _groups_state(source)}
            if checkpoint is not None and kind == "ekfac":
                checkpoint.save(state, drop=("covariance",), bases=_bases_out(inputs, bases, spectra))
        else:
            inputs, bases, spectra = _bases_in(sets["bases"], Counter(state["rows"]), device)
    if kind == "kfac":
        corrected = _kronecker_eigenvalues(selection, source, inputs, spectra, rows, sequences)
    else:
        squares = _SquaredGradients(inputs, bases, keep_rotated and kind == "ekfac")
        squares.rows = rows
        if "lambda" in sets:
            squares.Lam = {k: v.to(device) for k, v in sets["lambda"].items()}
        start = int(state["batch"]) if state["stage"] == "lambda" or kind == "diagonal" else 0
        _lambda_pass(source, squares, loss, start, checkpoint, keep_captured and kind == "diagonal", timings)
        corrected = {name: Lam.div_(sequences) for name, Lam in squares.Lam.items()}
    return _assemble(source, kind, inputs, bases, spectra, corrected, rows, sequences)


def _save_hook(checkpoint: Checkpoint | None, make: Callable[[int], None]) -> Callable[[int], None] | None:
    if checkpoint is None:
        return None

    def done(batch: int) -> None:
        if checkpoint.due():
            make(batch)

    return done


def _covariance_pass(
    source: PassSource,
    covariances: _Covariances,
    loss: str,
    start: int,
    checkpoint: Checkpoint | None,
    keep: bool,
    timings: dict[str, float],
) -> None:
    def save(batch: int) -> None:
        assert checkpoint is not None
        state = {"stage": "covariance", "batch": batch, "rows": dict(covariances.rows), "groups": _groups_state(source)}
        checkpoint.save(state, covariance=covariances.tensors())

    started = time.perf_counter()
    source.run(lambda *_: covariances, loss, "covariances", start, _save_hook(checkpoint, save), keep)
    timings["covariances"] = timings.get("covariances", 0.0) + time.perf_counter() - started
    missing = [n for n in source.session.selection.names if n not in covariances.S]
    if missing:
        _never_called(missing)


def _never_called(missing: list[str]) -> None:
    raise ModelError(
        f"layer '{missing[0]}' was never called by the model ({len(missing)} such layers); leave it out with modules="
    )


def _factor_dtype(source: PassSource) -> torch.dtype:
    """What the factors are kept in, whatever was summed in: float64 for a float64 model."""
    exact = any(parameter.dtype == torch.float64 for parameter in source.session.model.parameters())
    return torch.float64 if exact else torch.float32


def _eigenbases(
    covariances: _Covariances, solver: str, timings: dict[str, float], limit: int | None, dtype: torch.dtype
) -> tuple[dict[str, InputFactor], dict[str, Tensor | None], dict[str, Tensor | None]]:
    started = time.perf_counter()
    inputs: dict[str, InputFactor] = {}
    bases: dict[str, Tensor | None] = {}
    spectra: dict[str, Tensor | None] = {}
    with progress.stage("eigenbases", len(covariances.A) + len(covariances.S), "factors") as running:
        for kind, sums in (("A", covariances.A), ("S", covariances.S)):
            for name, total in sums.items():
                total.div_(max(1, covariances.rows[f"{kind}:{name}"]))
        ready = block_eigenbases(
            {
                factor_label(kind, name): matrix
                for kind in ("A", "S")
                for name, matrix in getattr(covariances, kind).items()
            },
            solver,
            limit,
        )
        for group in list(covariances.A):
            matrix, where = covariances.A.pop(group), factor_label("A", group)
            basis, values = ready.pop(where, None) or block_eigenbasis(matrix, solver, where, limit)
            inputs[group] = InputFactor(basis.to(dtype), values.to(dtype), covariances.rows[f"A:{group}"])
            running.advance(1)
        for name in list(covariances.S):
            matrix, where = covariances.S.pop(name), factor_label("S", name)
            basis, values = ready.pop(where, None) or block_eigenbasis(matrix, solver, where, limit)
            bases[name], spectra[name] = basis.to(dtype), values.to(dtype)
            running.advance(1)
    timings["eigendecomposition"] = timings.get("eigendecomposition", 0.0) + time.perf_counter() - started
    return inputs, bases, spectra


def _lambda_pass(
    source: PassSource,
    squares: _SquaredGradients,
    loss: str,
    start: int,
    checkpoint: Checkpoint | None,
    keep: bool,
    timings: dict[str, float],
) -> None:
    def save(batch: int) -> None:
        assert checkpoint is not None
        state = {"stage": "lambda", "batch": batch, "rows": dict(squares.rows), "groups": _groups_state(source)}
        checkpoint.save(state, **{"lambda": squares.Lam})

    started = time.perf_counter()
    source.run(
        lambda *_: squares.start_batch(), loss, "corrected eigenvalues", start, _save_hook(checkpoint, save), keep
    )
    squares.start_batch()
    timings["lambda"] = timings.get("lambda", 0.0) + time.perf_counter() - started
    for name, Lam in squares.Lam.items():
        if not bool(torch.isfinite(Lam.sum())):
            raise NonFiniteError(
                f"the corrected eigenvalues of layer '{name}' are not finite; run the model in a wider dtype"
            )
    missing = [n for n in source.session.selection.names if n not in squares.Lam]
    if missing:
        _never_called(missing)


def _kronecker_eigenvalues(
    selection: LayerSelection,
    source: PassSource,
    inputs: dict[str, InputFactor],
    spectra: dict[str, Tensor | None],
    rows: Counter[str],
    sequences: int,
) -> dict[str, Tensor]:
    """``Λ = (tokens per sequence) · d_S d_Aᵀ``: the second moment of ``Σ_t g_t a_tᵀ`` were tokens independent."""
    out = {}
    for layer in selection.layers:
        d_A, d_S = inputs[source.session.groups.of_layer[layer.name]].eigenvalues, spectra[layer.name]
        assert d_A is not None and d_S is not None
        out[layer.name] = torch.outer(d_S, d_A).mul_(rows[f"S:{layer.name}"] / max(1, sequences))
    return out


def _bases_out(
    inputs: dict[str, InputFactor], bases: dict[str, Tensor | None], spectra: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for group, factor in inputs.items():
        assert factor.basis is not None and factor.eigenvalues is not None
        out[f"U_A:{group}"], out[f"d_A:{group}"] = factor.basis, factor.eigenvalues
    for name, basis in bases.items():
        spectrum = spectra[name]
        assert basis is not None and spectrum is not None
        out[f"U_S:{name}"], out[f"d_S:{name}"] = basis, spectrum
    return out


def _bases_in(
    tensors: dict[str, Tensor], rows: Counter[str], device: torch.device
) -> tuple[dict[str, InputFactor], dict[str, Tensor | None], dict[str, Tensor | None]]:
    inputs: dict[str, InputFactor] = {}
    bases: dict[str, Tensor | None] = {}
    spectra: dict[str, Tensor | None] = {}
    try:
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            if kind == "U_A":
                inputs[name] = InputFactor(value.to(device), tensors[f"d_A:{name}"].to(device), rows[f"A:{name}"])
            elif kind == "U_S":
                bases[name], spectra[name] = value.to(device), tensors[f"d_S:{name}"].to(device)
    except KeyError as error:
        raise ArtifactError(f"the unfinished fit lacks {error}; delete its directory and fit again") from None
    return inputs, bases, spectra


def _assemble(
    source: PassSource,
    kind: str,
    inputs: dict[str, InputFactor],
    bases: dict[str, Tensor | None],
    spectra: dict[str, Tensor | None],
    corrected: dict[str, Tensor],
    rows: Counter[str],
    sequences: int,
) -> Factors:
    layers = {}
    for layer in source.session.selection.layers:
        group = source.session.groups.of_layer[layer.name]
        if kind == "diagonal":
            inputs.setdefault(group, InputFactor(None, None, rows[f"A:{group}"])).rows = rows[f"A:{group}"]
        count = rows[f"S:{layer.name}"]
        layers[layer.name] = LayerFactor(
            group, bases.get(layer.name), spectra.get(layer.name), working(corrected[layer.name]), count, layer.bias
        )
    inputs = {group: inputs[group] for group in source.session.groups.names}  # one order, also after a resumption
    tokens = max((factor.rows for factor in inputs.values()), default=0)
    return Factors(kind, inputs, layers, sequences, tokens)
