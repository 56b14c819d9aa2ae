"""Token sequences, with the rows and the text they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pyinf.artifacts import fingerprint_examples

__all__ = ["IGNORE", "Examples"]

IGNORE = -100


class Examples(Sequence[Mapping[str, torch.Tensor]]):
    """Token sequences with the rows they came from. Item ``i`` is ``{"input_ids", "labels"}`` (int64 ``[T_i]``).

    ``records[i]`` is the row without its token columns (JSON values), ``text(i)`` readable text, ``tokens(i)`` one
    string a token (together they read as the text). Ids are held as flat int32 arrays, 8 bytes a token with labels.
    ``notes`` says in words what happened on the way in (rows truncated, rows skipped).
    """

    def __init__(
        self,
        name: str,
        kind: str,
        ids: np.ndarray,
        offsets: np.ndarray,
        labels: np.ndarray | None,
        masks: np.ndarray | None,
        records: list[dict[str, Any]],
        text_of: Callable[[dict[str, Any]], str | None],
        tokenizer: Any = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.kind, self.records, self.tokenizer = name, kind, records, tokenizer
        self.notes = list(notes)
        self._ids, self._offsets, self._labels, self._masks = ids, offsets, labels, masks
        self._text_of = text_of
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        start, end = self._bounds(index)
        ids = torch.from_numpy(self._ids[start:end].astype(np.int64))
        labels = ids.clone() if self._labels is None else torch.from_numpy(self._labels[start:end].astype(np.int64))
        item = {"input_ids": ids, "labels": labels}
        if self._masks is not None:
            item["attention_mask"] = torch.from_numpy(self._masks[start:end].astype(np.int64))
        return item

    def _bounds(self, index: int) -> tuple[int, int]:
        position = range(len(self))[index]  # IndexError ends an iteration; negative counts from the end
        return int(self._offsets[position]), int(self._offsets[position + 1])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return np.diff(self._offsets).tolist()

    @property
    def counted(self) -> list[int]:
        """Labels of each example that the loss counts, the first position (which nothing predicts) aside."""
        return [int((self[i]["labels"][1:] != IGNORE).sum()) for i in range(len(self))]

    def text(self, index: int) -> str:
        """The text of an example: as its row has it, else decoded, else its token ids."""
        text = self._text_of(self.records[index])
        return "".join(self.tokens(index)) if text is None else text

    def tokens(self, index: int) -> list[str]:
        """One string a token; joined they are the decoded text. A character of several tokens stands at its last."""
        start, end = self._bounds(index)
        ids = self._ids[start:end].tolist()
        if self.tokenizer is None:
            return [f"{i} " for i in ids]
        return _token_strings(self.tokenizer, ids)

    def select(self, indices: Iterable[int]) -> Examples:
        """The examples of ``indices``, in that order."""
        rows = [range(len(self))[i] for i in indices]
        spans = [slice(*self._bounds(i)) for i in rows]

        def take(flat: np.ndarray | None) -> np.ndarray | None:
            return None if flat is None else np.concatenate([flat[s] for s in spans] or [flat[:0]])

        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([s.stop - s.start for s in spans], out=offsets[1:])
        ids = take(self._ids)
        assert ids is not None
        records = [self.records[i] for i in rows]
        parts = (
            ids,
            offsets,
            take(self._labels),
            take(self._masks),
            records,
            self._text_of,
            self.tokenizer,
            self.notes,
        )
        return Examples(self.name, self.kind, *parts)

    def fingerprint(self) -> str:
        """SHA-256 of ids, labels and masks: two collections with the same one train and score the same."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_examples(self)
        return self._fingerprint

    def __repr__(self) -> str:
        return f"Examples({self.name!r}, {len(self)} of kind {self.kind}, {int(self._offsets[-1])} tokens)"


def _token_strings(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text decoded so far; nothing while a character is incomplete."""

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    out: list[str] = []
    anchor = read = 0  # text of ids[anchor:read] has been given out
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[anchor:read]), decode(ids[anchor:end])
        if now.endswith("\ufffd") and end < len(ids) and end - read < 8:
            out.append("")
            continue
        out.append(now[len(before) :] if now.startswith(before) else decode(ids[read:end]))
        anchor, read = read, end
    return out
