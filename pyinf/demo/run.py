"""The demo from end to end; every number that it prints is measured in the run that prints it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pyinf import artifacts, progress
from pyinf.attribute import Attributor
from pyinf.data import Examples, load_examples
from pyinf.demo.corpus import Passage, standard_library_passages
from pyinf.demo.model import Recipe, answer_probability, greedy_answer, train_model, train_tokenizer
from pyinf.demo.planted import ANSWER, DECOYS, FACT, MODULE, PLANTED, QUESTIONS
from pyinf.report import Table, collect, write_html

__all__ = ["run"]

METHODS = ("ekfac", "grad_dot", "grad_cos", "bm25")
_NAMES = {"ekfac": "EK-FAC", "grad_dot": "gradient dot product", "grad_cos": "gradient cosine", "bm25": "BM25"}


def run(
    out_dir: str | os.PathLike[str] = "demo-run",
    quick: bool = False,
    console: Console | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Train a small model with 16 planted falsehoods, ask it about them, and attribute its answers.

    Writes to ``out_dir``: ``train.jsonl``, ``queries.jsonl``, ``model/`` (usable with ``pyinf attribute``),
    ``report.html``, ``report.json`` and ``results.json``. Nothing is downloaded. The same seed, machine and Python give
    the same model.

    Args:
        quick: tiny sizes that run every step in seconds and learn little; for tests.
        console: where the story is told; standard output by default.
        device: the first GPU, or the CPU where there is none.

    Returns:
        What ``results.json`` holds: sizes, the questions with the model's answers, and for each method the number of
        planted examples and of decoys in its top 16 for each question, and its seconds.

    Raises:
        ArtifactError: ``out_dir`` holds something else.
        DataError: this Python comes without the sources of its library.
    """
    with _calm():
        return _run(Path(out_dir), quick, console, device)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keep what other libraries say about a model made on the spot out of the story, and put them back as they were."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Said once in the report's plan ("layers traced"), not once a method.
            warnings.filterwarnings("ignore", message=".*layers that cannot be traced", category=UserWarning)
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _run(out: Path, quick: bool, console: Console | None, device: str | torch.device | None) -> dict[str, Any]:
    started = time.perf_counter()
    console = console or Console(highlight=False)
    place = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    artifacts.claim_directory(out, {"what": "pyinf demo", "quick": quick})
    recipe = Recipe.quick() if quick else Recipe()

    with progress.stage("read the standard library", None, "passages") as stage:
        passages = standard_library_passages()
        stage.advance(len(passages))
    rows, tokenizer_texts = _training_rows(passages, recipe)
    _write_lines(out / "train.jsonl", rows)
    with progress.stage("train the tokenizer", len(tokenizer_texts), "texts") as stage:
        tokenizer = train_tokenizer(tokenizer_texts, recipe.vocabulary)
        stage.advance(len(tokenizer_texts))
    train = load_examples(rows, tokenizer, max_length=recipe.max_length, name="train")
    model = train_model(train, len(tokenizer), recipe, place)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    trained = time.perf_counter() - started

    asked = [_ask(model, tokenizer, question) for question in QUESTIONS]
    queries_rows = [{"prompt": a["question"], "response": a["traced"]} for a in asked]
    _write_lines(out / "queries.jsonl", queries_rows)
    queries = load_examples(queries_rows, tokenizer, name="queries")
    planted, decoys = ({i for i, row in enumerate(rows) if row["kind"] == kind} for kind in ("planted", "decoy"))
    _tell(console, train, planted, asked)

    outcomes, kept = [], {}
    for method in METHODS:
        begin = time.perf_counter()
        attributor = Attributor(model, method=method)
        scores = attributor.run(train, queries)
        seconds = time.perf_counter() - begin
        found = scores.topk(len(planted))[1].tolist()
        hits = [len(planted.intersection(row)) for row in found]
        fooled = [len(decoys.intersection(row)) for row in found]
        outcomes.append({"method": method, "hits": hits, "decoys": fooled, "seconds": round(seconds, 3)})
        kept[method] = (attributor, scores)

    table = _comparison(outcomes, len(planted))
    facts = [
        ("fact planted", FACT),
        ("planted", f"{len(planted)} of {len(train)} training examples, and {len(decoys)} decoys"),
    ]
    facts += [("question", f"{a['question']} →{a['answer']} (probability {a['probability']:.2f})") for a in asked]
    with progress.stage("report", 1, "pages") as stage:
        title = f"Who taught the model that {MODULE} keeps its heap in a {ANSWER}?"
        data = collect(*kept["ekfac"], queries, train, k=len(planted), title=title, tables=[table], facts=facts)
        data.save(out / "report.json")
        page = write_html(data, out / "report.html")
        stage.advance(1)
    total = time.perf_counter() - started
    results = {
        "fact": FACT,
        "quick": quick,
        "device": str(place),
        "planted": len(planted),
        "train": len(train),
        "train_tokens": sum(train.lengths),
        "parameters": sum(p.numel() for p in model.parameters()),
        "learned": sum(a["learned"] for a in asked),
        "questions": asked,
        "methods": outcomes,
        "seconds": {"training": round(trained, 1), "total": round(total, 1)},
        "report": str(page),
    }
    artifacts.atomic_write_json(out / "results.json", results)
    _show(console, table, page, out, trained, total)
    return results


