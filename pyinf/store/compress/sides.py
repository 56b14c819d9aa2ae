"""The two matrices of a two-sided projection ``P_gᵀ G P_a``: drawn from Philox, or given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Consumer, Layer, LayerSelection
from pyinf.curvature import eigenbasis
from pyinf.curvature.gradients import LayerGradients
from pyinf.curvature.rotate import rotate_input, rotate_output, working
from pyinf.ops.philox import random_matrix
from pyinf.ops.reference import STREAM_A, STREAM_G
from pyinf.score.engine import segment_sum
from pyinf.store.compress.base import Context, layer_seed
from pyinf.store.sections import Section, layout

__all__ = ["ProjectedCovariances", "TwoSided", "given_sides", "kronecker_parts"]

_KEPT = 1 << 30  # bytes of drawn matrices that are kept on an accelerator; above it they are drawn anew by the op


class TwoSided:
    """``P_gᵀ G P_a`` ``[k_g, k_a]`` of every sequence and layer (LoGra, Choe et al. 2024).

    ``P_g [d_out, k_g]`` and ``P_a [d_in(+1), k_a]`` have independent elements ±1/√k (or normal ones of that variance)
    from Philox, a seed of its own for each layer; a side no wider than its k is left whole. ``given`` takes their place
    where it names a layer; ``scales`` multiplies rows and columns of the gradient first: ``{layer: (s_g, s_a)}``.
    """

    def __init__(
        self,
        selection: LayerSelection,
        rank: int,
        seed: int,
        distribution: str,
        device: torch.device,
        dtype: torch.dtype,
        given: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        scales: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.rank, self.seed, self.distribution, self.device, self.dtype = rank, seed, distribution, device, dtype
        self.given, self.scales = dict(given or {}), dict(scales or {})
        drawn = sum(rank * (layer.d_out + layer.columns) for layer in selection.layers)
        # Without a kernel that does both products at once the tokens are projected here, which makes the bias free.
        self.fused = device.type != "cpu"
        self.keep = device.type == "cpu" or drawn * torch.empty(0, dtype=dtype).element_size() <= _KEPT
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def widths(self, layer: Layer) -> tuple[int, int]:
        """``(k_g, k_a)`` of a layer."""
        if layer.name in self.given:
            P_g, P_a = self.given[layer.name]
            return P_g.shape[1], P_a.shape[1]
        return min(self.rank, layer.d_out), min(self.rank, layer.columns)

    def sections(self, selection: LayerSelection) -> list[Section]:
        """One ``(k_g, k_a)`` vector a layer."""
        return layout([(layer.name, "vector", self.widths(layer)) for layer in selection.layers])

    def matrices(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """``P_g`` and ``P_a`` of a layer, scales folded in; kept where memory allows."""
        known = self._kept.get(layer.name)
        if known is not None:
            return known
        found = self.given.get(layer.name)
        if found is None:
            seed = layer_seed(self.seed, layer.name)
            k_g, k_a = self.widths(layer)
            found = self._draw(layer.d_out, k_g, seed, STREAM_G), self._draw(layer.columns, k_a, seed, STREAM_A)
        P_g, P_a = (P.to(device=self.device, dtype=self.dtype) for P in found)
        if layer.name in self.scales:
            s_g, s_a = (s.to(P_g) for s in self.scales[layer.name])
            P_g, P_a = P_g * s_g[:, None], P_a * s_a[:, None]
        if self.keep or layer.name in self.given or layer.name in self.scales:
            self._kept[layer.name] = P_g, P_a
        return P_g, P_a

    def to(self, device: torch.device) -> None:
        """Move what is kept."""
        self.device = device
        self._kept.clear()

    def tensors(self) -> dict[str, Tensor]:
        """The sides that were given; the others can be drawn again."""
        out = {}
        for name, (P_g, P_a) in self.given.items():
            out |= {f"P_g:{name}": P_g.cpu(), f"P_a:{name}": P_a.cpu()}
        return out

    def _draw(self, size: int, k: int, seed: int, stream: int) -> Tensor:
        if k == size:
            return torch.eye(size, dtype=self.dtype, device=self.device)
        P = random_matrix((0, size), (0, k), seed, stream, self.distribution, self.device, self.dtype)
        return P.div_(k**0.5)

    def _drawn_by_op(self, layer: Layer) -> bool:
        k_g, k_a = self.widths(layer)
        plain = layer.name not in self.given and layer.name not in self.scales
        return plain and not self.keep and k_g < layer.d_out and k_a < layer.columns

    def rows(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        """``[B, k_g·k_a]``; the gradients are never formed, nor is a column of ones joined to ``a``."""
        if not self.fused:
            P_g, P_a = self.matrices(layer)
            tokens = LayerGradients(rotate_output(g, P_g), rotate_input(a, P_a, layer.bias), offsets.tolist())
            return tokens.rows(slice(None)).flatten(1)
        if g.dtype not in (torch.bfloat16, torch.float16) or a.dtype != g.dtype:
            a, g = working(a), working(g)
        if self._drawn_by_op(layer):  # P is a function of (seed, stream, element): nothing of it need be held
            k_g, k_a = self.widths(layer)
            seed = layer_seed(self.seed, layer.name)
            out = ops.project_gradients(g, a, offsets, k_g=k_g, k_a=k_a, seed=seed, distribution=self.distribution)
            if not layer.bias:
                return out.flatten(1)
            P_g = self._draw(layer.d_out, k_g, seed, STREAM_G)
            last = random_matrix(
                (layer.d_in, layer.columns), (0, k_a), seed, STREAM_A, self.distribution, self.device, self.dtype
            )[0].div_(k_a**0.5)
        else:
            P_g, P_a = self.matrices(layer)
            out = ops.project_gradients(g, a, offsets, P_g=P_g, P_a=P_a[: layer.d_in])
            last = P_a[-1]
        if layer.bias:
            out += (segment_sum(working(g), offsets) @ P_g).unsqueeze(2) * last
        return out.flatten(1)


def given_sides(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The inverse of :meth:`TwoSided.tensors`."""
    names = [key.partition(":")[2] for key in tensors if key.startswith("P_g:")]
    return {name: (tensors[f"P_g:{name}"], tensors[f"P_a:{name}"]) for name in names}


