"""Records into token sequences: which tokens a row gives, and on which of them the loss counts.

A row is one of four kinds, told by its fields:

``input_ids``
    token ids as they are; ``labels`` (−100 = not counted) and ``attention_mask`` when the row has them.
``messages``
    a conversation, ``[{"role": ..., "content": ...}, ...]``, put through the tokenizer's chat template; the turns of
    the assistant count.
``prompt`` + ``response``
    joined and tokenised as one text; the response counts.
``text``
    every token counts.

Tokens are those the tokenizer gives by itself: its own begin and end tokens (``add_special_tokens``), nothing more
unless ``add_eos`` asks for an end token after the last. A chat template brings its own, so none is added there.
A token that lies across the seam between prompt and response belongs to the response.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyinf import progress
from pyinf.data.chat import Spans, render_messages
from pyinf.data.examples import IGNORE, Examples
from pyinf.data.formats import Row, plain_record, read_rows
from pyinf.errors import ConfigError, DataError

__all__ = ["Examples", "load_examples"]

FIELDS = ("input_ids", "labels", "attention_mask", "messages", "prompt", "response", "text")
_CHUNK = 512
_MAX_ID = 2**31 - 1


# ------------------------------------------------------------------------------------------ from rows to tokens


@dataclass(frozen=True)
class _Rules:
    """How rows become tokens."""

    kind: str
    fields: Mapping[str, str]
    tokenizer: Any
    prompt_loss: bool
    separator: str | None
    add_eos: bool
    vocabulary: int | None
    longest: int | None
    cut: bool

    def field(self, name: str) -> str:
        return self.fields.get(name, name)


@dataclass
class _Tokens:
    ids: list[int]
    labels: list[int] | None
    mask: list[int] | None = None


def load_examples(
    source: Any,
    tokenizer: Any = None,
    *,
    limit: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    prompt_loss: bool = False,
    fields: Mapping[str, str] | None = None,
    split: str | None = None,
    revision: str | None = None,
    separator: str | None = None,
    add_eos: bool = False,
    skip_empty: bool = False,
    vocabulary: int | None = None,
    positions: int | None = None,
    name: str | None = None,
) -> Examples:
    """Read ``source`` and tokenise it.

    Args:
        source: a file, a folder, a hub name (see :func:`pyinf.data.formats.read_rows`) or any iterable of mappings.
        tokenizer: a Hugging Face tokenizer; not needed for rows of token ids.
        limit: use the first ``limit`` rows only.
        max_length: cut every sequence after this many tokens.
        truncate: cut at the model's ``positions``; without it (and without ``max_length``) a longer row is an error.
        prompt_loss: count the prompt (the other turns) as well.
        fields: what the file calls a field, by pyinf's name for it: ``{"prompt": "instruction"}``.
        split, revision: of a dataset folder or hub dataset.
        separator: put between prompt and response. By default a space, or nothing where the prompt ends or the response
            starts with white space, or the prompt ends with a special token.
        add_eos: append the tokenizer's end token where the sequence does not end with it.
        skip_empty: leave out rows without a token instead of raising.
        vocabulary, positions: limits of the model; ids and lengths beyond them are errors.
        name: how errors call the source.

    Raises:
        DataError: empty source, missing or ill-typed field, broken file, id outside the vocabulary, sequence too long.
            It names the file, the line and the remedy.
        ConfigError: an option that cannot work.
    """
    for option, value in (("limit", limit), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1, not {value}")
    if max_length is not None and positions is not None and max_length > positions:
        raise ConfigError(f"max_length {max_length} is more than the {positions} positions of the model; lower it")
    unknown = sorted(set(fields or {}) - set(FIELDS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], FIELDS, n=1, cutoff=0)
        raise ConfigError(f"unknown field {unknown[0]!r} to rename; did you mean {near[0]!r}? ({', '.join(FIELDS)})")
    is_path = isinstance(source, (str, os.PathLike))
    called = name or (str(source) if is_path else "examples")
    if isinstance(source, Examples):
        return source if limit is None else source[:limit]
    rows = read_rows(Path(source) if not isinstance(source, str) else source, split, revision) if is_path else None
    rows = iter(itertools.islice(_memory_rows(source, called) if rows is None else rows, limit))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{called} is empty; give at least one example")
    kind = _kind_of(first, dict(fields or {}), called)
    if kind != "input_ids" and tokenizer is None:
        raise DataError(f"{called} holds {kind}, which needs a tokenizer; give one (--tokenizer), or rows of input_ids")
    if add_eos and getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError("add_eos: the tokenizer has no end token; leave add_eos out, or give another tokenizer")
    longest = max_length if max_length is not None else positions
    cut = truncate or max_length is not None
    rules = _Rules(kind, dict(fields or {}), tokenizer, prompt_loss, separator, add_eos, vocabulary, longest, cut)
    with progress.stage(f"read {Path(called).name}", None, "rows") as stage:
        return _collect(itertools.chain([first], rows), rules, called, skip_empty, stage)


def _memory_rows(source: Any, called: str) -> Iterator[Row]:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"{called} is a {type(source).__name__}; give a path, a hub name or a list of mappings")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas frame
        source = source.to_dict("records")
    for number, item in enumerate(source, 1):
        yield f"row {number}", plain_record(item, f"{called}, row {number}")


def _kind_of(row: Row, fields: dict[str, str], called: str) -> str:
    place, record = row
    present = {name for name in FIELDS if fields.get(name, name) in record}
    for theirs in fields.values():
        if theirs not in record:
            raise _missing(called, place, record, theirs)
    for kind in ("input_ids", "messages"):
        if kind in present:
            return kind
    if {"prompt", "response"} <= present:
        return "prompt + response"
    if "text" in present:
        return "text"
    half = present & {"prompt", "response"}
    if half:
        raise _missing(called, place, record, ({"prompt", "response"} - half).pop())
    raise DataError(
        f"{called}, {place}: expected a field text, or prompt and response, or messages, or input_ids; found "
        f"{_found(record)}{_suggest(record)}"
    )


def _found(record: Mapping[str, Any]) -> str:
    names = [repr(key) for key in record]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no field"


def _suggest(record: Mapping[str, Any]) -> str:
    for name in ("text", "prompt", "response", "messages", "input_ids"):
        near = difflib.get_close_matches(name, list(record), n=1)
        if near:
            return f"; name it with --field {name}={near[0]}"
    return "; rename one, or say which with --field text=NAME"


def _missing(called: str, place: str, record: Mapping[str, Any], name: str) -> DataError:
    near = difflib.get_close_matches(name, list(record), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"{called}, {place}: no field {name!r}; it has {_found(record)}{hint} (rename with --field)")


def _collect(rows: Iterator[Row], rules: _Rules, called: str, skip_empty: bool, stage: progress.Stage) -> Examples:
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    cut = uncounted = empty = 0
    while chunk := list(itertools.islice(rows, _CHUNK)):
        for (place, record), tokens in zip(chunk, _tokenise(chunk, rules, called), strict=True):
            where = f"{called}, {place}"
            if not tokens.ids:
                if not skip_empty:
                    raise DataError(
                        f"{where}: no tokens (empty text?); remove the row, or skip such rows: --skip-empty"
                    )
                empty += 1
                continue
            _check_vocabulary(tokens, rules, where)
            if rules.longest is not None and len(tokens.ids) > rules.longest:
                if not rules.cut:
                    raise DataError(
                        f"{where}: {len(tokens.ids)} tokens, but the model has {rules.longest} positions; "
                        f"cut it (--truncate, or --max-length {rules.longest}) or split it"
                    )
                tokens = _cut(tokens, rules.longest)
                cut += 1
            own = np.asarray(tokens.ids if tokens.labels is None else tokens.labels, np.int32)
            uncounted += bool((own[1:] == IGNORE).all())
            ids.append(np.asarray(tokens.ids, np.int32))
            labels.append(own)
            masks.append(
                np.ones(len(tokens.ids), np.uint8) if tokens.mask is None else np.asarray(tokens.mask, np.uint8)
            )
            drop = {rules.field(key) for key in ("input_ids", "labels", "attention_mask")}
            records.append({k: v for k, v in record.items() if k not in drop} if rules.kind == "input_ids" else record)
        stage.advance(len(chunk))
    if not records:
        raise DataError(f"{called} is empty: all of its {empty} rows are without a token; give at least one example")
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(part) for part in ids], out=offsets[1:])
    flat, flat_labels, flat_masks = np.concatenate(ids), np.concatenate(labels), np.concatenate(masks)
    notes = []
    if cut:
        notes.append(f"{called}: {cut} of {len(ids)} sequences were cut to {rules.longest} tokens")
    if uncounted:
        notes.append(f"{called}: {uncounted} of {len(ids)} sequences have no token that the loss counts; they score 0")
    if empty:
        notes.append(f"{called}: {empty} rows without a token were skipped")
    return Examples(
        called,
        rules.kind,
        flat,
        offsets,
        None if np.array_equal(flat, flat_labels) else flat_labels,
        None if flat_masks.all() else flat_masks,
        records,
        lambda record: _readable(record, rules),
        rules.tokenizer,
        notes,
    )


def _cut(tokens: _Tokens, length: int) -> _Tokens:
    labels = None if tokens.labels is None else tokens.labels[:length]
    return _Tokens(tokens.ids[:length], labels, None if tokens.mask is None else tokens.mask[:length])


def _check_vocabulary(tokens: _Tokens, rules: _Rules, where: str) -> None:
    if rules.vocabulary is None:
        return
    bad = next((i for i in tokens.ids if i >= rules.vocabulary), None)
    if bad is None and tokens.labels is not None:
        bad = next((i for i in tokens.labels if i >= rules.vocabulary), None)
    if bad is not None:
        raise DataError(
            f"{where}: token id {bad} is outside the model's vocabulary of {rules.vocabulary}; "
            f"use the model's own tokenizer"
        )


def _string(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
    return value


def _readable(record: Mapping[str, Any], rules: _Rules) -> str | None:
    if rules.kind == "input_ids":
        text = record.get(rules.field("text"))
        return text if isinstance(text, str) else None
    return _render(record, rules, "")[0]


def _render(record: Mapping[str, Any], rules: _Rules, where: str) -> tuple[str, Spans | None]:
    """The text of a row and the character spans that count (None: all)."""
    if rules.kind == "messages":
        return render_messages(record[rules.field("messages")], rules.tokenizer, where, spans=not rules.prompt_loss)
    if rules.kind == "text":
        return _string(record, rules.field("text"), where), None
    prompt = _string(record, rules.field("prompt"), where)
    response = _string(record, rules.field("response"), where)
    joint = rules.separator
    if joint is None:
        special = tuple(token for token in getattr(rules.tokenizer, "all_special_tokens", ()) if token)
        closed = not prompt or prompt[-1].isspace() or response[:1].isspace() or prompt.endswith(special)
        joint = "" if closed else " "
    text = prompt + joint + response
    return text, None if rules.prompt_loss else [(len(prompt), len(text))]


def _tokenise(chunk: list[Row], rules: _Rules, called: str) -> Iterator[_Tokens]:
    needed = {"prompt + response": ("prompt", "response")}.get(rules.kind, (rules.kind,))
    for place, record in chunk:
        for name in needed:
            if rules.field(name) not in record:
                raise _missing(called, place, record, rules.field(name))
    if rules.kind == "input_ids":
        for place, record in chunk:
            yield _given(record, rules, f"{called}, {place}")
        return
    rendered = [_render(record, rules, f"{called}, {place}") for place, record in chunk]
    for (place, _), (text, _) in zip(chunk, rendered, strict=True):
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{called}, {place}: half a surrogate pair in the text; repair its encoding") from error
    special = rules.kind != "messages"
    fast = bool(getattr(rules.tokenizer, "is_fast", False))
    encoded = rules.tokenizer(
        [text for text, _ in rendered], add_special_tokens=special, return_offsets_mapping=fast, verbose=False
    )
    for number, (text, spans) in enumerate(rendered):
        ids = [int(i) for i in encoded["input_ids"][number]]
        labels = None
        if spans is not None:
            offsets = (
                encoded["offset_mapping"][number] if fast else _offsets_by_prefix(text, spans, ids, rules, special)
            )
            counts = _counts(offsets, spans, len(text))
            labels = [i if c else IGNORE for i, c in zip(ids, counts, strict=True)]
        if rules.add_eos and ids and ids[-1] != rules.tokenizer.eos_token_id:
            end = spans is None or (bool(spans) and spans[-1][1] >= len(text.rstrip()))
            ids = [*ids, rules.tokenizer.eos_token_id]
            labels = None if labels is None else [*labels, ids[-1] if end else IGNORE]
        yield _Tokens(ids, labels)


def _counts(offsets: Sequence[tuple[int, int]], spans: Spans, length: int) -> list[bool]:
    """Whether each token counts: it overlaps a span, or is an end token (no text of its own) after a span's end."""
    counts = []
    last_real = max((k for k, (a, b) in enumerate(offsets) if b > a), default=-1)
    for k, (start, end) in enumerate(offsets):
        if end > start:
            counts.append(any(start < b and end > a for a, b in spans))
        else:
            counts.append(k > last_real >= 0 and bool(spans) and spans[-1][1] >= length)
    return counts


