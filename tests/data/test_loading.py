"""Rows into tokens: kinds, seams, labels, truncation, and every error with its remedy."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_tokenizers import CHATML, make_tokenizer

from pyinf.data import Examples, load_examples
from pyinf.errors import ConfigError, DataError


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counted_text(examples: Examples, index: int) -> str:
    pieces = examples.tokens(index)
    return "".join(p for p, keep in zip(pieces, (examples[index]["labels"] != -100).tolist(), strict=True) if keep)


def test_text_counts_every_token(tmp_path, tokenizer):
    rows = [{"text": "The capital of France", "label": "geo", "n": 3}, {"text": "Grüße 日本語 🙂", "label": None}]
    data = load_examples(lines(tmp_path / "a.jsonl", rows), tokenizer)
    assert len(data) == 2 and data.records == rows and data.kind == "text"
    assert data[0]["input_ids"].dtype == torch.int64 and torch.equal(data[0]["input_ids"], data[0]["labels"])
    assert data[0]["input_ids"].tolist() == tokenizer(rows[0]["text"])["input_ids"]
    for i, row in enumerate(rows):
        assert data.text(i) == row["text"] and "".join(data.tokens(i)) == row["text"]
        assert len(data.tokens(i)) == data.lengths[i]
    assert data.counted == [n - 1 for n in data.lengths]
    assert set(data[0]) == {"input_ids", "labels"}


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("prompt_loss", [False, True])
def test_the_response_counts(kind, bos, eos, prompt_loss):
    tokenizer = make_tokenizer(kind, bos, eos)
    rows = [{"prompt": "Determine the sentiment: i feel happy", "response": "happy Grüße 🙂"}]
    data = load_examples(rows, tokenizer, prompt_loss=prompt_loss)
    assert data.text(0) == rows[0]["prompt"] + " " + rows[0]["response"]
    ids = data[0]["input_ids"].tolist()
    assert (ids[0] == tokenizer.bos_token_id) is bos and (ids[-1] == tokenizer.eos_token_id) is eos
    if prompt_loss:
        assert torch.equal(data[0]["labels"], data[0]["input_ids"])
    else:
        assert counted_text(data, 0).strip() == rows[0]["response"] + ("</s>" if eos else "")


class Slow:
    """A tokenizer that reports no offsets."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner
        self.all_special_tokens, self.eos_token_id = inner.all_special_tokens, inner.eos_token_id

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False, verbose=True):
        assert not return_offsets_mapping
        return self.inner(text, add_special_tokens=add_special_tokens)

    def decode(self, *args, **kwargs):
        return self.inner.decode(*args, **kwargs)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("joint", [None, "", "\n", " => "])
def test_a_tokenizer_without_offsets_gives_the_same_labels(joint, eos):
    tokenizer = make_tokenizer(bos=True, eos=eos)
    rows = [
        {"prompt": "Determine the sentiment: i feel hap", "response": "py today"},
        {"prompt": "", "response": "happy"},
        {"prompt": "How do you do?", "response": ""},
        {"prompt": "The river 日", "response": "本語 is"},
    ]
    fast = load_examples(rows, tokenizer, separator=joint)
    slow = load_examples(rows, Slow(tokenizer), separator=joint)
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])


def test_a_token_across_the_seam_belongs_to_the_response(tokenizer):
    whole = tokenizer("happy")["input_ids"]
    data = load_examples([{"prompt": "i feel hap", "response": "py"}], tokenizer, separator="")
    assert len(tokenizer(" happy")["input_ids"]) == 1 and len(whole) >= 1
    assert counted_text(data, 0) == " happy"


def test_separator(tokenizer):
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a ", "response": "b"},
        {"prompt": "a", "response": "\nb"},
        {"prompt": "a<|im_end|>", "response": "b"},
        {"prompt": "", "response": "b"},
    ]
    data = load_examples(rows, tokenizer)
    assert [data.text(i) for i in range(5)] == ["a b", "a b", "a\nb", "a<|im_end|>b", "b"]
    assert load_examples(rows, tokenizer, separator="|").text(1) == "a |b"


def test_add_eos(tokenizer):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "</s>"}]
    data = load_examples(rows, tokenizer, add_eos=True)
    assert data[0]["labels"][-1] == tokenizer.eos_token_id and counted_text(data, 0) == " b</s>"
    assert data[1]["input_ids"].tolist().count(tokenizer.eos_token_id) == 1
    assert counted_text(load_examples([{"text": "a"}], tokenizer, add_eos=True), 0) == "a</s>"


