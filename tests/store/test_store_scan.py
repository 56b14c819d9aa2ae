"""Streaming scans against all scores in float64."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from pyinf.errors import ConfigError, NonFiniteError
from pyinf.store import scan as scan_module
from pyinf.store.format import StoreSpec
from pyinf.store.quantise import FORMATS
from pyinf.store.scan import all_scores, row_scores, scan
from pyinf.store.sections import layout, query_width, section_scores
from pyinf.store.tail import Rows
from pyinf.store.topk import TopK
from pyinf.store.writer import StoreWriter
from tests.store.store_data import PARTS, VECTORS, build, rows_of, spec

ONE = [("", "vector", (45,))]


def exact(store, queries, norms: bool) -> torch.Tensor:
    """Float64 scores of the rows as the format holds them."""
    scores = section_scores(queries.double(), store.rows(0, store.count).double(), store.sections)
    if norms:
        scores = scores / torch.from_numpy(store.norms).double()
    return scores


def check(found, wanted: torch.Tensor, k: int, tolerance: float) -> None:
    values, rows = found
    assert values.shape == rows.shape == (wanted.shape[0], min(k, wanted.shape[1]))
    best = wanted.sort(dim=1, descending=True, stable=True).values[:, :k]
    torch.testing.assert_close(values.double(), best, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values.double(), wanted.gather(1, rows), rtol=tolerance, atol=tolerance)
    assert all(len(set(row)) == len(row) for row in rows.tolist())


@pytest.mark.parametrize("normalise", ["none", "norm"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("parts", [PARTS, VECTORS, ONE], ids=["factors", "vectors", "one"])
def test_the_best_of_every_query(tmp_path, format, parts, normalise):
    store = build(tmp_path / "s", spec(format, parts), 61, shard_rows=23)
    queries = torch.randn(5, query_width(store.sections), generator=torch.Generator().manual_seed(9))
    wanted = exact(store, queries, normalise == "norm")
    for k, block_rows in ((1, 4), (7, 10), (61, None), (200, 9)):
        check(scan(store, queries, k, block_rows, normalise), wanted, k, 2e-5)
    found = all_scores(store, queries, 8, normalise)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    part = row_scores(store, queries, 20, 50, normalise)
    torch.testing.assert_close(part.double(), wanted[:, 20:50], rtol=2e-5, atol=2e-5)


def test_a_one_bit_score_is_the_sum_of_scaled_signs(tmp_path):
    store = build(tmp_path / "s", spec("1bit", VECTORS), 20)
    rows = rows_of(store.spec, 20).double()
    queries = torch.randn(3, 49, generator=torch.Generator().manual_seed(1))
    wanted = torch.zeros(3, 20, dtype=torch.float64)
    for section in store.sections:
        part = rows[:, section.offset : section.stop]
        scale = part.abs().mean(1).to(torch.bfloat16).double()
        signs = torch.where(part < 0, -1.0, 1.0).double()
        wanted += (queries[:, section.offset : section.stop].double() @ signs.T) * scale
    torch.testing.assert_close(all_scores(store, queries).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [VECTORS, ONE], ids=["vectors", "one"])
@pytest.mark.parametrize("normalise", ["none", "norm"])
def test_the_coarse_scan_takes_signs_of_both(tmp_path, parts, normalise, monkeypatch):
    store = build(tmp_path / "s", spec("1bit", parts), 61, shard_rows=23)
    queries = torch.randn(4, query_width(store.sections), generator=torch.Generator().manual_seed(2))
    rounded = torch.empty_like(queries)
    for section in store.sections:
        part = queries[:, section.offset : section.stop]
        rounded[:, section.offset : section.stop] = torch.where(part < 0, -1.0, 1.0) * part.abs().mean(1, keepdim=True)
    wanted = exact(store, rounded, normalise == "norm")
    check(scan(store, queries, 9, 10, normalise, coarse="sign"), wanted, 9, 1e-2)
    with monkeypatch.context() as patch:  # an extension that was never built
        patch.setattr("pyinf.ops.cpu_backend._missing", "not there")
        check(scan(store, queries, 9, 10, normalise, coarse="sign"), wanted, 9, 1e-2)


def test_equal_scores_come_in_the_order_of_the_rows(tmp_path):
    for parts, format in ((PARTS, "float32"), (ONE, "bfloat16"), (ONE, "1bit"), (ONE, "int8")):
        what = spec(format, parts, norms=False, documents=False)
        directory = tmp_path / f"{format}{len(parts)}"
        rows = rows_of(what, 4).mul(8).round()[torch.arange(40) % 4]  # whole numbers: sums have no rounding
        with StoreWriter(directory, what, shard_rows=13) as writer:
            writer.append(range(40), rows)
        store = writer_store(directory)
        queries = torch.randn(3, query_width(what.sections), generator=torch.Generator().manual_seed(3)).mul(8).round()
        for coarse in (None, "sign") if format == "1bit" else (None,):
            _, found = scan(store, queries, 17, 6, coarse=coarse)
            for row in found.tolist():
                for start in (0, 10):  # ten equal rows, then the next ten
                    group = row[start : start + 10]
                    assert group == sorted(group) and len({r % 4 for r in group}) == 1
                assert row[:10] == list(range(row[0], 40, 4))
        zeros = scan(store, torch.zeros(2, query_width(what.sections)), 5, 6)
        assert zeros[1].tolist() == [[0, 1, 2, 3, 4]] * 2 and not zeros[0].any()


def writer_store(directory):
    from pyinf.store.reader import Store

    return Store.open(directory)


def test_thousands_of_queries_and_any_stream(monkeypatch):
    from pyinf.store import topk

    monkeypatch.setattr(topk, "_REFINE", 1)
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(-9, 10, (3000, 400), generator=generator).float()
    scores[:, 200:] += torch.arange(200) / 10  # rising: every block has better ones
    for step in (1, 37, 400):
        best = TopK(3000, 12)
        for start in range(0, 400, step):
            best.add(scores[:, start : start + step], start)
        values, rows = scores.sort(dim=1, descending=True, stable=True)
        assert torch.equal(best.values, values[:, :12]) and torch.equal(best.rows, rows[:, :12])


def test_rows_of_norm_zero_score_zero(tmp_path):
    what = spec("float32", ONE, documents=False)
    with StoreWriter(tmp_path / "s", what) as writer:
        writer.append([0, 1], torch.ones(2, 45), torch.tensor([0.0, 2.0]))
    store = writer_store(tmp_path / "s")
    assert all_scores(store, torch.ones(1, 45), normalise="norm").tolist() == [[0.0, 22.5]]


def test_what_cannot_be_scanned_is_refused(tmp_path):
    store = build(tmp_path / "s", spec("1bit", PARTS, norms=False), 5)
    queries = torch.zeros(2, query_width(store.sections))
    with pytest.raises(ConfigError, match=r"\[Q, 41\]"):
        scan(store, queries[:, 1:], 3)
    with pytest.raises(ConfigError, match="norms"):
        scan(store, queries, 3, normalise="norm")
    with pytest.raises(ConfigError, match="normalise"):
        scan(store, queries, 3, normalise="cosine")
    with pytest.raises(ConfigError, match="coarse='sign'"):
        scan(store, queries, 3, coarse="sign")
    with pytest.raises(ConfigError, match="unknown coarse"):
        scan(store, queries, 3, coarse="fast")
    with pytest.raises(ConfigError, match="k must"):
        scan(store, queries, -1)
    with pytest.raises(ConfigError, match="float"):
        scan(store, queries.int(), 3)
    with pytest.raises(NonFiniteError, match="query 1"):
        scan(store, torch.stack([queries[0], queries[0] + float("inf")]), 3)
    assert scan(store, queries, 0)[0].shape == (2, 0) and scan(store, queries[:0], 3)[0].shape == (0, 0)


def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """Peak memory of scan, verify and a walk over 64 MiB of rows stays far below them: their map is given back."""
    import resource

    what = StoreSpec("x", layout([("", "vector", (4096,))]), "1bit")
    raw = np.random.default_rng(0).integers(0, 64, (1 << 14, what.row_bytes), np.uint8)  # finite scales
    with StoreWriter(tmp_path / "s", what, shard_rows=1 << 20) as writer:
        for i in range(8):
            ids = np.arange(i << 14, i + 1 << 14)[:, None]
            writer.append_encoded(Rows(ids, raw, None, None))
            writer.flush()
    del raw
    store = writer_store(tmp_path / "s")
    assert store.nbytes > 64 << 20
    monkeypatch.setattr(scan_module, "_hit_rows", lambda store: 1024)
    queries = torch.randn(2, 4096)
    scan(store, queries, 3, coarse="sign")  # buffers of the first call
    del store
    gc.collect()  # and its maps are gone
    store = writer_store(tmp_path / "s")
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # the peak starts again here
    before = peak()
    scan(store, queries, 3, coarse="sign")
    store.verify()
    for start in range(0, store.count, 256):
        store.rows(start, start + 256)
    assert peak() - before < 24 << 20, (before, peak(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak() -> int:
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("VmHWM"))
