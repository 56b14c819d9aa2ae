"""From raw JSON lines to a report: does attribution find training examples of the query's own class?

    python examples/emotion.py TRAIN.jsonl TEST.jsonl [--out runs/emotion] [--limit-queries 50] [--quick]

Each line holds ``prompt``, ``response`` and ``label``. A byte-pair tokenizer and a small Llama are trained on the
training file on the spot (seeded, no download); then ``pyinf attribute``, the command line itself, traces the responses
of the test file back with EK-FAC, the gradient dot product, its cosine and BM25. For each method:

- **Acc**: share of queries whose strongest training example has the query's label;
- **Cover**: share of its top ``c`` with that label, ``c`` being how many training examples have it;

the two measures of arXiv 2409.19998. Chance is the label's share of the training file, for both. Every method sees the
response as well as the prompt: where the response is the label's own word, BM25 can match it too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pyinf
from pyinf import artifacts
from pyinf.data import load_examples
from pyinf.demo.model import train_tokenizer

METHODS = ("ekfac", "grad_dot", "grad_cos", "bm25")


@dataclass(frozen=True)
class Size:
    """Of the model and of its training."""

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    epochs: int = 8
    batch: int = 32
    learning_rate: float = 1e-3


QUICK = Size(vocabulary=400, hidden=32, layers=2, heads=2, epochs=2)


@dataclass
class Result:
    """What one method found."""

    method: str
    acc: float
    cover: float
    seconds: float


def read(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, each with prompt, response and label."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            missing = [name for name in ("prompt", "response", "label") if name not in row]
            if missing:
                raise SystemExit(f"{path}, line {number}: no field {missing[0]!r}; it needs prompt, response and label")
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path} is empty")
    return rows[:limit]


def spread(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` of the rows, the labels in turn, so that a file sorted by label gives queries of every one."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(str(row["label"]), []).append(row)
    rng = random.Random(seed)
    for group in by_label.values():
        rng.shuffle(group)
    turns = [row for n in range(max(map(len, by_label.values()))) for g in by_label.values() for row in g[n : n + 1]]
    return turns[:count]


def train_here(train_file: Path, rows: list[dict[str, Any]], size: Size, seed: int, folder: Path) -> None:
    """A tokenizer and a model trained on ``rows``, saved where ``pyinf attribute --model`` finds them.

    The loss is half that of the response, which is what attribution traces, and half that of the whole text, without
    which so few examples would teach a model little about words. Means over the tokens of a batch.
    """
    tokenizer = train_tokenizer([f"{row['prompt']} {row['response']}" for row in rows], size.vocabulary)
    examples = load_examples(train_file, tokenizer, add_eos=True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=max(64, 2 * max(examples.lengths)),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), size.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    order = list(range(len(examples)))
    rng, step, steps = random.Random(seed), 0, size.epochs * -(-len(examples) // size.batch)
    for _ in range(size.epochs):
        rng.shuffle(order)
        for start in range(0, len(order), size.batch):
            batch = [examples[i] for i in order[start : start + size.batch]]
            ids = pad_sequence([x["input_ids"] for x in batch], batch_first=True, padding_value=0)
            text = pad_sequence([x["input_ids"] for x in batch], batch_first=True, padding_value=-100)[:, 1:]
            response = pad_sequence([x["labels"] for x in batch], batch_first=True, padding_value=-100)[:, 1:]
            # Padding stands on the right, where a causal model does not look, so it needs no mask.
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)
            loss = 0.5 * cross_entropy(logits, response) + 0.5 * cross_entropy(logits, text)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = size.learning_rate * min(1.0, (step + 1) / 20) * max(0.1, 1 - step / steps)
            optimizer.step()
            step += 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def answers_right(folder: Path, queries: list[dict[str, Any]]) -> float:
    """Share of the test prompts for which the right response is likelier than the response of any other label."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    choices = sorted({row["response"] for row in queries})
    right = 0
    for row in queries:
        texts = [{"prompt": row["prompt"], "response": choice} for choice in choices]
        losses = []
        for example in load_examples(texts, tokenizer, add_eos=True):
            logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
            losses.append(float(cross_entropy(logits, example["labels"][1:], reduction="sum")))
        right += choices[losses.index(min(losses))] == row["response"]
    return right / len(queries)


