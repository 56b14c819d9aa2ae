"""Writing, resuming and reading a store."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch

from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError, NonFiniteError, ResourceError
from pyinf.store import tail as tail_module
from pyinf.store import writer as writer_module
from pyinf.store.format import StoreSpec
from pyinf.store.idset import IdSet, duplicates
from pyinf.store.quantise import FORMATS, decode, encode
from pyinf.store.reader import Store
from pyinf.store.writer import StoreWriter
from tests.store.store_data import append, build, rows_of, spec


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read(tmp_path, format):
    what = spec(format)
    store = build(tmp_path / "s", what, 50, shard_rows=16)
    assert [shard.rows for shard in store.manifest.shards] == [16, 16, 16, 2]
    assert store.count == len(store) == 50 and store.spec == what
    wanted = rows_of(what, 50)
    raw = encode(wanted, what.sections, format)
    assert np.array_equal(store.raw(0, 50), raw) and np.array_equal(store.raw(15, 33), raw[15:33])
    assert torch.equal(store.rows(3, 40), decode(raw, what.sections, format)[3:40])
    assert store.ids.dtype == np.int64 and store.ids.tolist() == list(range(50))
    assert store.norms.dtype == np.float32 and store.norms.tolist() == [float(i + 1) for i in range(50)]
    assert store.document(17) == {"id": 17, "text": "dokument «17»"}
    assert torch.equal(store.take([40, 2, 17, 2]), store.rows(0, 50)[[40, 2, 17, 2]])
    assert torch.equal(torch.cat([decode(r, what.sections, format) for _, _, r in store.blocks(5)]), store.rows(0, 50))
    assert store.verify() == {"rows": 50, "shards": 4, "files": 20}
    assert not store.raw(0, 5).flags.writeable


def test_rows_per_token_have_two_ids_and_the_document_of_their_sequence(tmp_path):
    what = spec(granularity="token")
    with StoreWriter(tmp_path / "s", what, shard_rows=4) as writer:
        for sequence in (5, 3):
            ids = torch.tensor([[sequence, t] for t in range(3)])
            documents = [{"sequence": sequence}, None, None]
            writer.append(ids, rows_of(what, 3, sequence), torch.ones(3), documents)
        with pytest.raises(ConfigError, match=r"\[3, 1\]"):
            writer.append([(3, 1)], rows_of(what, 1), torch.ones(1), None)
    store = Store.open(tmp_path / "s")
    assert store.ids.tolist() == [[5, 0], [5, 1], [5, 2], [3, 0], [3, 1], [3, 2]]
    assert [store.document(i)["sequence"] for i in range(6)] == [5, 5, 5, 3, 3, 3]


def test_a_store_without_norms_documents_or_rows(tmp_path):
    what = spec(norms=False, documents=False)
    store = build(tmp_path / "s", what, 3)
    assert store.norms is None and store.document(1) == {} and len(list((tmp_path / "s").glob("shard-*"))) == 2
    with pytest.raises(ConfigError, match="norms"):
        store.norms_of(0, 1)
    empty = build(tmp_path / "empty", what, 0)
    assert empty.count == 0 and empty.ids.shape == (0,) and empty.rows(0, 0).shape == (0, store.width)
    assert empty.verify()["rows"] == 0
    with pytest.raises(ConfigError, match="not in a store of 3 rows"):
        store.rows(2, 4)


def test_a_finished_store_is_resumed_by_appending(tmp_path):
    what = spec()
    build(tmp_path / "s", what, 10, shard_rows=8)
    writer = StoreWriter(tmp_path / "s", what, shard_rows=8)
    assert writer.finished and writer.done_ids().tolist() == list(range(10))
    append(writer, [10, 12], rows_of(what, 2))
    writer.close()
    with pytest.raises(ArtifactError, match="not finished"):
        Store.open(tmp_path / "s")
    with StoreWriter(tmp_path / "s", what, shard_rows=8) as writer:
        assert not writer.finished and writer.done_ids().tolist() == [*range(10), 10, 12]
    assert Store.open(tmp_path / "s", verify=True).ids.tolist() == [*range(10), 10, 12]


def test_tensors_and_settings_of_the_compressor(tmp_path):
    what, tensors = spec(), {"P": torch.arange(6.0).reshape(2, 3), "nan": torch.tensor([float("nan")])}
    writer = StoreWriter(tmp_path / "s", what, tensors=tensors)
    append(writer, [1, 2], rows_of(what, 2))
    writer.close()
    with pytest.raises(ArtifactError, match="'P'"):
        StoreWriter(tmp_path / "s", what, tensors={**tensors, "P": tensors["P"] + 1})
    writer = StoreWriter(tmp_path / "s", what, tensors=tensors)
    writer.seal()
    part = Store.open(tmp_path / "s", unfinished=True)
    assert part.ids.tolist() == [1, 2] and torch.equal(part.tensors()["P"], tensors["P"])
    store = writer.finish(tensors={"K": torch.eye(2)}, settings={"k": 5})
    assert list(store.tensors()) == ["K"] and store.spec.settings == {"k": 5}
    assert len(list((tmp_path / "s").glob("compressor-*"))) == 1
    store.verify()


def test_an_exception_in_the_block_keeps_what_was_appended(tmp_path):
    what = spec()
    with pytest.raises(ValueError, match="mine"), StoreWriter(tmp_path / "s", what) as writer:
        append(writer, [1, 2], rows_of(what, 2))
        raise ValueError("mine")
    with StoreWriter(tmp_path / "s", what) as writer:
        assert writer.done_ids().tolist() == [1, 2]


def test_bad_batches_are_refused_and_change_nothing(tmp_path):
    what = spec()
    with StoreWriter(tmp_path / "s", what) as writer:
        append(writer, [1, 2, 3], rows_of(what, 3))
        rows, norms = rows_of(what, 2), torch.ones(2)
        for ids, match in (
            ([4, 4], "twice"),
            ([4, 2], r"\[2\] is in the store"),
            ([4], "2 integers"),
            ([1.5, 2], "int"),
        ):
            with pytest.raises(ConfigError, match=match):
                writer.append(ids, rows, norms)
        with pytest.raises(ConfigError, match=r"\[B, 43\]"):
            writer.append([4, 5], rows[:, 1:], norms)
        with pytest.raises(ConfigError, match="norms"):
            writer.append([4, 5], rows)
        with pytest.raises(ConfigError, match="norms must be"):
            writer.append([4, 5], rows, torch.ones(3))
        with pytest.raises(NonFiniteError, match="norm of row"):
            writer.append([4, 5], rows, torch.tensor([1.0, float("nan")]))
        with pytest.raises(ConfigError, match="1 documents for 2 rows"):
            writer.append([4, 5], rows, norms, [{}])
        with pytest.raises(ConfigError, match="JSON"):
            writer.append([4, 5], rows, norms, [{"x": {1, 2}}, {}])
        append(writer, [4, 5], rows)
    assert Store.open(tmp_path / "s", verify=True).ids.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="closed"):
        append(writer, [6], rows[:1])


def test_an_error_of_the_thread_reaches_the_caller(tmp_path):
    what = spec()
    writer = StoreWriter(tmp_path / "s", what)
    append(writer, [1], rows_of(what, 1))
    writer.flush()
    append(writer, [2, 3], torch.stack([torch.zeros(43), torch.full((43,), float("nan"))]))
    with pytest.raises(NonFiniteError, match=r"row of example \[3\]"):
        writer.flush()
    with pytest.raises(NonFiniteError):
        append(writer, [4], rows_of(what, 1))
    with pytest.raises(NonFiniteError):
        writer.finish()
    writer.close()
    with StoreWriter(tmp_path / "s", what) as again:
        assert again.done_ids().tolist() == [1]


def test_appending_does_not_wait_for_the_disk_until_the_queue_is_full(tmp_path, monkeypatch):
    what = spec(documents=False, norms=False)
    gate = threading.Event()
    write = tail_module.Tail.append
    monkeypatch.setattr(tail_module.Tail, "append", lambda self, rows: (gate.wait(20), write(self, rows)))
    monkeypatch.setattr(writer_module, "_QUEUE_BYTES", 5 * 43 * 4 * 10)
    writer = StoreWriter(tmp_path / "s", what)
    rows = rows_of(what, 10)
    for i in range(6):  # one at work, five in the queue
        writer.append(range(i * 10, i * 10 + 10), rows)
        rows.zero_()  # the writer has its own copy
        if i == 0:
            while writer._queue:
                time.sleep(0.01)
    done = threading.Event()
    last = threading.Thread(target=lambda: (writer.append(range(60, 70), rows), done.set()))
    last.start()
    assert not done.wait(0.2)
    gate.set()
    assert done.wait(20)
    last.join()
    store = writer.finish()
    assert store.count == 70 and torch.equal(store.rows(0, 10), rows_of(what, 10))


def test_rows_are_safe_within_the_commit_interval(tmp_path):
    what = spec()
    writer = StoreWriter(tmp_path / "s", what, commit_seconds=0.05)
    append(writer, [1, 2, 3], rows_of(what, 3))
    end = time.monotonic() + 20
    while len(writer.done_ids()) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    assert writer.done_ids().tolist() == [1, 2, 3]
    writer.close()


def test_other_stores_and_other_files_are_not_written_into(tmp_path):
    build(tmp_path / "s", spec(), 3)
    with pytest.raises(ArtifactError, match=r"settings.k: 4 → 5"):
        StoreWriter(tmp_path / "s", spec(settings={"k": 5}))
    with pytest.raises(ArtifactError, match="format"):
        StoreWriter(tmp_path / "s", spec("int8"))
    with pytest.raises(ArtifactError, match="already holds a store"):
        StoreWriter(tmp_path / "s", spec(), resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match=r"thesis\.tex"):
        StoreWriter(tmp_path / "other", spec())
    assert (tmp_path / "other" / "thesis.tex").exists()
    with pytest.raises(ArtifactError, match="is a file"):
        StoreWriter(tmp_path / "other" / "thesis.tex", spec())
    with pytest.raises(ConfigError, match="shard_rows"):
        StoreWriter(tmp_path / "new", spec(), shard_rows=0)
    StoreWriter(tmp_path / "s", spec(pyinf="0.0.1", meta={"x": 1})).close()  # the version may differ


def test_specifications_are_checked():
    with pytest.raises(ConfigError, match="format 'fp4'"):
        spec("fp4")
    with pytest.raises(ConfigError, match="granularity"):
        spec(granularity="word")
    with pytest.raises(ConfigError, match="section"):
        StoreSpec("x", [])
    with pytest.raises(ConfigError, match="column 0, expected 20"):
        StoreSpec("x", [spec().sections[0], spec().sections[0]])
    with pytest.raises(ConfigError, match="JSON"):
        spec(settings={"x": object()}).to_dict()
    assert StoreSpec.from_dict(json.loads(json.dumps(spec().to_dict()))) == spec()
    with pytest.raises(ConfigError, match="colour"):
        StoreSpec.from_dict({**spec().to_dict(), "colour": 1})


def test_many_shards_do_not_hold_a_file_descriptor_each(tmp_path, monkeypatch):
    from pyinf.store import reader

    monkeypatch.setattr(reader, "_MAPS", 3)
    store = build(tmp_path / "s", spec(), 40, shard_rows=2)
    assert [store.document(i)["id"] for i in range(40)] == list(range(40))
    assert len(store._maps) == 3


def test_sets_of_ids():
    seen = IdSet()
    generator = np.random.default_rng(0)
    ids = generator.permutation(np.r_[np.arange(-3000, 5000), 1 << 62, -(1 << 62)])[:, None]
    for part in np.array_split(ids, 9):
        assert seen.add(part) is None
    assert seen.add(np.array([[9000], [77], [-5]])) == 1
    assert seen.add(np.array([[9000], [9001], [9000]])) == 2
    assert seen.add(np.array([[9000]])) is None  # nothing of the two refused batches was added
    pairs = IdSet()
    assert pairs.add(np.array([[1, 2], [2, 1], [1, 1 << 40]])) is None
    assert pairs.add(np.array([[2, 2], [1, 2]])) == 1
    assert seen.add(np.empty((0, 1), np.int64)) is None


@pytest.mark.parametrize("width", [1, 2])
def test_duplicates_are_found_in_pieces(width, monkeypatch):
    from pyinf.store import idset

    monkeypatch.setattr(idset, "_BUCKET", 100)
    ids = np.random.default_rng(0).integers(0, 30 if width == 2 else 600, (1000, width))
    seen, wanted = set(), []
    for i, row in enumerate(map(tuple, ids.tolist())):
        if row in seen:
            wanted.append(i)
        seen.add(row)
    assert duplicates(lambda: np.array_split(ids, 7), 1000).tolist() == wanted
    assert duplicates(lambda: iter(()), 0).tolist() == []


def test_lone_surrogates_in_documents(tmp_path):
    with StoreWriter(tmp_path / "s", spec()) as writer:
        writer.append([0], rows_of(spec(), 1), torch.ones(1), [{"text": "a\ud800b\n"}])
    assert Store.open(tmp_path / "s").document(0) == {"text": "a\ud800b\n"}


def test_resuming_does_not_delete_what_it_does_not_own(tmp_path):
    build(tmp_path / "s", spec(), 3)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    (tmp_path / "s" / "shard-000099.rows").write_text("an orphan of a killed writer")
    StoreWriter(tmp_path / "s", spec()).close()
    assert (tmp_path / "s" / "notes.txt").exists() and not (tmp_path / "s" / "shard-000099.rows").exists()
    assert artifacts.read_manifest(tmp_path / "s", "pyinf.store", 1)["finished"] is True


def test_no_disk_no_lock(tmp_path, monkeypatch):
    import errno

    from pyinf.store import locking

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locking.os, "open", refuse)
    with pytest.raises(ResourceError, match="no space"):
        StoreWriter(tmp_path / "s", spec())
