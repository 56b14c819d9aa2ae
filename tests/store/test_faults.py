"""Killed writers, full disks, damaged files, two writers at once: nothing lost, a clear error each time."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyinf import artifacts
from pyinf.errors import ArtifactError, ResourceError
from pyinf.store.reader import Store
from pyinf.store.writer import StoreWriter
from tests.store.store_data import append, build, rows_of, spec

TRIALS = Path(__file__).with_name("store_trials.py")


def test_killed_at_twenty_random_moments(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TRIALS), str(tmp_path), "20", "0"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["kills"] == 20 and found["rows"] == 3000 and found["ids"] and found["same"] and found["documents"]
    assert max(found["grew"]) > 0  # some were killed with rows on disk


@pytest.mark.parametrize("cut", ["rows", "ids", "norms", "documents", "lines"])
def test_a_torn_tail_is_cut_to_the_journal(tmp_path, cut):
    what = spec()
    rows = rows_of(what, 30)
    writer = StoreWriter(tmp_path / "s", what, commit_seconds=1e9)
    append(writer, range(10), rows[:10])
    writer.flush()
    append(writer, range(10, 20), rows[10:20])  # not committed: as a kill leaves it, in part on disk
    with writer._change:
        while writer._queue or writer._busy:
            writer._change.wait()
    for handle in writer._tail._files.values():
        handle.flush()
    shutil.copytree(tmp_path / "s", tmp_path / "killed")
    writer.close()
    tail = tmp_path / "killed" / f"shard-000000.{cut}"
    with open(tail, "r+b") as handle:
        handle.truncate(tail.stat().st_size - 3)
    with StoreWriter(tmp_path / "killed", what) as writer:
        assert writer.done_ids().tolist() == list(range(10))
        append(writer, range(10, 30), rows[10:])
    store = Store.open(tmp_path / "killed", verify=True)
    assert store.ids.tolist() == list(range(30)) and torch.equal(store.rows(0, 30), rows)
    assert store.document(25)["id"] == 25


def test_a_tail_that_lost_what_the_journal_promised_is_an_error(tmp_path):
    what = spec()
    writer = StoreWriter(tmp_path / "s", what)
    append(writer, range(10), rows_of(what, 10))
    writer.close()
    path = tmp_path / "s" / "shard-000000.rows"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"shard-000000\.rows is damaged"):
        StoreWriter(tmp_path / "s", what)
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"shard-000000\.rows is damaged: the journal says"):
        StoreWriter(tmp_path / "s", what)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"shard-000000\.rows"):
        StoreWriter(tmp_path / "s", what)
    (tmp_path / "s" / "journal.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"journal\.json is damaged"):
        StoreWriter(tmp_path / "s", what)
    # none of the refused writers kept the lock
    (tmp_path / "s" / "journal.json").unlink()
    StoreWriter(tmp_path / "s", what).close()


@pytest.fixture
def small_disk(tmp_path):
    """A folder and a way to make room: 256 KiB of disk, or files of at most 64 KiB where nothing can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True)
    if mounted.returncode == 0:
        try:
            grow = ["mount", "-o", "remount,size=8m", str(folder)]
            yield folder, lambda: subprocess.run(grow, check=True), "no space left"
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)), "too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("shard_rows", [37, 100_000])
def test_a_full_disk_is_an_error_that_loses_nothing(small_disk, shard_rows):
    folder, make_room, reason = small_disk
    if reason == "too large" and shard_rows == 37:
        shard_rows = 1000  # small files never meet the limit
    what = spec()
    rows = rows_of(what, 3000)
    writer = StoreWriter(folder / "s", what, shard_rows=shard_rows)
    safe = 0
    with pytest.raises(ResourceError, match=f"{reason}|no space left") as caught:
        for start in range(0, 3000, 50):
            append(writer, range(start, start + 50), rows[start : start + 50])
            if start % 500 == 0:
                writer.flush()
                safe = start + 50
        writer.finish()
    assert str(folder / "s") in str(caught.value)
    with pytest.raises(ResourceError):
        append(writer, [5000], rows[:1])
    writer.close()
    assert 0 < safe < 3000
    make_room()
    with StoreWriter(folder / "s", what, shard_rows=shard_rows) as again:
        done = again.done_ids().tolist()
        assert done == list(range(len(done))) and len(done) >= safe
        append(again, range(len(done), 3000), rows[len(done) :])
    store = Store.open(folder / "s", verify=True)
    assert store.ids.tolist() == list(range(3000)) and torch.equal(store.rows(0, 3000), rows)


