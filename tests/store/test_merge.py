"""Merging and compacting stores."""

from __future__ import annotations

import pytest
import torch

from pyinf import progress
from pyinf.errors import ArtifactError, ConfigError, ResourceError
from pyinf.store import merge as merge_module
from pyinf.store.format import StoreSpec
from pyinf.store.merge import compact, merge
from pyinf.store.reader import Store
from pyinf.store.sections import layout
from pyinf.store.writer import StoreWriter
from tests.store.store_data import append, build, rows_of, spec
from tests.store.test_faults import change
from tests.store.test_store_scan import peak

TENSORS = {"P": torch.arange(6.0)}


def parts(tmp_path, format: str = "int8") -> list[Store]:
    found = []
    for name, first, count, data in (("a", 0, 20, "x"), ("b", 100, 9, "y"), ("c", 50, 1, "z")):
        found.append(build(tmp_path / name, spec(format, data=data), count, first=first, shard_rows=8, tensors=TENSORS))
    return found


def test_merged_rows_are_those_of_the_parts_in_order(tmp_path):
    stores = parts(tmp_path)
    merged = merge([s.directory for s in stores], tmp_path / "out", shard_rows=7)
    assert merged.ids.tolist() == [*range(20), *range(100, 109), 50]
    assert torch.equal(merged.rows(0, 30), torch.cat([s.rows(0, s.count) for s in stores]))
    assert [merged.document(i)["id"] for i in range(30)] == merged.ids.tolist()
    assert merged.norms.tolist() == [float(i + 1) for i in merged.ids]
    assert torch.equal(merged.tensors()["P"], TENSORS["P"])
    assert [m["data"] for m in merged.spec.meta["merged"]] == ["x", "y", "z"] and merged.spec.data not in ("x", "y")
    merged.verify()
    assert merge([s.directory for s in stores], tmp_path / "out", shard_rows=7).count == 30  # nothing left to do