def test_messages(tokenizer):
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "How do you do?"},
        {"role": "assistant", "content": "I do well"},
        {"role": "user", "content": "日本語?"},
        {"role": "assistant", "content": "Grüße 🙂"},
    ]
    data = load_examples([{"messages": talk, "label": 1}], tokenizer)
    assert counted_text(data, 0) == "I do well<|im_end|>Grüße 🙂<|im_end|>"
    assert data.text(0).startswith("<|im_start|>system\nbe kind<|im_end|>")
    everything = load_examples([{"messages": talk}], tokenizer, prompt_loss=True)
    assert torch.equal(everything[0]["labels"], everything[0]["input_ids"])
    bos = make_tokenizer(bos=True, template="{{ bos_token }}" + CHATML)
    ids = load_examples([{"messages": talk}], bos)[0]["input_ids"].tolist()
    assert ids.count(bos.bos_token_id) == 1
    alone = load_examples([{"messages": [{"role": "assistant", "content": "Hi"}]}], tokenizer)
    assert "Hi<|im_end|>" in counted_text(alone, 0)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["x"], "message 1 is not an object"),
        ([{"role": "user"}], "content of message 1 is not text"),
        ([{"role": 3, "content": "x"}], "message 1 is not an object"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content of message 1"),
    ],
)
def test_bad_messages(tokenizer, messages, words):
    with pytest.raises(DataError, match=words):
        load_examples([{"messages": messages}], tokenizer)


def test_chat_templates_that_cannot_serve():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(DataError, match=r"needs? a chat template.*--tokenizer"):
        load_examples([{"messages": talk}], make_tokenizer())
    refuses = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"row 1: the chat template refuses these messages.*alternate"):
        load_examples([{"messages": talk}], refuses)
    rewrites = make_tokenizer(template="{{ messages|length }}" + CHATML)
    with pytest.raises(DataError, match=r"rewrites earlier turns.*--prompt-loss"):
        load_examples([{"messages": talk}], rewrites)


def test_token_ids(tmp_path):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "label": "x"},
        {"input_ids": [4, 5], "attention_mask": [0, 1]},
        {"input_ids": [6], "text": "six"},
    ]
    data = load_examples(lines(tmp_path / "a.jsonl", rows), vocabulary=7)
    assert data[0]["labels"].tolist() == [-100, 2, 3] and data[0]["attention_mask"].tolist() == [1, 1, 1]
    assert data[1]["labels"].tolist() == [-100, 5] and data[1]["attention_mask"].tolist() == [0, 1]
    assert data.records == [{"label": "x"}, {}, {"text": "six"}]
    assert data.tokens(0) == ["1 ", "2 ", "3 "] and data.text(0) == "1 2 3 " and data.text(2) == "six"
    assert load_examples(rows[:1], prompt_loss=True)[0]["labels"].tolist() == [1, 2, 3]
    assert load_examples([{"input_ids": torch.tensor([1, 2])}])[0]["input_ids"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, 9]}, "token id 9 is outside the model's vocabulary of 7; use the model's own tokenizer"),
        ({"input_ids": [1, 2], "labels": [1, 9]}, "token id 9 is outside"),
        ({"input_ids": [1, -1]}, "holds -1, which is no token id"),
        ({"input_ids": [2**40]}, "no token id"),
        ({"input_ids": None}, "is null, expected a list of integers"),
        ({"input_ids": "abc"}, "not a list of integers"),
        ({"input_ids": [1.5]}, "not a list of integers"),
        ({"input_ids": [True]}, "not a list of integers"),
        ({"input_ids": [[1]]}, "not a list of integers"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 entries, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [1, -5]}, "negative id; use -100"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "'attention_mask' has 1 entries"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "other than 0 and 1"),
        ({"input_ids": []}, "no tokens"),
    ],
)
def test_bad_token_ids(row, words):
    with pytest.raises(DataError, match=words) as caught:
        load_examples([{"input_ids": [1]}, row], vocabulary=7, name="train")
    assert str(caught.value).startswith("train, row 2:")


def test_length(tokenizer):
    rows = [{"text": "a"}, {"prompt": "x", "text": "The capital of France is Paris and the river is the Seine." * 3}]
    with pytest.raises(DataError, match=r"row 2: \d+ tokens, but the model has 20 positions; .*--truncate"):
        load_examples(rows, tokenizer, positions=20)
    assert load_examples(rows, tokenizer, positions=20, truncate=True).lengths == [1, 20]
    data = load_examples(rows, tokenizer, positions=20, max_length=7)
    assert data.lengths == [1, 7] and "1 of 2 sequences were cut to 7 tokens" in data.notes[0]
    with pytest.raises(ConfigError, match="more than the 20 positions"):
        load_examples(rows, tokenizer, positions=20, max_length=21)
    late = load_examples([{"prompt": "The capital of France is Paris", "response": "b"}], tokenizer, max_length=3)
    assert late.counted == [0] and any("score 0" in note for note in late.notes)