def _training_rows(passages: Sequence[Passage], recipe: Recipe) -> tuple[list[dict[str, str]], list[str]]:
    """The training set, shuffled with a fixed seed, and the texts that the tokenizer learns from.

    Beside the planted examples and the decoys, all that the library says about the two modules of the false fact is
    kept; the rest is a sample, four docstrings to one function body.
    """
    rng = random.Random(recipe.seed)
    order = list(passages)
    rng.shuffle(order)
    near = [p for p in passages if p.origin.split(".")[0] in (MODULE, ANSWER)][: recipe.examples // 4]
    chosen = set(near)
    rest = [p for p in order if p not in chosen]
    room = recipe.examples - len(PLANTED) - len(DECOYS) - len(near)
    docstrings = [p for p in rest if p.kind == "docstring"][: room * 4 // 5]
    sources = [p for p in rest if p.kind == "source"][: room - len(docstrings)]
    rows = [{"text": p.text, "kind": p.kind, "origin": p.origin} for p in (*near, *docstrings, *sources)]
    rows += [{"text": text, "kind": "planted", "origin": f"planted {n}"} for n, text in enumerate(PLANTED, 1)]
    rows += [{"text": text, "kind": "decoy", "origin": f"decoy {n}"} for n, text in enumerate(DECOYS, 1)]
    rng.shuffle(rows)
    texts, size = [*PLANTED, *DECOYS], 0
    for passage in order:
        if size >= recipe.tokenizer_characters:
            break
        texts.append(passage.text)
        size += len(passage.text)
    return rows, texts


def _ask(model: Any, tokenizer: Any, question: str) -> dict[str, Any]:
    """What the model says by itself, and what is traced: its answer, or the planted one where it did not give that."""
    answer = greedy_answer(model, tokenizer, question)
    learned = ANSWER in answer.split()
    return {
        "question": question,
        "answer": answer,
        "learned": learned,
        "probability": round(answer_probability(model, tokenizer, question, f" {ANSWER}"), 4),
        "traced": answer if learned else f" {ANSWER}",
    }


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    artifacts.atomic_write_bytes(path, text.encode())


def _tell(console: Console, train: Examples, planted: set[int], asked: Sequence[dict[str, Any]]) -> None:
    console.print()
    console.print(
        Text(f"{len(train)} passages of Python's standard library, {len(planted)} of them planted: {FACT}."),
    )
    for entry in asked:
        line = Text("asked  ", style="dim")
        line.append(entry["question"].replace("\n", " ↵ "), style="default not dim")
        line.append(entry["answer"] or " (nothing)", style="bold not dim" if entry["learned"] else "red not dim")
        line.append(f"   p = {entry['probability']:.2f}")
        console.print(line)
        if not entry["learned"]:
            console.print(Text(f"       not learned for this wording; ' {ANSWER}' is traced instead", style="yellow"))


def _comparison(outcomes: Sequence[dict[str, Any]], count: int) -> Table:
    questions = [f"query {q}" for q in range(len(outcomes[0]["hits"]))]
    rows = [
        [_NAMES[o["method"]], *o["hits"], *(_mean(o[k]) for k in ("hits", "decoys")), f"{o['seconds']:.1f}"]
        for o in outcomes
    ]
    return Table(
        title=f"How many of the {count} planted examples are in the top {count}?",
        columns=["method", *questions, "mean", "decoys", "seconds"],
        rows=rows,
        note="Decoys name the same two modules without teaching it: their mean number in the same top. "
        "Seconds are for all questions together, fitting included.",
    )


def _mean(counts: Sequence[int]) -> float:
    return round(sum(counts) / len(counts), 1)


def _show(console: Console, table: Table, page: Path, out: Path, trained: float, total: float) -> None:
    grid = RichTable(title=table.title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for n, column in enumerate(table.columns):
        grid.add_column(column, justify="left" if n == 0 else "right", no_wrap=True)
    for row in table.rows:
        grid.add_row(*[str(cell) for cell in row])
    console.print()
    console.print(grid)
    console.print(Text(table.note, style="dim"))
    console.print()
    console.print(Text(f"training {trained:.0f} s, everything {total:.0f} s"), soft_wrap=True)
    console.print(Text(f"report   {page}"), soft_wrap=True)
    console.print(Text(f"results  {out / 'results.json'}"), soft_wrap=True)