def test_a_killed_merge_goes_on(tmp_path, monkeypatch):
    stores = parts(tmp_path)
    write = StoreWriter.append_encoded
    monkeypatch.setattr(merge_module, "_BLOCK_BYTES", stores[0].spec.row_bytes * 5)
    calls = []

    def stop_after_three(self, rows):
        calls.append(len(rows.ids))
        if len(calls) > 3:
            raise KeyboardInterrupt
        write(self, rows)

    monkeypatch.setattr(StoreWriter, "append_encoded", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        merge([s.directory for s in stores], tmp_path / "out", shard_rows=7)
    monkeypatch.setattr(StoreWriter, "append_encoded", write)
    with pytest.raises(ArtifactError, match="not finished"):
        Store.open(tmp_path / "out")
    with pytest.raises(ArtifactError, match="another store"):
        merge([stores[0].directory, tmp_path / "b"][::-1], tmp_path / "out2") and merge(
            [stores[0].directory, tmp_path / "b"], tmp_path / "out2"
        )
    merged = merge([s.directory for s in stores], tmp_path / "out", shard_rows=7)
    assert merged.ids.tolist() == [*range(20), *range(100, 109), 50]
    merged.verify()


def test_stores_that_differ_are_not_merged(tmp_path):
    build(tmp_path / "a", spec(), 3, tensors=TENSORS)
    build(tmp_path / "format", spec("int8"), 3, first=10, tensors=TENSORS)
    build(tmp_path / "settings", spec(settings={"k": 9}), 3, first=10, tensors=TENSORS)
    build(tmp_path / "tensors", spec(), 3, first=10, tensors={"P": TENSORS["P"] + 1})
    build(tmp_path / "none", spec(), 3, first=10)
    for name, match in (("format", "format"), ("settings", r"settings\.k"), ("tensors", "'P'"), ("none", "'P'")):
        with pytest.raises(ArtifactError, match=match):
            merge([tmp_path / "a", tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="twice"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "out")
    with pytest.raises(ConfigError, match="one of the stores"):
        merge([tmp_path / "a", tmp_path / "format"], tmp_path / "a")
    with pytest.raises(ConfigError, match="at least one"):
        merge([], tmp_path / "out")
    with pytest.raises(ConfigError, match="duplicates"):
        merge([tmp_path / "a"], tmp_path / "out", duplicates="keep")


def test_ids_that_collide(tmp_path):
    a = build(tmp_path / "a", spec(), 10)
    b = build(tmp_path / "b", spec(), 6, first=7)
    with pytest.raises(ArtifactError, match=r"3 ids stand twice, the first \(7\) again in .*b"):
        merge([a.directory, b.directory], tmp_path / "out")
    merged = merge([a.directory, b.directory], tmp_path / "out", duplicates="drop")
    assert merged.ids.tolist() == list(range(13))
    assert torch.equal(merged.rows(0, 13), torch.cat([a.rows(0, 10), b.rows(3, 6)]))
    assert merged.document(12)["id"] == 12


def test_damage_is_not_merged(tmp_path):
    stores = parts(tmp_path)
    change(tmp_path / "b" / "shard-000001.rows", 3)
    with pytest.raises(ArtifactError, match=r"b/shard-000001\.rows is damaged"):
        merge([s.directory for s in stores], tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"b/shard-000001\.rows is damaged"):
        compact(tmp_path / "b")


def test_compacting_keeps_rows_and_readers(tmp_path):
    what = spec("1bit")
    for start in range(0, 40, 4):  # ten shards of four rows
        writer = StoreWriter(tmp_path / "s", what, shard_rows=8, tensors=TENSORS)
        append(writer, range(start, start + 4), rows_of(what, 4, start))
        writer.finish()
    (tmp_path / "s" / "index-flat.faiss").write_bytes(b"of the old rows")
    reader = Store.open(tmp_path / "s")
    assert len(reader.manifest.shards) == 10
    before, documents = reader.rows(0, 40), [reader.document(i) for i in range(40)]
    (tmp_path / "s" / "compacting").mkdir()  # a killed compaction
    (tmp_path / "s" / "compacting" / "shard-000000.rows").write_bytes(b"x")
    store = compact(tmp_path / "s", shard_rows=16)
    assert [shard.rows for shard in store.manifest.shards] == [16, 16, 8]
    assert torch.equal(store.rows(0, 40), before) and [store.document(i) for i in range(40)] == documents
    assert torch.equal(store.tensors()["P"], TENSORS["P"]) and store.spec == what
    store.verify()
    assert torch.equal(reader.rows(0, 40), before)  # still reads the old files
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert len([n for n in names if n.startswith("shard-")]) == 15 and "compacting" not in names
    assert not [n for n in names if n.startswith("index-")]
    with StoreWriter(tmp_path / "s", what) as writer:  # and it can grow again
        append(writer, [77], rows_of(what, 1))
    assert Store.open(tmp_path / "s", verify=True).count == 41


def test_compacting_drops_ids_that_stand_twice(tmp_path, monkeypatch):
    from pyinf.store.idset import IdSet

    monkeypatch.setattr(IdSet, "add", lambda self, ids: None)  # a store of a writer that did not look
    with StoreWriter(tmp_path / "s", spec()) as writer:
        append(writer, [1, 2, 1, 3, 2], rows_of(spec(), 5))
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="2 ids twice, the first at row 2; run: pyinf store compact"):
        Store.open(tmp_path / "s").verify()
    with pytest.raises(ArtifactError, match="twice"):
        StoreWriter(tmp_path / "s", spec())
    store = compact(tmp_path / "s")
    assert store.ids.tolist() == [1, 2, 3] and torch.equal(store.rows(0, 3), rows_of(spec(), 5)[[0, 1, 3]])
    store.verify()


@pytest.mark.parametrize("at", ["rename", "write", "unlink"])
def test_a_compaction_killed_at_any_step_leaves_a_whole_store(tmp_path, monkeypatch, at):
    build(tmp_path / "s", spec(), 20, shard_rows=3)
    wanted = Store.open(tmp_path / "s").rows(0, 20)
    target = merge_module.fmt if at == "write" else merge_module.Path
    real = getattr(target, at)

    def kill(*args, **kwargs):
        where = str(args[0])
        if at == "write" and where.endswith("compacting"):
            return real(*args, **kwargs)
        if at == "unlink" and "shard-000004" not in where:
            return real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(target, at, kill)
    with pytest.raises(KeyboardInterrupt):
        compact(tmp_path / "s")
    monkeypatch.undo()
    store = Store.open(tmp_path / "s", verify=True)
    assert torch.equal(store.rows(0, 20), wanted)
    assert torch.equal(compact(tmp_path / "s").rows(0, 20), wanted)
    StoreWriter(tmp_path / "s", spec()).close()  # deletes what no manifest lists
    assert len(list((tmp_path / "s").glob("shard-*"))) == 5


def test_a_store_that_is_being_written_is_not_compacted(tmp_path):
    build(tmp_path / "s", spec(), 3)
    with StoreWriter(tmp_path / "s", spec()), pytest.raises(ArtifactError, match="being written"):
        compact(tmp_path / "s")
    with pytest.raises(ArtifactError, match="no directory"):
        compact(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_merge_on_a_full_disk_says_so(tmp_path, monkeypatch):
    import errno

    stores = parts(tmp_path)
    monkeypatch.setattr(
        "pyinf.store.tail.os.fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(ResourceError, match="no space left"):
        merge([s.directory for s in stores], tmp_path / "out")
    with pytest.raises(ResourceError, match="no space left"):
        compact(tmp_path / "a")
    assert not (tmp_path / "a" / "compacting").exists()
    monkeypatch.undo()
    assert Store.open(tmp_path / "a", verify=True).count == 20


def test_memory_of_a_merge_does_not_grow_with_the_stores(tmp_path):
    what = StoreSpec("x", layout([("", "vector", (512,))]), "float32")
    for name in "ab":
        with StoreWriter(tmp_path / name, what, shard_rows=4096) as writer:
            for i in range(12):
                first = i * 2048 + (1 << 20) * (name == "b")
                writer.append(range(first, first + 2048), torch.full((2048, 512), float(i)))
                writer.flush()
    merge_module._BLOCK_BYTES, old = 1 << 21, merge_module._BLOCK_BYTES
    try:
        from pyinf.store import writer as writer_module

        limit, writer_module._QUEUE_BYTES = writer_module._QUEUE_BYTES, 1 << 22
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")
        before = peak()
        with progress.use(progress.NullSink()):
            merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", shard_rows=1 << 20)
    finally:
        merge_module._BLOCK_BYTES, writer_module._QUEUE_BYTES = old, limit
    assert merged.nbytes > 96 << 20 and peak() - before < 32 << 20
