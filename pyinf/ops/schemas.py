"""``torch.ops.pyinf.*``: one schema per op, its dispatch to a backend, and its fake for tracing and compilation.

Mutating ops add into a buffer that the caller owns; functional ops allocate their result. Everything is in the packed
layout (see packing.py). Declared with ``Library.define`` and ``impl``: a call costs about 3 µs, a third of
``custom_op``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.ops.packing import accumulator_dtype
from pyinf.ops.projection_options import EPILOGUES, need_options, result_shape, side_sizes
from pyinf.ops.registry import dispatch

SCHEMAS = {
    "accumulate_covariance": "(Tensor(a!) C, Tensor x, bool bias=False, Tensor? mask=None) -> ()",
    "accumulate_squared_gradients": "(Tensor(a!) Lam, Tensor g, Tensor a, Tensor offsets) -> ()",
    "precondition": "(Tensor V, Tensor? U_S, Tensor? U_A, Tensor Lam, float damping) -> Tensor",
    "precondition_low_rank": (
        "(Tensor g, Tensor a, Tensor offsets, Tensor? U_S, Tensor? U_A, Tensor Lam, float damping, int rank, "
        "int power_iterations=1, int seed=0) -> (Tensor, Tensor, Tensor)"
    ),
    "dense_scores": ("(Tensor(a!) scores, Tensor g, Tensor a, Tensor offsets, Tensor V, bool per_token=False) -> ()"),
    "low_rank_scores": (
        "(Tensor(a!) scores, Tensor g, Tensor a, Tensor offsets, Tensor L, Tensor R, bool per_token=False) -> ()"
    ),
    "gradient_dot": ("(Tensor g1, Tensor a1, Tensor offsets1, Tensor g2, Tensor a2, Tensor offsets2) -> Tensor"),
    "gradient_norm": "(Tensor g, Tensor a, Tensor offsets) -> Tensor",
    "project_gradients": (
        "(Tensor g, Tensor a, Tensor offsets, Tensor? P_g, Tensor? P_a, int k_g, int k_a, int seed=0, "
        "str distribution='rademacher', str epilogue='float32') -> (Tensor, Tensor)"
    ),
    "random_projection": "(Tensor x, int k, int seed=0, str distribution='rademacher') -> Tensor",
    "sparse_projection": "(Tensor x, int k, int seed=0, int nnz=1) -> Tensor",
    "sparse_projection_factors": "(Tensor g, Tensor a, Tensor offsets, int k, int seed=0, int nnz=1) -> Tensor",
    "scan_topk": (
        "(Tensor queries, Tensor rows, int k, str format='bfloat16', Tensor? scale=None) -> (Tensor, Tensor)"
    ),
}

_library = torch.library.Library("pyinf", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


def _accumulate_covariance(C: Tensor, x: Tensor, bias: bool = False, mask: Tensor | None = None) -> None:
    dispatch("accumulate_covariance", C, x, bias, mask)


def _accumulate_squared_gradients(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    dispatch("accumulate_squared_gradients", Lam, g, a, offsets)


def _precondition(V: Tensor, U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> Tensor:
    return dispatch("precondition", V, U_S, U_A, Lam, damping)


def _precondition_low_rank(g, a, offsets, U_S, U_A, Lam, damping, rank, power_iterations=1, seed=0):
    return dispatch("precondition_low_rank", g, a, offsets, U_S, U_A, Lam, damping, rank, power_iterations, seed)


def _dense_scores(scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, V: Tensor, per_token: bool = False) -> None:
    dispatch("dense_scores", scores, g, a, offsets, V, per_token)


def _low_rank_scores(scores, g, a, offsets, L, R, per_token=False) -> None:
    dispatch("low_rank_scores", scores, g, a, offsets, L, R, per_token)


def _gradient_dot(g1, a1, offsets1, g2, a2, offsets2) -> Tensor:
    return dispatch("gradient_dot", g1, a1, offsets1, g2, a2, offsets2)


def _gradient_norm(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    return dispatch("gradient_norm", g, a, offsets)


def _project_gradients(
    g, a, offsets, P_g, P_a, k_g, k_a, seed=0, distribution="rademacher", epilogue="float32"
) -> tuple[Tensor, Tensor]:
    need_options(distribution, epilogue)
    k_g, k_a = side_sizes(P_g, P_a, k_g, k_a)
    return dispatch("project_gradients", g, a, offsets, P_g, P_a, k_g, k_a, seed, distribution, epilogue)


def _random_projection(x: Tensor, k: int, seed: int = 0, distribution: str = "rademacher") -> Tensor:
    need_options(distribution)
    return dispatch("random_projection", x, k, seed, distribution)


def _sparse_projection(x: Tensor, k: int, seed: int = 0, nnz: int = 1) -> Tensor:
    return dispatch("sparse_projection", x, k, seed, nnz)


def _sparse_projection_factors(g, a, offsets, k, seed=0, nnz=1) -> Tensor:
    return dispatch("sparse_projection_factors", g, a, offsets, k, seed, nnz)


def _scan_topk(queries, rows, k, format="bfloat16", scale=None) -> tuple[Tensor, Tensor]:
    return dispatch("scan_topk", queries, rows, k, format, scale)


def _fake_nothing(*args, **kwargs) -> None:
    return None


def _fake_precondition(V, U_S, U_A, Lam, damping):
    return V.new_empty(V.shape, dtype=accumulator_dtype(V, U_S, U_A, Lam))


def _fake_precondition_low_rank(g, a, offsets, U_S, U_A, Lam, damping, rank, power_iterations=1, seed=0):
    d_out, d_in = Lam.shape
    r, queries = min(rank, d_out, d_in), offsets.shape[0] - 1
    dtype = accumulator_dtype(g, a, U_S, U_A, Lam)
    return (
        g.new_empty((queries, d_out, r), dtype=dtype),
        g.new_empty((queries, r, d_in), dtype=dtype),
        g.new_empty((queries,), dtype=dtype),
    )


def _fake_gradient_dot(g1, a1, offsets1, g2, a2, offsets2):
    shape = (offsets1.shape[0] - 1, offsets2.shape[0] - 1)
    return g1.new_empty(shape, dtype=accumulator_dtype(g1, a1, g2, a2))


def _fake_gradient_norm(g, a, offsets):
    return g.new_empty((offsets.shape[0] - 1,), dtype=accumulator_dtype(g, a))


def _fake_project_gradients(g, a, offsets, P_g, P_a, k_g, k_a, seed=0, distribution="rademacher", epilogue="float32"):
    count = offsets.shape[0] - 1
    need_options(distribution, epilogue)
    shape = result_shape(count, *side_sizes(P_g, P_a, k_g, k_a), epilogue)
    dtype = accumulator_dtype(g, a) if epilogue == "float32" else EPILOGUES[epilogue]
    scale = g.new_empty((count if epilogue == "int8" else 0,), dtype=torch.float32)
    return g.new_empty(shape, dtype=dtype), scale


def _fake_projection(x, k, *args, **kwargs):
    return x.new_empty((x.shape[0], k), dtype=accumulator_dtype(x))


def _fake_sparse_projection_factors(g, a, offsets, k, seed=0, nnz=1):
    return g.new_empty((offsets.shape[0] - 1, k), dtype=accumulator_dtype(g, a))


def _fake_scan_topk(queries, rows, k, format="bfloat16", scale=None):
    shape = (queries.shape[0], min(k, rows.shape[0]))
    values = queries.new_empty(shape, dtype=accumulator_dtype(queries, rows))
    return values, queries.new_empty(shape, dtype=torch.int64)


_FAKES = {
    "precondition": _fake_precondition,
    "precondition_low_rank": _fake_precondition_low_rank,
    "gradient_dot": _fake_gradient_dot,
    "gradient_norm": _fake_gradient_norm,
    "project_gradients": _fake_project_gradients,
    "random_projection": _fake_projection,
    "sparse_projection": _fake_projection,
    "sparse_projection_factors": _fake_sparse_projection_factors,
    "scan_topk": _fake_scan_topk,
}

for _name in SCHEMAS:
    _library.impl(_name, globals()["_" + _name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyinf::{_name}", _FAKES.get(_name, _fake_nothing), lib=_library)