class ProjectedCovariances(Consumer):
    """Consumer: covariances of projected tokens, ``Σ_t (P_gᵀg_t)(P_gᵀg_t)ᵀ`` and the same of the inputs."""

    def __init__(self, sides: TwoSided) -> None:
        self.sides = sides
        self.g: dict[str, Tensor] = {}
        self.a: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        P_g, P_a = self.sides.matrices(layer)
        for total, rows in ((self.g, working(g) @ P_g), (self.a, rotate_input(a, P_a, layer.bias))):
            if layer.name not in total:
                total[layer.name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
            ops.accumulate_covariance(total[layer.name], rows)
        self.tokens[layer.name] = self.tokens.get(layer.name, 0) + g.shape[0]

    def bases(self) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
        """Eigenvectors ``(V_g, V_a)`` and eigenvalues ``(d_g, d_a)`` of the means over tokens."""
        vectors, values = {}, {}
        for name, tokens in self.tokens.items():
            V_g, d_g = eigenbasis(self.g[name] / tokens, name=f"the projected output gradient of '{name}'")
            V_a, d_a = eigenbasis(self.a[name] / tokens, name=f"the projected input of '{name}'")
            vectors[name], values[name] = (V_g, V_a), (d_g, d_a)
        return vectors, values


def kronecker_parts(
    context: Context, sides: TwoSided, names: Sequence[str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Bases and K-FAC's eigenvalues in the projected space, from one pass with the fit's labels.

    ``Λ = (tokens a sequence) · d_g d_aᵀ``, the second moment of ``Σ_t g_t a_tᵀ`` were tokens independent.
    """
    found = ProjectedCovariances(sides)
    context.run(lambda _: found, context.fit_loss, "covariances (projected)")
    bases, values = found.bases()
    sequences = max(1, len(context.data))
    Lam = {name: torch.outer(*values[name]) * (found.tokens[name] / sequences) for name in names}
    dtype = context.dtype
    turned = {name: tuple(V.to(dtype) for V in bases[name]) for name in names}
    return turned, {name: value.to(dtype) for name, value in Lam.items()}
