"""Examples in canonical form, and length-bucketed batches of them.

Masked positions at either end of an example are cut off before batching and every batch is padded on the right, so left
padding, right padding and none at all give the same numbers whatever the model's position encoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyinf.errors import DataError

__all__ = ["PreparedExamples", "TokenBatch", "make_batches", "prepare"]

IGNORE = -100
_TOKEN_TYPES = {"token_type_ids": 0}


@dataclass
class TokenBatch:
    """One padded batch on the device. ``rows`` picks the counted positions of the flattened ``[B·T]`` layout (None:
    all).
    """

    indices: list[int]
    inputs: dict[str, Tensor]
    lengths: list[int]
    rows: Tensor | None
    offsets: Tensor
    shape: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Number of counted positions."""
        return int(self.offsets[-1])


@dataclass
class PreparedExamples:
    """A dataset checked against the model and cut to its counted positions. Tensors stay on the CPU."""

    name: str
    input_ids: list[Tensor]
    labels: list[Tensor]
    masks: list[Tensor | None]
    shifts: list[int]
    full_lengths: list[int]
    extras: list[dict[str, Tensor]]
    label_counts: list[int]
    pad_id: int
    fields: dict[str, int] = field(default_factory=dict)
    draw_keys: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> list[int]:
        """Positions of each sequence, holes in its mask included."""
        return [int(ids.numel()) for ids in self.input_ids]

    @property
    def counted(self) -> list[int]:
        """Counted positions of each sequence."""
        return [int(ids.numel() if m is None else m.sum()) for ids, m in zip(self.input_ids, self.masks, strict=True)]

    @property
    def scored(self) -> list[int]:
        """Indices of the sequences with at least one label that counts; the rest score 0."""
        return [i for i, n in enumerate(self.label_counts) if n > 0]

    def batch(self, indices: Sequence[int], device: torch.device) -> TokenBatch:
        """Collate ``indices`` with right padding."""
        lengths = [int(self.input_ids[i].numel()) for i in indices]
        size, longest = len(indices), max(lengths)
        ids = torch.full((size, longest), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((size, longest), dtype=torch.bool)
        scalar_labels = self.labels[indices[0]].dim() == 0
        labels = torch.full((size,) if scalar_labels else (size, longest), IGNORE, dtype=torch.int64)
        for row, (i, n) in enumerate(zip(indices, lengths, strict=True)):
            ids[row, :n] = self.input_ids[i]
            own = self.masks[i]
            mask[row, :n] = True if own is None else own
            if scalar_labels:
                labels[row] = self.labels[i]
            else:
                labels[row, :n] = self.labels[i]
        counts = mask.sum(dim=1)
        full = bool(mask.all())
        inputs = {
            "input_ids": ids.to(device),
            "labels": labels.to(device),
            "attention_mask": None if full else mask.to(device=device, dtype=torch.int64),
            "index": torch.tensor(list(indices), dtype=torch.int64),
            "draw": torch.tensor([self.draw_keys[i] for i in indices], dtype=torch.int64),
        }
        for key in self.extras[indices[0]]:
            fill = self.pad_id if key.endswith("input_ids") else self.fields[key]
            parts = [self.extras[i][key] for i in indices]
            if parts[0].dim() == 0:
                inputs[key] = torch.stack(parts).to(device)
                continue
            out = torch.full((size, max(p.numel() for p in parts)), fill, dtype=torch.int64)
            for row, part in enumerate(parts):
                out[row, : part.numel()] = part
            inputs[key] = out.to(device)
        rows = None if full else mask.reshape(-1).nonzero().squeeze(1).to(device)
        offsets = torch.zeros(size + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=offsets[1:])
        return TokenBatch(list(indices), inputs, lengths, rows, offsets, (size, longest))


def _vector(value: Any, name: str, index: int, field: str) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}[{index}]['{field}'] is not a sequence of integers: {error}") from None
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.is_floating_point() or tensor.is_complex():
        if tensor.numel() == 0:
            return tensor.to(torch.int64)
        raise DataError(f"{name}[{index}]['{field}'] holds {tensor.dtype}; token ids and labels must be integers")
    return tensor.to(torch.int64)


