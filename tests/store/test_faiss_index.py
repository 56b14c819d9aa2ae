"""Indexes through FAISS, against scans of the same store."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from pyinf.errors import ArtifactError, ConfigError, ResourceError
from pyinf.store.faiss_index import build_index, indexes, open_index
from pyinf.store.merge import compact
from pyinf.store.scan import scan
from pyinf.store.sections import query_width
from tests.store.store_data import PARTS, build, spec
from tests.store.test_faults import change

TWO = [("a", "vector", (4, 4)), ("b", "vector", (8,))]


def queries_of(store, count: int = 6) -> torch.Tensor:
    return torch.randn(count, query_width(store.sections), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("normalise", ["none", "norm"])
@pytest.mark.parametrize("format", ["float32", "int8", "1bit"])
def test_a_flat_index_is_a_scan(tmp_path, format, normalise):
    store = build(tmp_path / "s", spec(format, TWO), 300, shard_rows=128)
    build_index(store, "flat", normalise=normalise)
    queries = queries_of(store)
    values, rows = open_index(store).search(queries, 9)
    wanted, best = scan(store, queries, 9, normalise=normalise)
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)
    assert (rows == best).float().mean() > 0.95  # but for scores that differ by their rounding only


def test_approximate_kinds_find_most_rows(tmp_path):
    store = build(tmp_path / "s", spec("bfloat16", TWO), 1500, batch=500)
    queries = queries_of(store, 20)
    best = scan(store, queries, 10)[1]

    def recall(rows: torch.Tensor) -> float:
        return sum(len(set(a) & set(b)) for a, b in zip(rows.tolist(), best.tolist(), strict=True)) / best.numel()

    build_index(store, "ivf", lists=16)
    ivf = open_index(store, "ivf")
    few, all_lists = recall(ivf.search(queries, 10, nprobe=1)[1]), recall(ivf.search(queries, 10, nprobe=16)[1])
    assert few < all_lists and all_lists == pytest.approx(1.0, abs=0.02)
    build_index(store, "pq", code_bytes=12)
    assert recall(open_index(store, "pq").search(queries, 10)[1]) > 0.5
    build_index(store, "ivfpq", name="both", lists=8, code_bytes=12)
    assert recall(open_index(store, "both").search(queries, 10, nprobe=8)[1]) > 0.4
    assert [(i["name"], i["kind"]) for i in indexes(store.directory)] == [
        ("both", "ivfpq"),
        ("ivf", "ivf"),
        ("pq", "pq"),
    ]


def test_a_binary_index_counts_signs(tmp_path):
    store = build(tmp_path / "s", spec("1bit", [("", "vector", (45,))]), 200)
    build_index(store, "binary")
    queries = queries_of(store)
    values, rows = open_index(store, "binary").search(queries, 200)
    signs = torch.where(store.rows(0, 200) < 0, -1.0, 1.0)
    wanted, best = (torch.where(queries < 0, -1.0, 1.0) @ signs.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, wanted) and torch.equal(rows, best)


def test_damaged_and_stale_indexes_are_errors(tmp_path):
    store = build(tmp_path / "s", spec("float32", TWO), 30, shard_rows=8)
    with pytest.raises(ArtifactError, match="no index 'flat'"):
        open_index(store)
    build_index(store)
    path = store.directory / "index-flat.faiss"
    change(path, 200)
    with pytest.raises(ArtifactError, match=r"index-flat\.faiss is missing, damaged"):
        open_index(store)
    change(path, 200)
    assert open_index(store).search(queries_of(store), 2)[0].shape == (6, 2)
    description = json.loads(path.with_suffix(".json").read_text())
    for key, value, match in (("version", 2, "version 2"), ("kind", "hnsw", "hnsw"), ("rows", "0", "other rows")):
        path.with_suffix(".json").write_text(json.dumps({**description, key: value}))
        with pytest.raises(ArtifactError, match=match):
            open_index(store)
    path.with_suffix(".json").write_text(json.dumps(description))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="damaged"):
        open_index(store)
    assert not indexes(compact(store.directory).directory)


def test_what_cannot_be_indexed_is_refused(tmp_path, monkeypatch):
    factors = build(tmp_path / "f", spec("float32", PARTS, norms=False), 5)
    store = build(tmp_path / "s", spec("float32", TWO, norms=False), 5)
    with pytest.raises(ConfigError, match="factors"):
        build_index(factors)
    with pytest.raises(ConfigError, match="unknown kind"):
        build_index(store, "hnsw")
    with pytest.raises(ConfigError, match="1bit"):
        build_index(store, "binary")
    with pytest.raises(ConfigError, match="norms"):
        build_index(store, normalise="norm")
    with pytest.raises(ConfigError, match="256 rows"):
        build_index(store, "pq")
    with pytest.raises(ConfigError, match="lists"):
        build_index(store, "ivf", lists=9)
    with pytest.raises(ConfigError, match="name"):
        build_index(store, name="../x")
    index = build_index(store)
    with pytest.raises(ConfigError, match=r"\[Q, 24\]"):
        index.search(torch.zeros(1, 3), 1)
    with pytest.raises(ConfigError, match="nprobe"):
        index.search(torch.zeros(1, 24), 1, nprobe=3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ResourceError, match=r"pip install 'pyinf\[store\]'"):
        build_index(store)