def test_two_writers_at_once(tmp_path):
    what = spec()
    with StoreWriter(tmp_path / "s", what) as writer:
        append(writer, [1], rows_of(what, 1))
        with pytest.raises(ArtifactError, match=rf"being written by process {os.getpid()} on"):
            StoreWriter(tmp_path / "s", what)
        code = (
            "import os, sys\nfrom pathlib import Path\nfrom pyinf.store.locking import DirectoryLock\n"
            "try:\n    DirectoryLock(Path(sys.argv[1]))\nexcept OSError as error:\n    print(error)\n"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True)
        assert f"being written by process {os.getpid()}" in run.stdout, run.stderr
    StoreWriter(tmp_path / "s", what).close()


def test_many_readers_while_a_writer_is_at_work(tmp_path):
    build(tmp_path / "s", spec(), 20, shard_rows=8)
    readers = [Store.open(tmp_path / "s") for _ in range(5)]
    with StoreWriter(tmp_path / "s", spec(), shard_rows=8) as writer:
        append(writer, [20], rows_of(spec(), 1))
        writer.flush()
        for reader in readers:
            assert torch.equal(reader.rows(0, 20), rows_of(spec(), 20))


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["rows", "ids", "norms", "documents", "lines"])
def test_a_flipped_byte_is_found_and_named(tmp_path, name):
    build(tmp_path / "s", spec("1bit"), 20, shard_rows=8)
    change(tmp_path / "s" / f"shard-000001.{name}", 5)
    with pytest.raises(ArtifactError, match=rf"shard-000001\.{name} is damaged"):
        Store.open(tmp_path / "s", verify=True)


@pytest.mark.parametrize("name", ["rows", "ids", "norms", "documents", "lines"])
def test_a_truncated_or_missing_shard_is_not_opened(tmp_path, name):
    build(tmp_path / "s", spec("1bit"), 20, shard_rows=8)
    path = tmp_path / "s" / f"shard-000002.{name}"
    with open(path, "r+b") as handle:
        handle.truncate(path.stat().st_size - 1)
    with pytest.raises(ArtifactError, match=rf"shard-000002\.{name} is damaged: expected"):
        Store.open(tmp_path / "s")
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"shard-000002\.{name} is missing"):
        Store.open(tmp_path / "s")
    with pytest.raises(ArtifactError, match=rf"shard-000002\.{name} is missing"):
        StoreWriter(tmp_path / "s", spec("1bit"))


def rewrite(directory: Path, **changes) -> None:
    """The manifest with other fields and a checksum that fits."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest.pop("checksum")
    fields = {**{k: v for k, v in manifest.items() if k not in ("format", "version", "files")}, **changes}
    format, version = fields.pop("format", manifest["format"]), fields.pop("version", manifest["version"])
    artifacts.write_manifest(directory, format, version, fields, fields.pop("files", manifest["files"]))


def test_a_manifest_from_the_future_or_of_something_else(tmp_path):
    build(tmp_path / "s", spec(), 20, shard_rows=8)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    for changes, match in (
        ({"version": 2}, "version 2, this pyinf reads version 1"),
        ({"format": "pyinf.factors"}, "pyinf.factors"),
        ({"spec": {**manifest["spec"], "format": "fp4"}}, "unknown format 'fp4'"),
        ({"spec": {**manifest["spec"], "order": "random"}}, "order"),
        ({"shards": [["shard-000000", 9]]}, r"shard-000000\.rows has"),
        ({"shards": [["shard-000007", 8]]}, "damaged"),
        ({"shards": [["shard-000000", -8]]}, "damaged"),
        ({"count": 21}, "damaged"),
        ({"byteorder": "big"}, "byte order"),
        ({"tensors": "compressor.safetensors"}, "tensors"),
        ({"shards": 3}, "damaged"),
    ):
        rewrite(tmp_path / "s", **changes)
        with pytest.raises(ArtifactError, match=match):
            Store.open(tmp_path / "s")
        with pytest.raises(ArtifactError, match=match):
            StoreWriter(tmp_path / "s", spec())
        rewrite(tmp_path / "s", **{k: manifest[k] for k in manifest if k != "checksum"})
    assert Store.open(tmp_path / "s").count == 20
    text = (tmp_path / "s" / "manifest.json").read_text()
    (tmp_path / "s" / "manifest.json").write_text(text.replace('"count": 20', '"count": 12'))
    with pytest.raises(ArtifactError, match="checksum"):
        Store.open(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(text[:50])
    with pytest.raises(ArtifactError, match="not JSON"):
        Store.open(tmp_path / "s")
    with pytest.raises(ArtifactError, match="no directory"):
        Store.open(tmp_path / "nowhere")


def test_damaged_documents_are_named(tmp_path):
    store = build(tmp_path / "s", spec(), 5)
    path = tmp_path / "s" / "shard-000000.documents"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"id":3', b'}"id":3'))
    with pytest.raises(ArtifactError, match=r"shard-000000\.documents is damaged at row 3"):
        store.document(3)
