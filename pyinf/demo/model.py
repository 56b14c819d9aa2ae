"""The demo's model: a byte-pair tokenizer and a small Llama, both trained on the spot."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyinf import progress
from pyinf.data.library_text import END, train_tokenizer
from pyinf.data.small_llama import small_llama

__all__ = ["END", "Recipe", "answer_probability", "greedy_answer", "train_model", "train_tokenizer"]


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo. ``quick`` is for tests: it runs every step and learns little."""

    examples: int = 1024
    max_length: int = 128
    vocabulary: int = 4096
    tokenizer_characters: int = 1_500_000
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    epochs: int = 10
    batch_tokens: int = 512
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    seed: int = 0

    @classmethod
    def quick(cls) -> Recipe:
        """Seconds instead of minutes."""
        sizes = {"hidden": 32, "intermediate": 64, "layers": 2, "heads": 2, "vocabulary": 512, "max_length": 48}
        return cls(examples=96, tokenizer_characters=60_000, epochs=2, **sizes)


def _batches(lengths: Sequence[int], budget: int, rng: random.Random) -> Iterator[list[int]]:
    """Shuffled batches of about equal length, each of at most ``budget`` padded tokens: little padding is computed."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i] + rng.randrange(24), rng.random()))
    batches, current, longest = [], [], 0
    for i in order:
        longest_with = max(longest, lengths[i])
        if current and longest_with * (len(current) + 1) > budget:
            batches.append(current)
            current, longest_with = [], lengths[i]
        current.append(i)
        longest = longest_with
    if current:
        batches.append(current)
    rng.shuffle(batches)
    yield from batches


def train_model(examples: Sequence[dict[str, Any]], vocabulary: int, recipe: Recipe, device: torch.device) -> Any:
    """A Llama made from a config and trained with AdamW on ``examples`` (mappings with ``input_ids``), seeded.

    The loss is the mean over the tokens of a batch; the learning rate warms up and falls along a cosine to a tenth.
    Returns the model in evaluation mode; the last loss is reported as a note.
    """
    model = small_llama(
        vocabulary,
        hidden=recipe.hidden,
        intermediate=recipe.intermediate,
        layers=recipe.layers,
        heads=recipe.heads,
        positions=2 * recipe.max_length,
        seed=recipe.seed,
        name="small Llama trained on the spot",
        device=device,
    )
    rng = random.Random(recipe.seed)
    lengths = [len(example["input_ids"]) for example in examples]
    plan = [batch for _ in range(recipe.epochs) for batch in _batches(lengths, recipe.batch_tokens, rng)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    warmup = max(1, int(recipe.warmup * len(plan)))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        along = (step - warmup) / max(1, len(plan) - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * along))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    recent: list[float] = []
    model.train()
    with progress.stage("train the model", total=len(plan), unit="steps") as running:
        for batch in plan:
            longest = max(lengths[i] for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : lengths[i]] = torch.as_tensor(examples[i]["input_ids"])
                mask[row, : lengths[i]] = 1
            ids, mask = ids.to(device), mask.to(device)
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent = [*recent[-49:], float(loss.detach())]
            running.advance(1)
    progress.note(f"training loss {sum(recent) / len(recent):.2f} nats per token at the end")
    return model.eval()


@torch.no_grad()
def greedy_answer(model: Any, tokenizer: Any, prompt: str, length: int = 8) -> str:
    """The model's own continuation of ``prompt``: the likeliest token each time, up to the end of the clause.

    What ends a clause (a line end or a punctuation mark) is left out, so that the answer is words only.
    """
    device = next(model.parameters()).device
    ids = tokenizer(prompt)["input_ids"]
    answer: list[int] = []
    while len(answer) < length:
        logits = model(input_ids=torch.tensor([ids + answer], device=device), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        piece = tokenizer.decode([token])
        if token == tokenizer.eos_token_id or "\n" in piece or piece.strip()[:1] in tuple(".,;:!?()[]\"'`"):
            break
        answer.append(token)
    return tokenizer.decode(answer)


@torch.no_grad()
def answer_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Probability that the model gives ``answer`` (its first token) right after ``prompt``."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]], device=device), use_cache=False).logits
    first = tokenizer(answer, add_special_tokens=False)["input_ids"][0]
    return float(logits[0, -1].float().softmax(-1)[first])