def _offsets_by_prefix(text: str, spans: Spans, ids: list[int], rules: _Rules, special: bool) -> list[tuple[int, int]]:
    """Offsets as far as the spans need them, for a tokenizer that reports none: tokenise each prefix of the text.

    A prefix gives the same tokens as the whole up to where the cut changes them; the tokens after the common part lie
    behind the cut (the one across it included, as with real offsets).
    """

    def encode(part: str) -> list[int]:
        return rules.tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]

    def common(left: Iterable[int], right: Iterable[int]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))

    added = encode("")  # begin and end tokens have no text of their own
    first = common(added, ids)
    last = len(ids) - common(reversed(added[first:]), reversed(ids[first:]))
    marks = sorted({mark for span in spans for mark in span if 0 < mark < len(text)})
    edges = [0, *marks, len(text)]
    bounds = [first, *(common(encode(text[:mark]), ids) for mark in marks), last]
    offsets = [(0, 0)] * first
    for k in range(len(edges) - 1):
        offsets.extend([(edges[k], edges[k + 1])] * max(0, min(bounds[k + 1], last) - len(offsets)))
    return offsets + [(0, 0)] * (len(ids) - last)


def _given(record: Mapping[str, Any], rules: _Rules, where: str) -> _Tokens:
    ids = _integers(record, rules.field("input_ids"), where, 0)
    assert ids is not None
    labels = _integers(record, rules.field("labels"), where, IGNORE)
    mask = _integers(record, rules.field("attention_mask"), where, 0)
    for name, value in (("labels", labels), ("attention_mask", mask)):
        if value is not None and len(value) != len(ids):
            raise DataError(
                f"{where}: {rules.field(name)!r} has {len(value)} entries, input_ids {len(ids)}; they must match"
            )
    if labels is not None and any(i < 0 and i != IGNORE for i in labels):
        raise DataError(f"{where}: {rules.field('labels')!r} holds a negative id; use -100 for positions not to count")
    if mask is not None and any(i > 1 for i in mask):
        raise DataError(f"{where}: {rules.field('attention_mask')!r} holds something other than 0 and 1")
    if rules.prompt_loss:
        labels = None
    if mask is not None:
        labels = [i if m else IGNORE for i, m in zip(labels or ids, mask, strict=True)]
    return _Tokens(ids, labels, mask)


def _integers(record: Mapping[str, Any], name: str, where: str, least: int) -> list[int] | None:
    value = record.get(name)
    if value is None and name in record and least == 0:
        raise DataError(f"{where}: field {name!r} is null, expected a list of integers")
    if value is None:
        return None
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise DataError(f"{where}: field {name!r} is not a list of integers")
    bad = next((i for i in value if i < least or i > _MAX_ID), None)
    if bad is not None:
        raise DataError(f"{where}: {name!r} holds {bad}, which is no token id")
    return value
