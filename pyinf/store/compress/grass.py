"""GraSS and FactGraSS: a coordinate mask of the gradient, then a sparse Johnson–Lindenstrauss transform.

Source: Hu et al. 2025, "GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse Projection", arXiv
2505.18976.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyinf import ops
from pyinf.capture import Layer, LayerSelection
from pyinf.curvature.rotate import input_rows, working
from pyinf.errors import ConfigError, ResourceError
from pyinf.store.compress.base import Compressor, Context, LayerRows, RowConsumer, layer_seed, register, row_dtype
from pyinf.store.compress.curvature import Identity, Moments, RowCurvature
from pyinf.store.compress.masks import GradientSample, draw_subset, learn_factor_masks, learn_mask
from pyinf.store.sections import layout

__all__ = ["GraSS", "masked_sketch"]


def masked_sketch(
    g: Tensor, a: Tensor, offsets: Tensor, rows: Tensor, columns: Tensor, k: int, seed: int, nnz: int, scale: float
) -> Tensor:
    """``scale · S vec(G[rows, columns])`` of every sequence, ``[B, k]``; a = inputs with their column of ones.

    S is :func:`pyinf.ops.sparse_projection`'s; where the mask leaves no more than ``k`` elements there is no S.
    Cost: ``2N·k'_g·k'_a`` operations for the masked gradient and ``k'_g·k'_a·nnz`` additions a sequence.
    """
    left, right = g.index_select(1, rows), a.index_select(1, columns)
    if rows.numel() * columns.numel() > k:
        out = ops.sparse_projection_factors(left, right, offsets, k=k, seed=seed, nnz=nnz)
        return out.mul_(scale)
    marks = offsets.tolist()
    parts = [left[i:j].T @ right[i:j] for i, j in pairwise(marks)]
    return torch.stack(parts).flatten(1).mul_(scale) if parts else left.new_zeros(0, rows.numel() * columns.numel())


class _FlatRows(RowConsumer):
    """Masked elements of all layers together, sketched once a batch is over."""

    def __init__(self, grass: GraSS) -> None:
        self.grass = grass
        self._found: Tensor | None = None

    def start_batch(self, indices: Sequence[int], labels: Sequence[int]) -> _FlatRows:
        self.rows = self._found = None
        return self

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        if self._found is None:
            size = offsets.numel() - 1, self.grass.mask_size
            self._found = torch.zeros(size, dtype=row_dtype(g.dtype), device=g.device)
        place = self.grass.places[layer.name]
        if place.stop > place.start:
            rows, columns = (index.to(g.device) for index in self.grass.masks[layer.name])
            inputs = input_rows(a, layer.bias)
            self._found[:, place] = ops.select_gradient_coordinates(working(g), inputs, rows, columns, offsets)

    def finish_batch(self) -> None:
        if self._found is not None:
            self.rows = self.grass.sketch(self._found)


@register
@dataclass
class GraSS(Compressor):
    """Row of FactGraSS (``factorised``): ``S vec(G[M_g, M_a])`` of every layer, with masks ``M_g`` and ``M_a`` of the
    layer's outputs and inputs and S the sparse transform to ``k`` coordinates. Row of GraSS: ``S G[M]``, one mask ``M``
    of ``mask_size`` coordinates of the flat gradient of all layers together, one S to ``k``. Score: ``qᵀ(K + λ)⁻¹r``
    with ``K`` the second moment of the rows (``curvature="gram"``), or ``qᵀr`` (``"none"``).

    Options: ``factorised``, ``k`` (a layer, or joint), ``mask_g`` and ``mask_a`` (coordinates kept on each side),
    ``mask_size`` (None: 4k), ``mask`` (``random``; ``selective``: learned from ``mask_examples`` training gradients by
    ``mask_steps`` steps of Adam with ``mask_penalty``, see :mod:`pyinf.store.compress.masks`), ``nnz`` (non-zeros a
    coordinate in S), ``curvature``. Random masks are scaled by ``√(p/p')``, so that inner products are unbiased.
    A selective mask needs whole gradients in memory: of a layer at a time with ``factorised``, of all of them without.

    Source: Hu et al. 2025, arXiv 2505.18976.
    """

    name: ClassVar[str] = "grass"
    defaults: ClassVar[Mapping[str, Any]] = {
        "factorised": True,
        "k": 4096,
        "mask_g": 128,
        "mask_a": 128,
        "mask_size": None,
        "mask": "random",
        "mask_examples": 64,
        "mask_steps": 200,
        "mask_penalty": 0.1,
        "nnz": 1,
        "curvature": "gram",
    }
    masks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    places: dict[str, slice] = field(default_factory=dict)
    total: int = 0
    curvature: RowCurvature | None = None

    @property
    def layered(self) -> bool:
        """Whether every layer has sections of its own."""
        return bool(self.options["factorised"])

    @property
    def damped(self) -> bool:
        """Whether there is a curvature to damp."""
        return self.options["curvature"] != "none"

    @property
    def mask_size(self) -> int:
        """Coordinates that the flat mask keeps."""
        wanted = self.options["mask_size"]
        return min(self.total, 4 * self.options["k"] if wanted is None else wanted)

    def prepare(self, context: Context) -> None:
        """Draw the masks, or learn them from sampled gradients.

        Raises:
            ResourceError: gradients for a selective mask do not fit the memory budget.
        """
        super().prepare(context)
        selection = context.selection
        self.total = selection.traced_parameters
        if self.options["factorised"]:
            learned = self._learn_factors(context) if self.options["mask"] == "selective" else {}
            for layer in selection.layers:
                self.masks[layer.name] = learned.get(layer.name) or self._drawn(layer)
        elif self.options["mask"] == "selective":
            self._place(selection, self._learn_flat(context))
        else:
            self._place(selection, draw_subset(self.total, self.mask_size, layer_seed(self.seed, "", "mask")))
        self._open(selection)

    def _drawn(self, layer: Layer) -> tuple[Tensor, Tensor]:
        sides = (("g", layer.d_out, self.options["mask_g"]), ("a", layer.columns, self.options["mask_a"]))
        return tuple(draw_subset(d, k, layer_seed(self.seed, layer.name, f"mask {s}")) for s, d, k in sides)  # type: ignore[return-value]

    def _learn_factors(self, context: Context) -> dict[str, tuple[Tensor, Tensor]]:
        indices = context.sample(self.options["mask_examples"])
        element = torch.empty(0, dtype=context.dtype).element_size()
        out = {}
        # As many layers a pass as fit: their gradients, and as much again for the masked ones and their derivatives.
        groups: list[list[Layer]] = [[]]
        used = 0
        for layer in context.selection.layers:
            size = 3 * len(indices) * layer.numel * element
            if size > context.memory_budget:
                raise ResourceError(
                    f"a selective mask of layer '{layer.name}' needs {size} bytes, the budget is "
                    f"{context.memory_budget}; lower mask_examples, raise memory_budget or use mask='random'"
                )
            if groups[-1] and used + size > context.memory_budget:
                groups.append([])
                used = 0
            groups[-1].append(layer)
            used += size
        for group in groups:
            sample = GradientSample({layer.name for layer in group})
            context.run(lambda _, s=sample: s, "train", "gradients for masks", indices)
            for layer in group:
                G = sample.stacked(layer.name)
                if G is not None:
                    keep = min(self.options["mask_g"], layer.d_out), min(self.options["mask_a"], layer.columns)
                    seed = layer_seed(self.seed, layer.name, "learned mask")
                    steps, penalty = self.options["mask_steps"], self.options["mask_penalty"]
                    out[layer.name] = learn_factor_masks(G, keep, steps, penalty, seed)
        return out

    def _learn_flat(self, context: Context) -> Tensor:
        indices = context.sample(self.options["mask_examples"])
        size = 3 * len(indices) * self.total * torch.empty(0, dtype=context.dtype).element_size()
        if size > context.memory_budget:
            raise ResourceError(
                f"a selective mask of the whole gradient needs {size} bytes, the budget is {context.memory_budget}; "
                "use factorised=True, lower mask_examples or use mask='random'"
            )
        sample = GradientSample(set(context.selection.names))
        context.run(lambda _: sample, "train", "gradients for the mask", indices)
        parts = []
        for layer in context.selection.layers:
            G = sample.stacked(layer.name)
            parts.append(torch.zeros(len(indices), layer.numel, dtype=context.dtype) if G is None else G.flatten(1))
        flat = torch.cat([part.to(context.device) for part in parts], 1)
        steps, penalty = self.options["mask_steps"], self.options["mask_penalty"]
        return learn_mask(flat, self.mask_size, steps, penalty, layer_seed(self.seed, "", "learned mask"))

    def _place(self, selection: LayerSelection, indices: Tensor) -> None:
        """Cut coordinates of the flat gradient into rows and columns of every layer."""
        first = at = 0
        for layer in selection.layers:
            own = indices[(indices >= first) & (indices < first + layer.numel)] - first
            rows = torch.div(own, layer.columns, rounding_mode="floor")
            self.masks[layer.name] = rows, own - rows * layer.columns
            self.places[layer.name] = slice(at, at + own.numel())
            first, at = first + layer.numel, at + own.numel()

    def _open(self, selection: LayerSelection) -> None:
        k = self.options["k"]
        if self.options["factorised"]:
            widths = {name: rows.numel() * columns.numel() for name, (rows, columns) in self.masks.items()}
            self.sections = layout([(name, "vector", (min(k, widths[name]),)) for name in selection.names])
        else:
            self.sections = layout([("", "vector", (min(k, self.mask_size),))])
        gram = self.options["curvature"] == "gram"
        self.curvature = Moments(self.sections) if gram else Identity(self.sections)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def consumer(self, loss: str, checkpoint: int = 0) -> RowConsumer:
        """The same for training examples and queries."""
        return LayerRows(self.sections, self._layer_rows) if self.options["factorised"] else _FlatRows(self)

    def _layer_rows(self, layer: Layer, a: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        rows, columns = self.masks[layer.name]
        kept = rows.numel() * columns.numel()
        scale = (layer.numel / kept) ** 0.5 if self.options["mask"] == "random" else 1.0
        inputs = input_rows(a, layer.bias)
        seed = layer_seed(self.seed, layer.name, "sketch")
        rows, columns = rows.to(g.device), columns.to(g.device)
        return masked_sketch(
            working(g), inputs, offsets, rows, columns, self.options["k"], seed, self.options["nnz"], scale
        )

    def sketch(self, masked: Tensor) -> Tensor:
        """Masked elements ``[B, mask_size]`` of the flat gradient → rows ``[B, k]``."""
        scale = (self.total / self.mask_size) ** 0.5 if self.options["mask"] == "random" else 1.0
        if self.options["k"] < self.mask_size:
            seed = layer_seed(self.seed, "", "sketch")
            masked = ops.sparse_projection(masked, self.options["k"], seed, self.options["nnz"])
        return masked.mul_(scale)

    def finish(self, rows: Iterable[Tensor]) -> None:
        """The second moment of the rows."""
        assert self.curvature is not None
        self.curvature.fit(rows, self.sequences)

    def query_rows(self, rows: Tensor, damping: float | None = None) -> Tensor:
        """``(K + λ)⁻¹q``."""
        assert self.curvature is not None
        return self.curvature.solve(rows, self.damping if damping is None else damping, self.damping_mode)

    # -- disk ----------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """As JSON."""
        return {**super().settings(), "total": self.total}

    def tensors(self) -> dict[str, Tensor]:
        """Masks and curvature."""
        assert self.curvature is not None
        out = self.curvature.tensors()
        for name, (rows, columns) in self.masks.items():
            out |= {f"mask_rows:{name}": rows, f"mask_columns:{name}": columns}
        return out

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], selection: LayerSelection) -> GraSS:
        """The inverse of :meth:`settings` and :meth:`tensors`."""
        out = super().restore(settings, tensors, selection)
        assert isinstance(out, GraSS)
        out.total = int(settings["total"])
        if out.total != selection.traced_parameters:
            raise ConfigError("the rows were made from layers of other sizes; use the model of the build")
        at = 0
        for name in selection.names:
            out.masks[name] = tensors[f"mask_rows:{name}"], tensors[f"mask_columns:{name}"]
            out.places[name] = slice(at, at + out.masks[name][0].numel())
            at += out.masks[name][0].numel()
        out._open(selection)
        if out.damped and any(key.startswith("moment:") for key in tensors):
            assert out.curvature is not None
            out.curvature.load(tensors, out.device)
        return out

    def to(self, device: torch.device) -> GraSS:
        """Move its tensors."""
        super().to(device)
        if self.curvature is not None and self.damped:
            self.curvature.load(self.curvature.tensors(), device)
        return self