def prepare(
    examples: Any,
    name: str,
    model: nn.Module | None = None,
    allow_empty: bool = False,
    fields: Mapping[str, int] | None = None,
    shifted: bool = True,
) -> PreparedExamples:
    """Check a dataset against the model and bring it into canonical form.

    Args:
        examples: sized, indexable collection of mappings with ``input_ids``, optional ``labels`` (−100 = ignored; a
            scalar for classification) and ``attention_mask``.
        name: how errors call it.
        model: for its vocabulary and number of positions.
        fields: further integer fields to pass on, each with the value that pads it.
        shifted: a label is predicted at the position before its own, so that one at the first position counts for
            nothing.

    Raises:
        DataError: empty dataset, missing field, ids outside the vocabulary, sequence longer than the model's positions,
            fields of unequal length. Each names the example.
    """
    if isinstance(examples, Mapping):
        raise DataError(
            f"{name} is a {type(examples).__name__} of columns; give one mapping a sequence, "
            "for instance Dataset.from_dict(...)"
        )
    if not isinstance(examples, Sized) or not hasattr(examples, "__getitem__"):
        raise DataError(
            f"{name} is a {type(examples).__name__}; give a sized, indexable collection (a list of dicts, a Dataset)"
        )
    if len(examples) == 0 and not allow_empty:
        raise DataError(f"{name} is empty; give at least one sequence")
    vocabulary, positions = _model_limits(model)
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    usable = isinstance(pad, int) and 0 <= pad < (vocabulary or pad + 1)
    out = PreparedExamples(name, [], [], [], [], [], [], [], pad if usable else 0, {**_TOKEN_TYPES, **(fields or {})})
    for index in range(len(examples)):
        _prepare_one(out, examples[index], index, vocabulary, positions, shifted)
    out.draw_keys = _content_keys(out)
    return out


def _content_keys(data: PreparedExamples) -> list[int]:
    """A key of each example's content, for random draws that do not depend on the order; repeats are told apart."""
    seen: dict[bytes, int] = {}
    keys = []
    for ids, labels in zip(data.input_ids, data.labels, strict=True):
        digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8)
        digest.update((labels != IGNORE).numpy().tobytes())
        content = digest.digest()
        repeat = seen[content] = seen.get(content, -1) + 1
        keys.append((int.from_bytes(content, "little") + repeat * 0x9E3779B97F4A7C15) % (1 << 62))
    return keys


def _model_limits(model: nn.Module | None) -> tuple[int | None, int | None]:
    if model is None:
        return None, None
    vocabulary = None
    get = getattr(model, "get_input_embeddings", None)
    if callable(get):
        try:
            table = get()
        except (NotImplementedError, AttributeError):
            table = None
        vocabulary = getattr(table, "num_embeddings", None)
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return vocabulary, positions if isinstance(positions, int) and positions > 0 else None


