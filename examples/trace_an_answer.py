"""Which training examples made the model say this? The Python calls, on a small model made from a config.

Run it from anywhere: python examples/trace_an_answer.py [FOLDER]. It writes FOLDER/report.html.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pyinf
from pyinf.report import collect, write_html


def train_a_model(train: list[dict]) -> LlamaForCausalLM:
    """Stands for your own model: any causal language model of transformers, or your nn.Module."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        for example in train:
            ids = example["input_ids"][None]
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    return model.eval()


def letters(text: str) -> torch.Tensor:
    """One token a letter keeps this example free of a tokenizer."""
    return torch.tensor([min(ord(c), 127) for c in text])


class Letters:
    """The one method of a tokenizer that a report needs."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def main(folder: Path) -> None:
    colours = {"apple": "red", "lemon": "yellow", "plum": "blue", "lime": "green", "cherry": "red", "banana": "yellow"}
    texts = [f"{a} {fruit} is {colour}" for fruit, colour in colours.items() for a in ("the", "a", "one", "this")]
    train = [{"input_ids": letters(text)} for text in texts]
    model = train_a_model(train)

    # The loss of the answer alone is traced: everything before it carries the label -100.
    question, answer = "that plum is ", "blue"
    ids = letters(question + answer)
    labels = ids.clone()
    labels[: len(question)] = -100
    queries = [{"input_ids": ids, "labels": labels}]

    attributor = pyinf.Attributor(model, method="ekfac", damping=0.1).fit(train)
    scores = attributor.score(queries, train)

    values, indices = scores.topk(4)
    for value, index in zip(values[0].tolist(), indices[0].tolist(), strict=True):
        print(f"{value:+9.3f}  {texts[index]}")
    data = collect(attributor, scores, queries, train, k=4, tokenizer=Letters(), title="Why blue?")
    print("report", write_html(data, folder / "report.html"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "example-run"))
