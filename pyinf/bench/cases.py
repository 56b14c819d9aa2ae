"""Every op as something that can be called: inputs by shape, dtype and layout, and the work of one call.

Work is counted as the ops' docstrings do: a multiply-add is two operations; bytes are the fewest that must move (each
input read once, each output written once, an accumulator both). Inputs are standard normal, never zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyinf.bench.shapes import Shape
from pyinf.ops import costs, pack_signs, registry
from pyinf.ops.schemas import SCHEMAS

__all__ = ["LAYOUTS", "OPS", "Inputs", "Op", "backends", "call", "forced", "function", "supports"]

LAYOUTS = ("contiguous", "padded", "transposed", "device offsets")
"""How inputs lie in memory: dense; rows with a gap after each (buffers too, the gap is watched); columns far apart;
dense with the offsets on the device."""

GAP = 3  # elements after each row of a padded matrix: breaks 16-byte alignment of the rows


@dataclasses.dataclass
class Inputs:
    """Draws the inputs of one call. ``guards`` holds what lies between the rows of padded buffers."""

    dtype: torch.dtype
    device: torch.device
    layout: str = "contiguous"
    seed: int = 0
    guards: list[Tensor] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    @property
    def accumulator(self) -> torch.dtype:
        """What sums are kept in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal, in the dtype of the case or another; large tensors a block of rows at a time."""
        dtype = dtype or self.dtype
        count = 1
        for n in size:
            count *= n
        if dtype in (torch.float32, torch.float64) or count < 1 << 26:
            return torch.randn(*size, generator=self._generator, device=self.device).to(dtype)
        out = torch.empty(*size, dtype=dtype, device=self.device)
        for rows in out.view(-1).split(1 << 26):
            rows.copy_(torch.randn(rows.shape[0], generator=self._generator, device=self.device))
        return out

    def matrix(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix in the layout of the case."""
        if self.layout == "padded":
            return self.randn(rows, columns + GAP, dtype=dtype)[:, :columns]
        if self.layout == "transposed":
            return self.randn(columns, rows, dtype=dtype).T
        return self.randn(rows, columns, dtype=dtype)

    def buffer(self, rows: int, columns: int) -> Tensor:
        """An accumulator that already holds something; in the padded layout with watched gaps between its rows."""
        if self.layout != "padded":
            return self.randn(rows, columns, dtype=self.accumulator)
        full = self.randn(rows, columns + GAP, dtype=self.accumulator)
        self.guards.append(full[:, columns:])
        return full[:, :columns]

    def layer(self, shape: Shape, lengths: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``g [N, d_out]``, ``a [N, d_in]`` and offsets, on the CPU unless the layout is "device offsets"."""
        lengths = shape.lengths if lengths is None else lengths
        n = sum(lengths)
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        if self.layout == "device offsets":
            offsets = offsets.to(self.device)
        return self.matrix(n, shape.d_out), self.matrix(n, shape.d_in), offsets

    def basis(self, d: int) -> Tensor:
        """A dense orthogonal matrix, rounded to the dtype of the case.

        Large ones are cosine transforms with random signs and a random order of rows: a QR factorisation of that size
        would take longer than what is measured.
        """
        if d <= 512:
            return torch.linalg.qr(self.randn(d, d, dtype=torch.float32)).Q.to(self.dtype)
        order = torch.randperm(d, generator=self._generator, device=self.device).double()
        columns = torch.arange(d, device=self.device, dtype=torch.float64)
        full = torch.cos(torch.outer(order + 0.5, columns) * (math.pi / d)).mul_((2 / d) ** 0.5)
        full[:, 0] *= 0.5**0.5
        return full.to(self.dtype) * self.randn(d, dtype=torch.float32).sign().to(self.dtype)

    def spectrum(self, rows: int, columns: int) -> Tensor:
        """Positive, like corrected eigenvalues; float32, as they are kept."""
        return self.randn(rows, columns, dtype=self.accumulator).square_().add_(0.01)


@dataclasses.dataclass(frozen=True)
class Op:
    """One op: its inputs, its variants (the ``timed`` ones are what a benchmark runs), and the work of one call.

    ``sums_in_one`` says that the op is one contraction with nothing between input and sum that could be rounded: then
    a half-precision kernel must be as exact as float32 sums are. Otherwise it may round intermediate factors as plain
    torch in the same dtype does (formulations.py).
    """

    name: str
    make: Callable[[Inputs, Shape, str], tuple[Any, ...]]
    flops: Callable[[Shape, str], float]
    bytes: Callable[[Shape, str, int], float]
    variants: tuple[str, ...] = ("",)
    timed: tuple[str, ...] = ("",)
    accumulates: bool = False
    sums_in_one: bool = True


def _covariance(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    bias = variant != ""
    keep = torch.arange(s.tokens, device=x.device) % 3 != 1 if bias else None
    return x.buffer(s.d_in + bias, s.d_in + bias), x.matrix(s.tokens, s.d_in), bias, keep


def _squared(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    return x.buffer(s.d_out, s.d_in), *x.layer(s)


def _precondition(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    V = x.randn(min(s.queries, 4), s.d_out, s.d_in)
    if x.layout == "transposed":
        V = x.randn(min(s.queries, 4), s.d_in, s.d_out).transpose(1, 2)
    U_S = None if variant == "right" else x.basis(s.d_out)
    U_A = None if variant == "left" else x.basis(s.d_in)
    return V, U_S, U_A, x.spectrum(s.d_out, s.d_in), 0.3


def _query_lengths(s: Shape) -> tuple[int, ...]:
    return (s.query_length,) * min(s.queries, 4) if s.query_length else s.lengths


def _low_rank_precondition(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    g, a, offsets = x.layer(s, _query_lengths(s))
    return g, a, offsets, x.basis(s.d_out), x.basis(s.d_in), x.spectrum(s.d_out, s.d_in), 0.3, s.rank, 1, 7


def _columns(s: Shape, variant: str) -> int:
    return s.tokens if variant == "per token" else s.sequences


def _dense(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    g, a, offsets = x.layer(s)
    scores = x.buffer(s.queries, _columns(s, variant))
    return scores, g, a, offsets, x.randn(s.queries, s.d_out, s.d_in), variant == "per token"


def _low_rank(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    g, a, offsets = x.layer(s)
    L, R = x.randn(s.queries, s.d_out, s.rank), x.randn(s.queries, s.rank, s.d_in)
    return x.buffer(s.queries, _columns(s, variant)), g, a, offsets, L, R, variant == "per token"


def _other_lengths(s: Shape) -> tuple[int, ...]:
    return s.lengths[: s.pairs] if s.pairs else (5, 0, 2)


def _dot(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    return *x.layer(s), *x.layer(s, _other_lengths(s))


def _norm(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    return x.layer(s)


def _project(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    g, a, offsets = x.layer(s)
    k_g, k_a = s.k, s.k if s.k > 16 else s.k + 1
    if variant in ("", "bfloat16", "int8", "sign"):
        # scaled as drawn ones are, so that magnitudes are those of use
        P_g, P_a = x.randn(s.d_out, k_g) * k_g**-0.5, x.randn(s.d_in, k_a) * k_a**-0.5
        return g, a, offsets, P_g, P_a, k_g, k_a, 0, "rademacher", variant or "float32"
    distribution = "normal" if variant == "drawn normal" else "rademacher"
    return g, a, offsets, None, None, k_g, k_a, 1 << 40, distribution, "float32"


def _random(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    return x.matrix(s.batch, s.flat or s.d_in), s.sketch, (1 << 40) + 3, variant or "rademacher"


def _sparse(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    return x.matrix(s.batch, s.flat or s.d_in), s.sketch, (1 << 40) + 3, s.nnz


def _sparse_factors(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    return *x.layer(s), s.sketch, (1 << 40) + 3, s.nnz


def _scan(x: Inputs, s: Shape, variant: str) -> tuple[Any, ...]:
    queries = x.randn(s.queries, s.width)
    scale = None
    if variant == "int8":
        rows = torch.randint(-127, 128, (s.rows, s.width), generator=x._generator, device=x.device, dtype=torch.int8)
        scale = x.spectrum(1, s.rows)[0].float()
        if x.layout == "padded":
            rows = torch.nn.functional.pad(rows, (0, GAP))[:, : s.width]
    elif variant == "1bit":
        rows = torch.randint(
            0, 256, (s.rows, (s.width + 7) // 8), generator=x._generator, device=x.device, dtype=torch.uint8
        )
        if s.width % 8 and s.rows:
            rows[:, -1] &= 2 ** (s.width % 8) - 1  # as pack_signs leaves them: no bits past the last element
        queries = queries if x.layout == "padded" else pack_signs(queries)
    else:
        rows = x.matrix(s.rows, s.width)
    return queries, rows, s.top, variant, scale


def _element(variant: str, size: int) -> float:
    return {"int8": 1.0, "1bit": 0.125}.get(variant, float(size))


def _layer_bytes(s: Shape, size: int, tokens: int | None = None) -> float:
    return float(size) * (s.tokens if tokens is None else tokens) * (s.d_out + s.d_in)


def _sketch_flops(s: Shape, _: str) -> float:
    return float(sum(costs.sketch_flops(t, s.d_out, s.d_in, s.rank) for t in _query_lengths(s)))


def _query_tokens(s: Shape) -> int:
    return sum(_query_lengths(s))


def _score_flops(s: Shape, variant: str) -> float:
    if variant == "per token":
        return 2.0 * s.tokens * s.queries * s.d_out * s.d_in
    return float(costs.dense_scores_flops(s.tokens, s.d_out, s.d_in, s.queries, s.sequences))


def _low_rank_flops(s: Shape, variant: str) -> float:
    direct = costs.low_rank_scores_flops(s.tokens, s.d_out, s.d_in, s.queries, s.rank)
    if variant == "per token":
        return float(direct)
    rebuilt = 2 * s.queries * s.rank * s.d_out * s.d_in
    return float(min(direct, rebuilt + costs.dense_scores_flops(s.tokens, s.d_out, s.d_in, s.queries, s.sequences)))


def _dot_flops(s: Shape, _: str) -> float:
    other = _other_lengths(s)
    sizes = (s.tokens, sum(other), s.d_out, s.d_in)
    return float(min(costs.ghost_dot_flops(*sizes), costs.materialised_dot_flops(*sizes, s.sequences, len(other))))


def _norm_flops(s: Shape, _: str) -> float:
    each = (
        min(costs.ghost_norm_flops([t], s.d_out, s.d_in), costs.materialised_norm_flops([t], s.d_out, s.d_in))
        for t in s.lengths
    )
    return float(sum(each))


_SCORES = ("", "per token")

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "accumulate_covariance",
            _covariance,
            lambda s, v: 1.0 * s.tokens * s.d_in * (s.d_in + 1),
            lambda s, v, e: 1.0 * e * s.tokens * s.d_in + 4.0 * s.d_in * (s.d_in + 1),
            ("", "bias and mask"),
            accumulates=True,
        ),
        Op(
            "accumulate_squared_gradients",
            _squared,
            lambda s, v: 2.0 * s.tokens * s.d_out * s.d_in,
            lambda s, v, e: _layer_bytes(s, e) + 8.0 * s.d_out * s.d_in,
            accumulates=True,
        ),
        Op(
            "precondition",
            _precondition,
            lambda s, v: 4.0 * min(s.queries, 4) * s.d_out * s.d_in * (s.d_out + s.d_in),
            lambda s, v, e: (
                (e + 4.0) * min(s.queries, 4) * s.d_out * s.d_in + e * (s.d_out**2 + s.d_in**2) + 4.0 * s.d_out * s.d_in
            ),
            ("", "left", "right"),
            sums_in_one=False,
        ),
        Op(
            "precondition_low_rank",
            _low_rank_precondition,
            _sketch_flops,
            lambda s, v, e: (
                _layer_bytes(s, e, _query_tokens(s))
                + e * (s.d_out**2 + s.d_in**2)
                + 4.0 * s.d_out * s.d_in
                + 4.0 * len(_query_lengths(s)) * s.rank * (s.d_out + s.d_in)
            ),
            sums_in_one=False,
        ),
        Op(
            "dense_scores",
            _dense,
            _score_flops,
            lambda s, v, e: (
                _layer_bytes(s, e) + 1.0 * e * s.queries * s.d_out * s.d_in + 8.0 * s.queries * _columns(s, v)
            ),
            _SCORES,
            accumulates=True,
            sums_in_one=False,
        ),
        Op(
            "low_rank_scores",
            _low_rank,
            _low_rank_flops,
            lambda s, v, e: (
                _layer_bytes(s, e)
                + 1.0 * e * s.queries * s.rank * (s.d_out + s.d_in)
                + 8.0 * s.queries * _columns(s, v)
            ),
            _SCORES,
            accumulates=True,
            sums_in_one=False,
        ),
        Op("gradient_dot", _dot, _dot_flops, lambda s, v, e: _layer_bytes(s, e, s.tokens + sum(_other_lengths(s)))),
        Op("gradient_norm", _norm, _norm_flops, lambda s, v, e: _layer_bytes(s, e) + 4.0 * s.sequences),
        Op(
            "project_gradients",
            _project,
            lambda s, v: 2.0 * s.tokens * s.k * (s.d_out + s.d_in + s.k),
            lambda s, v, e: (
                _layer_bytes(s, e)
                + (0.0 if v.startswith("drawn") else e * s.k * (s.d_out + s.d_in))
                + 4.0 * s.sequences * s.k**2
            ),
            ("", "drawn", "drawn normal", "bfloat16", "int8", "sign"),
            ("", "drawn"),
            sums_in_one=False,
        ),
        Op(
            "random_projection",
            _random,
            lambda s, v: 2.0 * s.batch * s.flat * s.sketch,
            lambda s, v, e: 1.0 * e * s.batch * s.flat + 4.0 * s.batch * s.sketch,
            ("rademacher", "normal"),
            ("rademacher",),
        ),
        Op(
            "sparse_projection",
            _sparse,
            lambda s, v: 2.0 * s.batch * s.flat * s.nnz,
            lambda s, v, e: 1.0 * e * s.batch * s.flat + 4.0 * s.batch * s.sketch,
        ),
        Op(
            "sparse_projection_factors",
            _sparse_factors,
            lambda s, v: 2.0 * s.tokens * s.d_out * s.d_in,
            lambda s, v, e: _layer_bytes(s, e) + 4.0 * s.sequences * s.sketch,
            sums_in_one=False,
        ),
        Op(
            "scan_topk",
            _scan,
            lambda s, v: 2.0 * s.queries * s.rows * s.width,
            lambda s, v, e: (
                _element(v, e) * s.rows * s.width + 1.0 * e * s.queries * s.width + 12.0 * s.queries * s.top
            ),
            ("bfloat16", "int8", "1bit"),
            ("bfloat16", "int8", "1bit"),
        ),
    )
    if op.name in SCHEMAS
}
"""Every op of ``torch.ops.pyinf``, by name."""


def backends(op: str) -> list[str]:
    """The backends that are registered for an op, in the order in which "auto" asks them."""
    return [entry.backend for entry in registry._implementations[op]]


def supports(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """None where ``backend`` can serve this call, else its reason."""
    for entry in registry._implementations[op]:
        if entry.backend == backend:
            return entry.check(*args) if entry.check is not None else None
    return registry._NOT_HERE[backend]


@contextlib.contextmanager
def forced(op: str, backend: str) -> Iterator[None]:
    """``backend`` for ``op``; "torch" and "reference" for every op, so that what they call is theirs as well."""
    with registry.use_backend(backend, None if backend in ("torch", "reference") else op):
        yield


def call(op: str, backend: str, args: tuple[Any, ...]) -> Any:
    """One call through ``torch.ops.pyinf`` with the backend forced."""
    with forced(op, backend):
        return function(op)(*args)


@functools.cache
def function(op: str) -> Callable[..., Any]:
    """``torch.ops.pyinf.<op>``."""
    return getattr(torch.ops.pyinf, op)
