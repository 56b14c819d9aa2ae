"""The one-bit store in EK-FAC's basis: whitened by half, the strongest coordinates kept, rotated, signs stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer, LayerSelection
from pyinf.curvature import Factors
from pyinf.curvature.gradients import LayerGradients
from pyinf.curvature.rotate import rotate_input, rotate_output
from pyinf.errors import ConfigError
from pyinf.store.compress.base import Compressor, Context, LayerRows, layer_seed, register
from pyinf.store.sections import layout

__all__ = ["OneBit", "Whitening", "hadamard"]

_WORKSPACE = 1 << 24
_GATHER = 16  # a gathered product costs about as much as this many in a matrix product
_ROUNDING = 1e-10


def hadamard(x: Tensor) -> Tensor:
    """``xH / √n`` along the last axis, ``n`` a power of two: the Walsh–Hadamard transform, orthogonal."""
    shape, n = x.shape, x.shape[-1]
    x = x.reshape(-1, n)
    width = 1
    while width < n:
        x = x.reshape(-1, n // (2 * width), 2, width)
        x = torch.stack((x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]), 2).reshape(-1, n)
        width *= 2
    return x.reshape(shape) / n**0.5


@dataclass
class Whitening:
    """A layer's kept coordinates: ``z = w ∘ (U_Sᵀ G U_A)[rows, columns]``, ``w = (Λ + λ)^{−½}``.

    ``U_S`` and ``U_A`` hold only the eigenvectors that some kept coordinate needs, the grid; ``rows`` and ``columns``
    ``[m]`` count in it.
    """

    U_S: Tensor
    U_A: Tensor
    rows: Tensor
    columns: Tensor
    weights: Tensor

    @classmethod
    def of(cls, factors: Factors, name: str, count: int, lam: float) -> Whitening:
        """The ``count`` coordinates with the largest Λ; ties go to the lower index."""
        layer = factors.layers[name]
        Lam, basis = layer.corrected, factors.inputs[layer.group].basis
        flat = Lam.reshape(-1)
        kept = flat.argsort(descending=True, stable=True)[:count].sort().values
        rows, columns = kept // Lam.shape[1], kept % Lam.shape[1]
        used_rows, rows = rows.unique(return_inverse=True)
        used_columns, columns = columns.unique(return_inverse=True)
        U_S = torch.eye(Lam.shape[0], dtype=Lam.dtype, device=Lam.device) if layer.basis is None else layer.basis
        U_A = torch.eye(Lam.shape[1], dtype=Lam.dtype, device=Lam.device) if basis is None else basis
        weights = (flat[kept] + lam).rsqrt()
        return cls(U_S[:, used_rows].contiguous(), U_A[:, used_columns].contiguous(), rows, columns, weights)

    def __call__(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        """``z`` of every sequence, ``[B, m]``: the whole grid and a gather, or the coordinates one by one."""
        left, right = rotate_output(g, self.U_S), rotate_input(a, self.U_A, layer.bias)
        grid = self.U_S.shape[1] * self.U_A.shape[1]
        if grid > _GATHER * self.rows.numel():
            out = ops.select_gradient_coordinates(left, right, self.rows, self.columns, offsets)
            return out * self.weights
        flat = self.rows * self.U_A.shape[1] + self.columns
        marks = offsets.tolist()
        out = left.new_empty(len(marks) - 1, flat.numel())
        step = max(1, _WORKSPACE // grid)
        for first in range(0, len(marks) - 1, step):
            part = marks[first : first + step + 1]
            tokens = slice(part[0], part[-1])
            G = LayerGradients(left[tokens], right[tokens], [mark - part[0] for mark in part]).rows(slice(None))
            out[first : first + len(part) - 1] = G.flatten(1)[:, flat]
        return out.mul_(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (self.U_S, self.U_A, self.rows, self.columns, self.weights)
        return sum(t.numel() * t.element_size() for t in parts)


class _Samples(Consumer):
    """Whitened gradients of sampled sequences, kept for some layers."""

    def __init__(self, whitenings: Mapping[str, Whitening]) -> None:
        self.whitenings = whitenings
        self.found: dict[str, list[Tensor]] = {name: [] for name in whitenings}

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if layer.name in self.whitenings:
            self.found[layer.name].append(self.whitenings[layer.name](layer, a, g, offsets))


def principal_directions(Z: Tensor, k: int) -> Tensor:
    """The ``k`` leading right singular vectors ``[m, ≤ k]`` of ``Z [n, m]``, through its ``n × n`` Gram matrix.

    Not centred: it is the second moment that matters. Directions below 1e-10 of the largest are left out.
    """
    values, vectors = torch.linalg.eigh((Z @ Z.T).double())
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    kept = values > _ROUNDING * values[0].clamp(min=torch.finfo(torch.float64).tiny)
    scaled = vectors[:, kept] * values[kept].rsqrt()
    return Z.T @ scaled.to(Z.dtype)


@register
@dataclass
class OneBit(Compressor):
    """``Σ_l ⟨y_l, row_l⟩`` with ``z = (Λ_m + λ)^{−½} ∘ (U_Sᵀ G U_A)_m`` and ``row = Pᵀz``, ``y = Pᵀz_q``.

    With every coordinate and without rotation the score is EK-FAC's own. In the format ``1bit`` a row is the signs of
    ``Pᵀz`` and their mean size; queries are never quantised.

    Options: ``coordinates`` (``m`` a layer: those of the largest Λ), ``rotation`` (``pca``: the ``rank`` leading
    directions of ``pca_sequences`` training examples' ``z``, the same to every query in the inverse curvature's ball;
    ``hadamard``: signs drawn, a Walsh–Hadamard transform and ``rank`` of its coordinates (SRHT), no matrix and no pass;
    ``none``: ``z`` itself), ``rank`` (``k`` a layer), ``spread`` (with ``pca``: the directions turned among themselves
    by a random orthogonal matrix, so that one scale suits them all; it changes nothing but the rounding),
    ``approximation`` (which curvature gives bases and Λ).

    λ goes into the rows, so another damping means other rows.

    Source: EOGP and EOGP-R (eigenbasis-corrected one-bit gradient projection), 2026, which do not spread.
    """

    name: ClassVar[str] = "onebit"
    early_damping: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "approximation": "ekfac",
        "coordinates": 16384,
        "rotation": "pca",
        "rank": 1024,
        "pca_sequences": 2048,
        "spread": True,
    }
    whitenings: dict[str, Whitening] = field(default_factory=dict)
    directions: dict[str, Tensor] = field(default_factory=dict)  # P [m, k], with rotation="pca"
    _draws: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> str | None:
        """Eigenbases and eigenvalues."""
        return options["approximation"]

    def prepare(self, context: Context) -> None:
        """Choose the coordinates; passes over the sampled sequences for the principal directions."""
        super().prepare(context)
        factors = context.factors
        if factors is None:
            raise ConfigError("onebit needs fitted factors; call fit(train) first")
        lam = factors.dampings(self.damping, self.damping_mode)
        count = self.options["coordinates"]
        self.whitenings = {n: Whitening.of(factors, n, count, lam[n]) for n in context.selection.names}
        self.directions = {}
        if self.options["rotation"] == "pca":
            self._fit_directions(context)
        self.sections = layout([(name, "vector", (self._width(name),)) for name in context.selection.names])

    def _width(self, name: str) -> int:
        m = self.whitenings[name].rows.numel()
        if self.options["rotation"] == "none":
            return m
        if self.options["rotation"] == "pca":
            return self.directions[name].shape[1]
        return min(self.options["rank"], _padded(m))

    def _fit_directions(self, context: Context) -> None:
        sample = context.sample(self.options["pca_sequences"])
        if not sample:
            raise ConfigError("no training example has a label, so there is nothing to take principal directions of")
        budget, groups, used = context.memory_budget // 2, [[]], 0
        for name, whitening in self.whitenings.items():
            size = len(sample) * whitening.rows.numel() * torch.empty(0, dtype=context.dtype).element_size()
            if groups[-1] and used + size > budget:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
        for number, names in enumerate(groups):
            samples = _Samples({name: self.whitenings[name] for name in names})
            stage = "principal directions" + (f" ({number + 1} of {len(groups)})" if len(groups) > 1 else "")
            context.run(lambda _, s=samples: s, "train", stage, indices=sample)
            for name in names:
                P = principal_directions(torch.cat(samples.found.pop(name)), self.options["rank"])
                if self.options["spread"]:
                    P = P @ _orthogonal(P.shape[1], layer_seed(self.seed, name, "spread")).to(P)
                self.directions[name] = P

    def consumer(self, loss: str, checkpoint: int = 0) -> LayerRows:
        """The same for training examples and queries."""
        return LayerRows(self.sections, self._rotated)

    def _rotated(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        z = self.whitenings[layer.name](layer, a, g, offsets)
        if self.options["rotation"] == "none":
            return z
        if self.options["rotation"] == "pca":
            return z @ self.directions[layer.name]
        signs, kept = self._drawn(layer.name, z.shape[1])
        n = signs.numel()
        padded = torch.nn.functional.pad(z, (0, n - z.shape[1])) * signs.to(z)
        return hadamard(padded)[:, kept.to(z.device)] * (n / kept.numel()) ** 0.5

    def _drawn(self, name: str, m: int) -> tuple[Tensor, Tensor]:
        """Signs ``[n]`` and which of the ``n`` coordinates are kept, ``n`` the power of two from ``m`` on."""
        if name not in self._draws:
            n = _padded(m)
            generator = torch.Generator().manual_seed(layer_seed(self.seed, name, "hadamard"))
            signs = 1.0 - 2.0 * torch.randint(0, 2, (n,), generator=generator)
            self._draws[name] = (
                signs,
                torch.randperm(n, generator=generator)[: min(self.options["rank"], n)].sort().values,
            )
        return self._draws[name]

    def tensors(self) -> dict[str, Tensor]:
        """Eigenvectors of the grid, coordinates, weights and directions: what a query's row takes."""
        out = {}
        for name, w in self.whitenings.items():
            for key in ("U_S", "U_A", "rows", "columns", "weights"):
                out[f"{key}:{name}"] = getattr(w, key).cpu()
        return out | {f"P:{name}": P.cpu().contiguous() for name, P in self.directions.items()}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection) -> OneBit:
        """The inverse of :meth:`settings` and :meth:`tensors`."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, OneBit)
        for name in [key.partition(":")[2] for key in tensors if key.startswith("weights:")]:
            parts = (tensors[f"{key}:{name}"] for key in ("U_S", "U_A", "rows", "columns", "weights"))
            out.whitenings[name] = Whitening(*parts)
        out.directions = {key[2:]: P for key, P in tensors.items() if key.startswith("P:")}
        return out

    def to(self, device: torch.device) -> OneBit:
        """Move its tensors."""
        super().to(device)
        for name, w in self.whitenings.items():
            parts = (w.U_S, w.U_A, w.rows, w.columns, w.weights)
            self.whitenings[name] = Whitening(*(t.to(device) for t in parts))
        self.directions = {name: P.to(device) for name, P in self.directions.items()}
        return self


def _padded(m: int) -> int:
    return 1 << max(0, (m - 1).bit_length())


def _orthogonal(k: int, seed: int) -> Tensor:
    """A random orthogonal matrix (of Haar measure): the QR decomposition of a normal one, signs of R made positive."""
    Q, R = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