def _prepare_one(
    out: PreparedExamples, example: Any, index: int, vocabulary: int | None, positions: int | None, shifted: bool
) -> None:
    name = out.name
    if not isinstance(example, Mapping):
        raise DataError(
            f"{name}[{index}] is a {type(example).__name__}; every example must be a mapping with 'input_ids'"
        )
    if "input_ids" not in example:
        found = ", ".join(sorted(map(str, example))) or "nothing"
        raise DataError(f"{name}[{index}] has no field 'input_ids' (found: {found}); tokenise the data first")
    ids = _vector(example["input_ids"], name, index, "input_ids")
    if ids.dim() != 1 or ids.numel() == 0:
        raise DataError(
            f"{name}[{index}]['input_ids'] has shape {tuple(ids.shape)}; it must be a non-empty list of token ids"
        )
    mask = None
    if example.get("attention_mask") is not None:
        mask = _vector(example["attention_mask"], name, index, "attention_mask") != 0
        if mask.shape != ids.shape:
            raise DataError(
                f"{name}[{index}]: attention_mask has {mask.numel()} entries, input_ids {ids.numel()}; they must match"
            )
    raw = example.get("labels")
    labels = ids.clone() if raw is None else _vector(raw, name, index, "labels")
    if labels.dim() == 1 and labels.shape != ids.shape:
        if labels.numel() != 1:
            raise DataError(
                f"{name}[{index}]: labels has {labels.numel()} entries, input_ids {ids.numel()}; they must match"
            )
        labels = labels[0]
    start, stop = 0, int(ids.numel())
    if mask is not None:
        counted = mask.nonzero().squeeze(1)
        start, stop = (0, 1) if counted.numel() == 0 else (int(counted[0]), int(counted[-1]) + 1)
    full_length = int(ids.numel())
    ids = ids[start:stop]
    inner = None if mask is None else mask[start:stop]
    if inner is not None and bool(inner.all()):
        inner = None
    if vocabulary is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise DataError(
            f"{name}[{index}] holds token id {bad}, outside the model's vocabulary of {vocabulary}; "
            "tokenise with the model's own tokenizer"
        )
    if positions is not None and ids.numel() > positions:
        raise DataError(
            f"{name}[{index}] has {ids.numel()} tokens, the model takes at most {positions}; "
            f"truncate it (max_length) or split it"
        )
    if labels.dim() == 1:
        labels = labels[start:stop].clone()
        if inner is not None:
            labels[~inner] = IGNORE
        top = int(labels.max())
        if vocabulary is not None and (top >= vocabulary or bool(((labels < 0) & (labels != IGNORE)).any())):
            raise DataError(
                f"{name}[{index}]['labels'] holds ids outside the vocabulary of {vocabulary}; use "
                f"−100 to ignore a position"
            )
        counts = labels != IGNORE
        if shifted:
            counts = counts[1:] if inner is None else counts[1:] & inner[:-1]
        count = int(counts.sum())
    else:
        count = int(labels != IGNORE)
    if out.labels and out.labels[0].dim() != labels.dim():
        kinds = ["one label a sequence" if x.dim() == 0 else "one label a token" for x in (labels, out.labels[0])]
        raise DataError(f"{name}[{index}] has {kinds[0]}, {name}[0] has {kinds[1]}; all must agree")
    if inner is not None and not bool(inner.any()):
        count = 0
    extras = {key: _vector(example[key], name, index, key) for key in out.fields if example.get(key) is not None}
    if "token_type_ids" in extras:
        if extras["token_type_ids"].numel() != full_length:
            raise DataError(
                f"{name}[{index}]: token_type_ids has {extras['token_type_ids'].numel()} entries, "
                f"input_ids {full_length}; they must match"
            )
        extras["token_type_ids"] = extras["token_type_ids"][start:stop]
    for key, value in extras.items():
        if (
            key.endswith("input_ids")
            and vocabulary is not None
            and value.numel()
            and not 0 <= int(value.min()) <= int(value.max()) < vocabulary
        ):
            raise DataError(f"{name}[{index}]['{key}'] holds ids outside the model's vocabulary of {vocabulary}")
    first = out.extras[0] if out.extras else extras
    if set(first) != set(extras):
        raise DataError(
            f"{name}[{index}] has the fields {sorted(extras)}, {name}[0] has {sorted(first)}; all must agree"
        )
    out.input_ids.append(ids)
    out.labels.append(labels)
    out.masks.append(inner)
    out.shifts.append(start)
    out.full_lengths.append(full_length)
    out.extras.append(extras)
    out.label_counts.append(count)


def make_batches(
    lengths: Sequence[int],
    indices: Iterable[int] | None = None,
    batch_size: int | None = None,
    token_budget: int | None = None,
) -> list[list[int]]:
    """Batches of similar length: longest first, at most ``batch_size`` sequences and ``token_budget`` padded tokens
    each.

    A sequence longer than the budget gets a batch of its own. Deterministic.
    """
    order = sorted(range(len(lengths)) if indices is None else indices, key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    current: list[int] = []
    for i in order:
        widest = lengths[current[0]] if current else 0
        too_many = batch_size is not None and len(current) >= batch_size
        too_wide = token_budget is not None and widest * (len(current) + 1) > token_budget
        if current and (too_many or too_wide):
            batches.append(current)
            current = []
        current.append(i)
    if current:
        batches.append(current)
    return batches