def attribute(
    method: str, model: Path, train: Path, queries: Path, out: Path, report: bool
) -> tuple[pyinf.Scores, float]:
    """``pyinf attribute`` as anyone would call it; its scores, and its seconds, loading the model included."""
    command = [sys.executable, "-m", "pyinf", "attribute", "--model", str(model), "--train", str(train)]
    command += ["--queries", str(queries), "--method", method, "--add-eos", "--out", str(out), "--show", "0"]
    command += [] if report else ["--no-report"]
    print("\n$ pyinf " + " ".join(command[3:]), flush=True)
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"pyinf attribute ended with exit code {done.returncode}")
    return pyinf.Scores.load(out / "scores"), float(json.loads((out / "summary.json").read_text())["seconds"])


def measure(values: torch.Tensor, train_labels: list[str], query_labels: list[str]) -> tuple[float, float]:
    """Acc and Cover of scores ``[Q, N]``."""
    sizes = Counter(train_labels)
    hits = cover = 0.0
    for row, label in zip(values, query_labels, strict=True):
        count = sizes[label]
        order = row.argsort(descending=True, stable=True)[: max(1, count)].tolist()
        hits += train_labels[order[0]] == label
        cover += sum(train_labels[i] == label for i in order) / max(1, count)
    return hits / len(query_labels), cover / len(query_labels)


def chance(train_labels: list[str], query_labels: list[str]) -> float:
    """What a random order of the training file gets, for Acc and for Cover alike."""
    sizes = Counter(train_labels)
    return sum(sizes[label] for label in query_labels) / (len(train_labels) * len(query_labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/emotion"), help="folder for data, model and runs")
    parser.add_argument("--limit", type=int, help="train on and search the first N rows, the labels in turn")
    parser.add_argument("--limit-queries", type=int, default=50, help="trace N test rows, the labels in turn")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names of pyinf.methods()")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model that learns little: every step, in seconds")
    options = parser.parse_args()

    started = time.perf_counter()
    out: Path = options.out
    everything = read(options.train)
    rows = everything if options.limit is None else spread(everything, options.limit, options.seed)
    queries = spread(read(options.test), options.limit_queries, options.seed)
    run = {"what": "emotion example", "quick": options.quick, "seed": options.seed}
    run |= {"train": artifacts.fingerprint_examples(rows)[:16], "queries": artifacts.fingerprint_examples(queries)[:16]}
    artifacts.claim_directory(out, run)
    for name, part in (("train", rows), ("queries", queries)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        artifacts.atomic_write_bytes(out / f"{name}.jsonl", text.encode())
    train_labels, query_labels = [str(r["label"]) for r in rows], [str(r["label"]) for r in queries]
    print(f"{len(rows)} training examples of {len(set(train_labels))} labels, {len(queries)} queries")

    model = out / "model"
    begin = time.perf_counter()
    if not (model / "tokenizer_config.json").exists():  # written last
        size = QUICK if options.quick else Size()
        train_here(out / "train.jsonl", rows, size, options.seed, model)
    training = time.perf_counter() - begin
    correct = answers_right(model, queries)
    print(f"model: ready after {training:.0f} s; it gives the right answer to {100 * correct:.0f} % of the queries")

    results = []
    for method in options.methods:
        scores, seconds = attribute(
            method, model, out / "train.jsonl", out / "queries.jsonl", out / method, report=method == options.methods[0]
        )
        results.append(Result(method, *measure(scores.values, train_labels, query_labels), seconds))
    base = chance(train_labels, query_labels)

    print(f"\n{'method':<10} {'Acc':>7} {'Cover':>7} {'seconds':>8}")
    for r in results:
        print(f"{r.method:<10} {r.acc:>7.3f} {r.cover:>7.3f} {r.seconds:>8.1f}")
    print(f"{'chance':<10} {base:>7.3f} {base:>7.3f}")
    found = {
        "train": len(rows),
        "queries": len(queries),
        "labels": len(set(train_labels)),
        "chance": round(base, 4),
        "model_right": round(correct, 4),
        "quick": options.quick,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "versions": {"pyinf": pyinf.__version__, "torch": torch.__version__},
        "seconds": {"training": round(training, 1), "total": round(time.perf_counter() - started, 1)},
        "methods": [
            {"method": r.method, "acc": round(r.acc, 4), "cover": round(r.cover, 4), "seconds": round(r.seconds, 2)}
            for r in results
        ],
    }
    artifacts.atomic_write_json(out / "emotion.json", found)
    print(f"\nreport   {out / options.methods[0] / 'report.html'}\nresults  {out / 'emotion.json'}")


if __name__ == "__main__":
    main()