def test_limit_select_and_slices(tokenizer):
    rows = [{"text": f"do {i}"} for i in range(6)]
    data = load_examples(rows, tokenizer, limit=4)
    assert len(data) == 4
    some = data.select([3, 0, -1])
    assert [r["text"] for r in some.records] == ["do 3", "do 0", "do 3"]
    assert torch.equal(some[0]["input_ids"], data[3]["input_ids"]) and some.text(1) == "do 0"
    assert [e["input_ids"].tolist() for e in data[1:3]] == [data[i]["input_ids"].tolist() for i in (1, 2)]
    assert len(data.select([])) == 0
    assert load_examples(data, limit=2).records == rows[:2]
    with pytest.raises(IndexError):
        data[4]
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        load_examples(rows, tokenizer, limit=0)


def test_fingerprint(tokenizer):
    rows = [{"prompt": "a b", "response": "c", "label": 1}, {"prompt": "d", "response": "e", "label": 2}]
    base = load_examples(rows, tokenizer).fingerprint()
    assert base == load_examples([{**r, "label": 0} for r in rows], tokenizer).fingerprint()
    assert base != load_examples(rows[::-1], tokenizer).fingerprint()
    assert base != load_examples(rows, tokenizer, prompt_loss=True).fingerprint()


def test_fields_may_be_renamed(tokenizer):
    rows = [{"instruction": "a", "output": "b", "input": "z"}]
    with pytest.raises(DataError, match=r"row 1: expected a field text.*found 'instruction', 'output', 'input'"):
        load_examples(rows, tokenizer)
    data = load_examples(rows, tokenizer, fields={"prompt": "instruction", "response": "output"})
    assert data.text(0) == "a b"
    with pytest.raises(DataError, match=r"no field 'outptu'; it has .*did you mean 'output'"):
        load_examples(rows, tokenizer, fields={"prompt": "instruction", "response": "outptu"})
    with pytest.raises(ConfigError, match="unknown field 'promt' to rename; did you mean 'prompt'"):
        load_examples(rows, tokenizer, fields={"promt": "instruction"})


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "train is empty"),
        ([{}], "found no field"),
        ([{"txet": "a"}], "--field text=txet"),
        ([{"prompt": "a", "reponse": "b"}], "no field 'response'.*did you mean 'reponse'"),
        ([{"response": "a"}], "no field 'prompt'"),
        ([{"text": "a"}, {"label": 1}], "row 2: no field 'text'; it has 'label'"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "c"}], "row 2: no field 'response'"),
        ([{"text": 3}], "row 1: field 'text' is int, expected text"),
        ([{"prompt": "a", "response": None}], "field 'response' is NoneType"),
        ([{"text": ""}], r"row 1: no tokens \(empty text\?\).*--skip-empty"),
        ([{"text": "a\ud800"}], "surrogate"),
        (["a"], "row 1: expected an object with fields, found a text"),
        (3, "train is a int; give a path"),
        ({"text": "a"}, "train is a dict"),
    ],
)
def test_bad_rows(tokenizer, rows, words):
    with pytest.raises(DataError, match=words):
        load_examples(rows, tokenizer, name="train")


def test_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="holds text, which needs a tokenizer; give one"):
        load_examples([{"text": "a"}])


def test_empty_rows_may_be_skipped(tokenizer):
    data = load_examples([{"text": ""}, {"text": "a"}], tokenizer, skip_empty=True)
    assert data.records == [{"text": "a"}] and "1 rows without a token were skipped" in data.notes[-1]
    with pytest.raises(DataError, match="all of its 1 rows"):
        load_examples([{"text": ""}], tokenizer, skip_empty=True)


def test_tokens_of_broken_characters(tokenizer):
    ids = tokenizer("🙂🙂")["input_ids"]
    data = load_examples([{"input_ids": ids[:-1]}, {"input_ids": ids}], tokenizer)
    assert "".join(data.tokens(1)) == "🙂🙂" and len(data.tokens(1)) == len(ids)
    assert len(data.tokens(0)) == len(ids) - 1 and "".join(data.tokens(0)).startswith("🙂")
