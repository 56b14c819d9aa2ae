"""The registered ops under PyTorch's own checks, and traced without a graph break."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import basis, layer, packed_signs, randn

X = layer("odd", torch.float32)
Y = layer("odd", torch.float32, seed=3)
D_OUT, D_IN, COUNT, ROWS = X.g.shape[1], X.a.shape[1], X.offsets.numel() - 1, X.g.shape[0]
LAM = randn(D_OUT, D_IN, seed=0, dtype=torch.float32).abs()
V = randn(2, D_OUT, D_IN, seed=1, dtype=torch.float32)
BASES = basis(D_OUT, 2, torch.float32), basis(D_IN, 3, torch.float32)
ROWS_SIGNS = packed_signs(50, 20, 0)[1]

ARGUMENTS = {
    "accumulate_covariance": [(torch.zeros(D_IN, D_IN), X.a), (torch.zeros(D_IN + 1, D_IN + 1), X.a, True)],
    "accumulate_squared_gradients": [(torch.zeros(D_OUT, D_IN), X.g, X.a, X.offsets)],
    "precondition": [(V, *BASES, LAM, 0.1), (V, None, None, LAM, 0.1)],
    "precondition_low_rank": [(X.g, X.a, X.offsets, *BASES, LAM, 0.1, 4)],
    "dense_scores": [
        (torch.zeros(2, COUNT), X.g, X.a, X.offsets, V),
        (torch.zeros(2, ROWS), X.g, X.a, X.offsets, V, True),
    ],
    "low_rank_scores": [(torch.zeros(2, COUNT), X.g, X.a, X.offsets, V[:, :, :3], V[:, :3])],
    "gradient_dot": [(X.g, X.a, X.offsets, Y.g, Y.a, Y.offsets)],
    "gradient_norm": [(X.g, X.a, X.offsets)],
    "project_gradients": [
        (X.g, X.a, X.offsets, None, None, 3, 5, 1, "rademacher", epilogue)
        for epilogue in ("float32", "bfloat16", "int8", "sign")
    ],
    "random_projection": [(X.a, 7), (X.a, 7, 1, "normal")],
    "sparse_projection": [(X.a, 7, 0, 2)],
    "sparse_projection_factors": [(X.g, X.a, X.offsets, 7, 0, 2)],
    "scan_topk": [(X.a, Y.a, 3), (X.a[:, :20], ROWS_SIGNS, 3, "1bit")],
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op):
    for arguments in ARGUMENTS[op]:
        torch.library.opcheck(getattr(torch.ops.pyinf, op).default, arguments)


def test_compiled_without_a_graph_break():
    def everything(g, a, offsets, V, Lam):
        C, squares = g.new_zeros(D_IN, D_IN), g.new_zeros(D_OUT, D_IN)
        scores = g.new_zeros(V.shape[0], COUNT)
        torch.ops.pyinf.accumulate_covariance(C, a)
        torch.ops.pyinf.accumulate_squared_gradients(squares, g, a, offsets)
        W = torch.ops.pyinf.precondition(V, None, None, Lam, 0.1)
        L, R, energy = torch.ops.pyinf.precondition_low_rank(g, a, offsets, None, None, Lam, 0.1, 3)
        torch.ops.pyinf.dense_scores(scores, g, a, offsets, W)
        torch.ops.pyinf.low_rank_scores(scores, g, a, offsets, L[:2], R[:2])
        dots = torch.ops.pyinf.gradient_dot(g, a, offsets, g, a, offsets)
        norms = torch.ops.pyinf.gradient_norm(g, a, offsets)
        small, _ = torch.ops.pyinf.project_gradients(g, a, offsets, None, None, 2, 3)
        flat = torch.ops.pyinf.random_projection(a, 4) + torch.ops.pyinf.sparse_projection(a, 4)
        values, _ = torch.ops.pyinf.scan_topk(a, a, 2)
        return C.tril(), squares, scores, dots, norms, small, flat, values, energy

    arguments = (X.g, X.a, X.offsets, V, LAM)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(*arguments), everything(*arguments), strict=True):
        assert torch.equal(traced, eager)
