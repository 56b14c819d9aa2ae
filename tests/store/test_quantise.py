"""Sections and formats of rows, against float64 formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyinf.errors import ConfigError, NonFiniteError
from pyinf.ops.quantise import pack_signs
from pyinf.store import quantise as Q
from pyinf.store import sections as S

MIXED = [
    ("a", "vector", (3, 5)),
    ("b", "vector", (15,)),
    ("c", "factors", (2, 4, 3)),
    ("d", "vector", (9,)),
    ("e", "factors", (1, 2, 2)),
]


def rows(sections: list[S.Section], count: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, S.row_width(sections), generator=generator)
    for i, section in enumerate(sections):  # sizes that have nothing to do with each other
        x[:, section.offset : section.stop] *= 10.0 ** (3 * i - 7)
    return x


def test_layout_counts_columns():
    found = S.layout(MIXED)
    assert [s.offset for s in found] == [0, 15, 30, 44, 53]
    assert [s.width for s in found] == [15, 15, 14, 9, 4]
    assert [s.query_width for s in found] == [15, 15, 12, 9, 4]
    assert S.row_width(found) == 57 and S.query_width(found) == 55
    assert S.query_offsets(found) == [0, 15, 30, 42, 51, 55]
    assert [S.Section.from_dict(s.to_dict()) for s in found] == found


@pytest.mark.parametrize("part", [("a", "vektor", (3,)), ("a", "vector", (3, 0)), ("a", "factors", (3, 4))])
def test_impossible_sections_are_refused(part):
    with pytest.raises(ConfigError, match="section 'a'"):
        S.layout([part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_those_of_the_gradients_written_out(dtype, monkeypatch):
    monkeypatch.setattr(S, "_BLOCK_ELEMENTS", 25)  # several blocks of rows
    sections = S.layout(MIXED)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(4, 55, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 57, generator=generator, dtype=torch.float64)
    wanted = torch.zeros(4, 7, dtype=torch.float64)
    at = 0
    for section in sections:
        q, r = queries[:, at : at + section.query_width], x[:, section.offset : section.stop]
        if section.kind == "factors":
            c, m, n = section.shape
            for i in range(7):
                u, v = r[i, : c * m].reshape(c, m), r[i, c * m :].reshape(c, n)
                for j in range(4):
                    wanted[j, i] += sum(u[k] @ q[j].reshape(m, n) @ v[k] for k in range(c))
        else:
            wanted += q @ r.T
        at += section.query_width
    found = S.section_scores(queries.to(dtype), x.to(dtype), sections)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-4)


def test_widths_that_do_not_fit_are_refused():
    sections = S.layout(MIXED)
    with pytest.raises(ConfigError, match=r"\[Q, 55\]"):
        S.section_scores(torch.zeros(1, 57), torch.zeros(1, 57), sections)
    with pytest.raises(ConfigError, match=r"\[B, 57\]"):
        S.section_scores(torch.zeros(1, 55), torch.zeros(1, 55), sections)
    with pytest.raises(ConfigError, match="int8"):
        Q.row_bytes(sections, "int9")
    with pytest.raises(ConfigError, match="uint8"):
        Q.decode(np.zeros((1, 3), np.uint8), sections, "int8")


@pytest.mark.parametrize("format", Q.FORMATS)
def test_rows_come_back_within_the_error_of_their_format(format):
    sections = S.layout(MIXED)
    x = rows(sections)
    x[2] = 0
    x[3, :15] = 1e-45  # the smallest there is: its scale is subnormal or nothing
    raw = Q.encode(x, sections, format)
    assert raw.dtype == np.uint8 and raw.shape == (7, Q.row_bytes(sections, format))
    found = Q.decode(raw, sections, format)
    assert found.dtype == torch.float32 and bool(torch.isfinite(found).all())
    assert torch.equal(found[2], torch.zeros(57))
    scale = Q.scales(raw, sections, format)
    at = 0
    for index, width in enumerate(Q.groups(sections)):
        part, back = x[:, at : at + width].double(), found[:, at : at + width].double()
        largest = part.abs().amax(1, keepdim=True)
        if format == "float32":
            assert torch.equal(part, back)
        elif format == "bfloat16":
            assert bool(((part - back).abs() <= part.abs() * 2**-8 + 5e-41).all())
        elif format == "float16":
            assert bool(((part - back).abs() <= part.abs() * 2**-11 + largest * 2**-24).all())
        elif format in ("int8", "int4"):
            step = largest / {"int8": 127, "int4": 7}[format]
            assert bool(((part - back).abs() <= 0.505 * step + 2e-45).all())
        else:
            mean = part.abs().mean(1, keepdim=True)
            signs = torch.where(part < 0, -1.0, 1.0)
            assert bool(((back - signs * mean).abs() <= mean * 2**-8 + 1e-44).all())
            assert torch.equal(back, signs * scale[:, index : index + 1].double())
        at += width


def test_bytes_are_as_documented():
    sections = S.layout([("a", "vector", (3,)), ("b", "factors", (1, 2, 2))])
    x = torch.tensor([[1.0, -1.5, 4.0, -8.0, 8.0, 0.5, -0.1875]])
    assert bytes(Q.encode(x, sections, "float32")[0]) == x.numpy().astype("<f4").tobytes()
    one = bytes(Q.encode(x, sections, "1bit")[0])
    assert one[:3] == bytes([0b010, 0b01, 0b10])
    assert torch.frombuffer(bytearray(one[3:]), dtype=torch.bfloat16).tolist() == [2.171875, 8.0, 0.34375]
    four = bytes(Q.encode(x, sections, "int4")[0])
    assert four[:4] == bytes([(8 + 2) | ((8 - 3) << 4), 8 + 7, 1 | (15 << 4), 15 | (5 << 4)])
    eight = bytes(Q.encode(x, sections, "int8")[0])
    assert np.frombuffer(eight[:7], np.int8).tolist() == [32, -48, 127, -127, 127, 127, -48]
    assert np.frombuffer(eight[7:], "<f4").tolist() == pytest.approx([4 / 127, 8 / 127, 0.5 / 127])
    half = bytes(Q.encode(x, sections, "float16")[0])
    assert np.frombuffer(half[:14], "<f2").tolist() == [0.25, -0.375, 1.0, -1.0, 1.0, 1.0, -0.375]
    assert np.frombuffer(half[14:], "<f4").tolist() == [4.0, 8.0, 0.5]


def test_one_section_of_signs_is_what_the_scan_op_reads():
    sections = S.layout([("", "vector", (37,))])
    x = rows(sections, 5)
    raw = Q.encode(x, sections, "1bit")
    assert torch.equal(torch.from_numpy(raw[:, :5].copy()), pack_signs(x))


@pytest.mark.parametrize("format", Q.FORMATS)
def test_nan_and_infinity_never_enter_a_store(format):
    sections = S.layout(MIXED)
    for value in (float("nan"), float("inf")):
        x = rows(sections)
        x[4, 20] = value
        with pytest.raises(NonFiniteError, match="row 4"):
            Q.encode(x, sections, format)
    with pytest.raises(NonFiniteError, match="bfloat16"):
        Q.encode(torch.full((1, 57), 3.4e38), sections, "bfloat16")


@pytest.mark.parametrize("format", Q.FORMATS)
def test_extreme_sizes_and_no_rows(format):
    sections = S.layout([("", "vector", (4,))])
    x = torch.tensor([[1e30, -3e38, 2e-38, 0.0], [1e-42, -1e-44, 0.0, 0.0]])
    if format != "bfloat16":
        found = Q.decode(Q.encode(x, sections, format), sections, format)
        assert bool(torch.isfinite(found).all()) and float(found[0, 1]) < -1e37
    assert Q.encode(x[:0], sections, format).shape == (0, Q.row_bytes(sections, format))
    assert Q.decode(Q.encode(x[:0], sections, format), sections, format).shape == (0, 4)
