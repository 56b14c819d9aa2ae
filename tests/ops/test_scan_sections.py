"""The C++ scan of sign bits: sections with scales, any width, any distance of rows, every instruction set."""

from __future__ import annotations

import pytest
import torch

from pyinf.errors import PyinfError
from pyinf.ops import cpu_backend
from pyinf.ops.quantise import pack_signs

ISAS = ["scalar", "avx2", "avx512", "avx512popcnt"]


def problem(widths, count, n, gap, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries, rows = [], []
    for width in widths:
        queries.append(torch.randn(count, width, generator=generator))
        rows.append(torch.randn(n, width, generator=generator))
    starts = [0]
    for width in widths:
        starts.append(starts[-1] + (width + 7) // 8)
    packed = torch.full((n, starts[-1] + gap), 255, dtype=torch.uint8)  # what lies between rows must not count
    packed[:, : starts[-1]] = torch.cat([pack_signs(r) for r in rows], 1)
    scales = torch.rand(count, len(widths), generator=generator), torch.rand(n, len(widths), generator=generator)
    signs = torch.cat([pack_signs(q) for q in queries], 1)
    exact = torch.zeros(count, n, dtype=torch.float64)
    plain = torch.zeros(count, n, dtype=torch.float64)
    for s, (q, r) in enumerate(zip(queries, rows, strict=True)):
        agree = torch.where(q < 0, -1.0, 1.0).double() @ torch.where(r < 0, -1.0, 1.0).double().T
        plain += agree
        exact += agree * scales[0][:, s : s + 1].double() * scales[1][:, s].double()
    return signs, packed[:, : starts[-1]], starts, scales, exact, plain


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("widths", "count", "n", "gap"),
    [
        ((2048,), 9, 70, 0),
        ((37, 1, 512, 700), 5, 131, 6),
        ((5,), 1, 3, 1),
        (tuple(range(60, 90)), 4, 33, 2),
        ((70000,), 2, 9, 0),
        ((515, 16), 7, 1, 3),
    ],
)
def test_scores_of_every_row(monkeypatch, isa, widths, count, n, gap):
    monkeypatch.setenv("PYINF_CPU_ISA", isa)
    signs, rows, starts, scales, exact, plain = problem(widths, count, n, gap)
    for k in (1, min(n, 7), n):
        values, index = cpu_backend.scan_sections(signs, rows, k, starts, widths, *scales)
        wanted, order = exact.sort(dim=1, descending=True, stable=True)
        torch.testing.assert_close(values.double(), wanted[:, :k], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(exact.gather(1, index), wanted[:, :k], rtol=1e-5, atol=1e-3)
        values, index = cpu_backend.scan_sections(signs, rows, k, starts, widths, None, None)
        wanted, order = plain.sort(dim=1, descending=True, stable=True)  # whole numbers: many are equal
        assert torch.equal(values.double(), wanted[:, :k]) and torch.equal(index, order[:, :k])


@pytest.mark.parametrize("isa", ISAS)
def test_the_answer_does_not_depend_on_threads(monkeypatch, isa):
    signs, rows, starts, scales, _, _ = problem((130, 41), 6, 5000, 4)
    monkeypatch.setenv("PYINF_CPU_ISA", isa)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(cpu_backend.scan_sections(signs, rows, 20, starts, (130, 41), *scales))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_sections_that_do_not_fit_the_rows_are_refused():
    signs, rows, starts, scales, _, _ = problem((16, 8), 2, 5, 0)
    for marks, widths in (([0, 2, 4], (16, 8)), ([1, 2, 3], (16, 8)), (starts, (17, 8)), ([0, 3, 2, 3], (8, 8, 8))):
        with pytest.raises(PyinfError, match="invalid argument"):
            cpu_backend.scan_sections(signs, rows, 2, marks, widths, None, None)
    assert cpu_backend.scan_sections(signs, rows, 0, starts, (16, 8), *scales)[0].shape == (2, 0)
