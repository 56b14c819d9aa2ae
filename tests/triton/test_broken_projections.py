"""Gradient products, projections, scans broken on purpose: one line of a copy changes, and a test has to see it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pyinf.ops import use_backend
from pyinf.triton_kernels import gradients, project_gradients, random_projection, scan_topk, sparse_projection
from tests.ops.cases import make_layer
from tests.triton.harness import compare

LAUNCHERS = {
    gradients: "norm_launches",
    project_gradients: "project_launches",
    random_projection: "random_launches",
    sparse_projection: "sparse_launches",
    scan_topk: "scan_launches",
}


def run(module):
    x = make_layer([70, 0, 9], 20, 24, torch.float32)
    if module is gradients:
        x = make_layer([70, 0, 9], 300, 290, torch.float32)  # wide enough for Gram tiles, two of them
        compare(lambda d: [torch.ops.pyinf.gradient_norm(x.g.to(d), x.a.to(d), x.offsets)], "gradient_norm", x.g.dtype)
    elif module is project_gradients:
        op = torch.ops.pyinf.project_gradients
        compare(lambda d: [op(x.g.to(d), x.a.to(d), x.offsets, None, None, 5, 9)[0]], "project_gradients", x.g.dtype)
    elif module is random_projection:
        compare(lambda d: [torch.ops.pyinf.random_projection(x.a.to(d), 130)], "random_projection", x.g.dtype)
    elif module is sparse_projection:
        compare(lambda d: [torch.ops.pyinf.sparse_projection(x.a.to(d), 70, 1, 2)], "sparse_projection", x.g.dtype)
    else:
        rows = torch.randint(-2, 3, (70, 3), generator=torch.Generator().manual_seed(0)).float()
        outs = []
        for backend in ("triton", "reference"):
            with use_backend(backend):
                outs.append(torch.ops.pyinf.scan_topk(rows[:2], rows, 5))
        assert torch.equal(outs[0][1], outs[1][1]), "error of the order, none allowed"


MUTATIONS = [
    (gradients, "tl.where(i == j, 1.0, 2.0)", "1.0"),
    (gradients, "upper = column < tiles - r", "upper = column <= tiles - r"),
    (project_gradients, "inside = token < length\n", "inside = token <= length\n"),
    (project_gradients, "STREAM_A, GIVEN_A, NORMAL, BT", "STREAM_G, GIVEN_A, NORMAL, BT"),
    (random_projection, "draw_tile(first + inner, n * BN,", "draw_tile(first + inner, 0,"),
    (sparse_projection, "step % nnz, buckets", "0, buckets"),
    (scan_topk, "(0xFFFFFFFF - index.to(tl.int64))", "index.to(tl.int64)"),
    (scan_topk, "n = group * GROUP + candidate % GROUP", "n = group * GROUP + candidate % 8"),
]


@pytest.mark.parametrize(("module", "old", "new"), MUTATIONS, ids=[old for _, old, _ in MUTATIONS])
def test_a_broken_line_is_seen(module, old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(scan_topk, "_LEAST_WIDTH", 16)
    source = Path(module.__file__).read_text(encoding="utf-8").replace("_LEAST_WIDTH = 256", "_LEAST_WIDTH = 16")
    assert old in source, f"{module.__name__} has no {old!r} any more"
    path = tmp_path / f"broken_{Path(module.__file__).name}"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"pyinf.triton_kernels.{path.stem}", path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    run(module)
    monkeypatch.setattr(module, LAUNCHERS[module], getattr(copy, LAUNCHERS[module]))
    with pytest.raises(AssertionError, match=r"error|NaN or infinity"):
        run(module)
