"""Files into rows: what each format gives, and what each kind of damage is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import make_tokenizer

from pyinf.data import load_examples
from pyinf.data.formats import ENDINGS, read_rows
from pyinf.errors import DataError, PyinfError

ROWS = [{"prompt": 'a, "b"\nc', "response": "Grüße", "label": "x"}, {"prompt": "d", "response": "e", "label": "y"}]


def records(path, **kwargs):
    return [record for _, record in read_rows(path, **kwargs)]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS).encode() + b"\r\n")
    assert records(path) == ROWS
    path.write_text('{"text": "a", "score": NaN, "deep": {"x": [Infinity, 1]}}')
    assert records(path) == [{"text": "a", "score": None, "deep": {"x": [None, 1]}}]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=2))
    assert records(path) == ROWS
    path.write_text("\n".join(json.dumps(r) for r in ROWS))
    assert records(path) == ROWS


@pytest.mark.parametrize(("ending", "comma"), [("csv", ","), ("tsv", "\t")])
def test_csv(tmp_path, ending, comma):
    path = tmp_path / f"a.{ending}"
    text = "\r\n".join(comma.join('"' + r[k].replace('"', '""') + '"' for k in r) for r in ROWS)
    path.write_bytes(("\ufeff" + comma.join(ROWS[0]) + "\r\n" + text).encode())
    assert records(path) == ROWS
    path.write_text(comma.join(["text", "n"]) + "\n" + comma.join(["x" * 200_000, "1"]) + "\n\n")
    assert len(records(path)[0]["text"]) == 200_000


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {"text": ["a", "b"], "ids": [[1, 2], []], "when": [0, 1], "raw": [b"x", None], "f": [float("nan"), 1]}
    )
    table = table.set_column(2, "when", table["when"].cast(pa.timestamp("s")))
    pq.write_table(table, tmp_path / "a.parquet")
    found = records(tmp_path / "a.parquet")
    assert found[0] == {"text": "a", "ids": [1, 2], "when": "1970-01-01 00:00:00", "raw": "x", "f": None}
    json.dumps(found, allow_nan=False)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow; install it: pip install 'pyinf\[data\]'"):
        records(tmp_path / "a.parquet")


def test_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\n two\n \n\nthree\n")
    assert records(path) == [{"text": "one\n two", "line": 3}, {"text": "three", "line": 7}]


def test_folders(tmp_path):
    for name, text in (("b.txt", "two\n\nstill two"), ("a.txt", "one")):
        (tmp_path / name).write_text(text)
    assert records(tmp_path) == [{"text": "one", "file": "a.txt"}, {"text": "two\n\nstill two", "file": "b.txt"}]
    shards = tmp_path / "shards"
    shards.mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        records(shards)
    for i, row in enumerate(ROWS):
        (shards / f"{i}.jsonl").write_text(json.dumps(row))
    assert records(shards) == ROWS
    (shards / "1.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"1\.jsonl, line 1: not JSON"):
        records(shards)
    (shards / "x.csv").write_text("a")
    with pytest.raises(DataError, match="several kinds"):
        records(shards)


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    assert records(tmp_path / "one") == ROWS
    two = datasets.DatasetDict({"train": one, "test": one.select([1])})
    two.save_to_disk(str(tmp_path / "two"))
    assert records(tmp_path / "two") == ROWS and records(tmp_path / "two", split="test") == ROWS[1:]
    with pytest.raises(DataError, match="no split 'tset'; it has train, test"):
        records(tmp_path / "two", split="tset")
    with pytest.raises(DataError, match="has no splits"):
        records(tmp_path / "one", split="train")
    shard = next((tmp_path / "one").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged"):
        records(tmp_path / "one")
    assert [r["label"] for r in load_examples(one, make_tokenizer()).records] == ["x", "y"]


def test_hub_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision=None: {"train": [{"text": name}], "test": []})
    assert records("owner/name") == [{"text": "owner/name"}]

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"no file or folder 'owner/name', and no dataset.*Couldn't reach.*check the name"
    ):
        records("owner/name")


def test_hub_name_offline_for_real(tmp_path):
    code = (
        "from pyinf.data.formats import read_rows\nfrom pyinf.errors import DataError\n"
        "try:\n    list(read_rows('no-such-owner/no-such-name'))\nexcept DataError as e:\n    print('DataError', e)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("DataError no file or folder 'no-such-owner/no-such-name'"), done.stderr


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"line 2: not JSON \(Expecting value at column"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: expected an object with fields, found a list"),
        ("a.jsonl", b'{"a": "\xff"}', "line 1, is not UTF-8; save it as UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "looks like UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08\x00\xff\xff", "looks like gzip"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
        ("a.json", b'{"a": 1}', "expected a list of objects, found a dict"),
        ("a.json", b'[1, {"a": 1}]', "item 1: expected an object with fields, found a number"),
        ("a.json", b'[{"a": 1},\n 2', "line 2: not JSON"),
        ("a.json", b"\xff\xfe", "looks like UTF-16"),
        ("a.csv", b'a,b\n"x,1\n', "not CSV"),
        ("a.csv", b"a,b\n1,2,3\n", r"line 2: 3 fields, but line 1 names 2 columns; quote fields that hold ','"),
        ("a.csv", b"a,a\n1,2\n", "column 'a' stands twice"),
        ("a.csv", b"a,b\n1,\xe9\n", "line 2, is not UTF-8"),
        ("a.txt", b"ok\n\xe9\n", "line 2, is not UTF-8"),
        ("a.parquet", b"PAR1" + b"\0" * 30 + b"PAR1", "damaged or not Parquet"),
        ("a.parquet", b"", "damaged or not Parquet"),
        ("a.xlsx", b"PK", r"unknown ending '\.xlsx'; it may be one of \.csv"),
        ("noending", b"x", r"unknown ending '\(none\)'"),
    ],
)
def test_damage_is_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        records(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_text("[]" if name == "a.json" else "")
    with pytest.raises(DataError, match="is empty; give at least one example"):
        load_examples(tmp_path / name)


def test_missing_files(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no file .*trian\.jsonl; nearest there: train\.jsonl"):
        records(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="there is no folder"):
        records(tmp_path / "none" / "x.jsonl")
    for strange in ("a\0b", "x" * 5000, "./nothing", ""):
        with pytest.raises(DataError):
            records(strange)


@pytest.mark.parametrize("ending", sorted(ENDINGS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path, ending, data, tokenizer):
    path = tmp_path / f"a{ending}"
    path.write_bytes(data)
    try:
        load_examples(path, tokenizer, max_length=64)
    except PyinfError as error:
        assert path.name in str(error)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["text", "prompt", "response", "messages", "input_ids", "labels", "attention_mask", "role"])
message = st.fixed_dictionaries({"role": st.text(max_size=4) | values, "content": st.text(max_size=4) | values})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(names, values | st.lists(message, max_size=3), max_size=4), max_size=3))
def test_any_rows(tmp_path, rows, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for source in (path, rows):
        try:
            data = load_examples(source, tokenizer, vocabulary=len(tokenizer), positions=64, truncate=True)
        except PyinfError:
            continue
        assert len(data.tokens(0)) == len(data[0]["input_ids"]) == len(data[0]["labels"]) > 0
        data.text(0)
        json.dumps(data.records, allow_nan=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_of_a_parquet_file(tmp_path, data):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"] * 20, "ids": [[1, 2], []] * 20}), path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw[: data.draw(st.integers(1, len(raw)))])
    try:
        records(path)
    except PyinfError:
        pass
