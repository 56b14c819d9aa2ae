"""Two-stage retrieval: a one-bit store in EK-FAC's basis, exact EK-FAC scores of at most 1 % of the sequences.

    python -m benchmarks.two_stage                       # everything; each part is kept in --work and not done twice
    python -m benchmarks.two_stage --rotation pca --rank 1024 --pca-sequences 2048 --name two_stage-pca1024

A small Llama is trained here on the text of Python's library, cut into sequences of 32 tokens; the first 20,480 are
the training set. Exact EK-FAC scores of all queries over all of them are the truth. Then trials: 20 other queries and
another calibration sample each, 1 % of the sequences re-scored a query through `pyinf.store.query_store`, whose stated
recall@100 is compared with the true one. Results: `benchmarks/results/store/two_stage.csv` (a row a trial) and
`two_stage.json`, and the same of shorter rows under other names.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyinf
from pyinf import artifacts
from pyinf.methods.rescoring import Rescoring
from pyinf.store import Store
from pyinf.store.build import build_store, query_rows
from pyinf.store.prefilter import BM25Prefilter, EmbeddingPrefilter, hidden_states
from pyinf.store.retrieve import query_store

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "store"


def sequences(count: int, length: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """``count`` sequences of ``length`` tokens of library text, shuffled: int64 ``[count, length]``."""
    from pyinf.data.library_text import standard_library_passages, train_tokenizer

    passages = [p.text for p in standard_library_passages()]
    random.Random(seed).shuffle(passages)
    tokenizer = train_tokenizer(passages[:3000], vocabulary)
    rows = []
    for ids in tokenizer(passages)["input_ids"]:
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        if len(rows) > 3 * count:
            break
    if len(rows) < count:
        raise SystemExit(f"the library gives {len(rows)} sequences of {length} tokens and {count} are wanted")
    random.Random(seed + 1).shuffle(rows)
    return torch.tensor(rows[:count])


def trained(tokens: torch.Tensor, vocabulary: int, epochs: int) -> tuple[Any, float]:
    """A Llama of two layers, trained on ``tokens``; and its loss a token in the last epoch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pyinf.evaluate.language_model import fit_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    counts = np.ones(len(tokens), dtype=np.int64)
    recipe = {"rate": 4e-3, "batch": 64, "weight_decay": 0.1, "beta2": 0.98}
    return model, fit_model(model, tokens, counts, seed=0, epochs=epochs, **recipe)


def prepared(options: argparse.Namespace) -> tuple[Any, list[dict], list[dict], dict[str, Any]]:
    """Model, training set, all queries and facts; made once in ``--work``."""
    folder, asked = options.work / "data", options.trials * options.queries
    if not (folder / "facts.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        tokens = sequences(options.sequences + asked, 32, options.vocabulary)
        model, loss = trained(tokens[: options.sequences], options.vocabulary, options.epochs)
        model.save_pretrained(folder / "model")
        np.save(folder / "tokens.npy", tokens.numpy())
        facts = {"loss_a_token": loss, "seconds": time.perf_counter() - started}
        (folder / "facts.json").write_text(json.dumps(facts))
    from pyinf.data import load_model

    model = load_model(str(folder / "model"), dtype="float32", device="cpu")
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rows = [{"input_ids": row} for row in tokens]
    return model, rows[: options.sequences], rows[options.sequences :], json.loads((folder / "facts.json").read_text())


def truth(options: argparse.Namespace, attributor: Any, train: list[dict], queries: list[dict]) -> torch.Tensor:
    """Exact EK-FAC scores ``[Q, N]``, computed once."""
    path = options.work / "exact.npy"
    if not path.exists():
        values = attributor.score(queries, train).total()
        np.save(path, values.numpy())
    return torch.from_numpy(np.load(path))


def recall(found: torch.Tensor, exact: torch.Tensor, k: int) -> float:
    """Mean share of the exact top ``k`` among the rows of ``found``."""
    best = exact.topk(k, dim=1).indices
    return float(np.mean([np.isin(best[q], found[q]).mean() for q in range(len(exact))]))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All of it. Seconds are stated of what was made in this run, not of what an earlier one left in ``--work``."""
    options.work.mkdir(parents=True, exist_ok=True)
    model, train, queries, facts = prepared(options)
    seconds = {"data and model": facts["seconds"]}
    common = {"damping": options.damping, "seed": 0}
    exact_run = pyinf.Attributor(model, "ekfac", run_dir=options.work / "fit", certify=False, **common)
    kept = {
        "factors": (options.work / "fit" / "fit" / "factors" / "manifest.json").exists(),
        "exact scores of all": (options.work / "exact.npy").exists(),
    }
    started = time.perf_counter()
    exact_run.fit(train)
    seconds["factors"] = time.perf_counter() - started
    started = time.perf_counter()
    exact = truth(options, exact_run, train, queries)
    seconds["exact scores of all"] = time.perf_counter() - started
    exact_run.run_dir = None  # the small scorings of the second stage are not to be kept

    method = {"coordinates": options.coordinates, "rotation": options.rotation, "rank": options.rank}
    if options.rotation == "pca":
        method["pca_sequences"] = options.pca_sequences
    projected = pyinf.Attributor(model, "onebit", **common, **method)
    projected.load_factors(options.work / "fit" / "fit" / "factors")
    directory = options.work / f"store-{options.rotation}-{options.coordinates}-{options.rank}"
    kept["store"] = (directory / "manifest.json").exists()
    started = time.perf_counter()
    store = build_store(projected, train, directory, "1bit")
    seconds["store"] = time.perf_counter() - started
    number = torch.as_tensor(Store.open(directory).ids)
    exact = exact[:, number]  # in the order of the store's rows
    started = time.perf_counter()
    rows = query_rows(projected, queries, store)
    seconds["query rows"] = time.perf_counter() - started

    k, trials = options.k, []
    for trial in range(options.trials):
        own = slice(trial * options.queries, (trial + 1) * options.queries)
        rescorer = Rescoring(exact_run, queries[own], train, store.ids)
        started = time.perf_counter()
        found = query_store(
            store, rows[own], k, rescorer, rescore=options.rescore, sample=options.sample, documents=False, seed=trial
        )
        used = time.perf_counter() - started
        assert found.recall is not None
        true = recall(found.rows, exact[own], k)
        largest = (found.values - exact[own].gather(1, found.rows)).abs().max() / exact[own].abs().max()
        first = query_store(store, rows[own], k, documents=False)
        trials.append(
            {
                "trial": trial,
                "recall_true": true,
                "recall_stated": found.recall.value,
                "low": found.recall.low,
                "high": found.recall.high,
                "inside": found.recall.low <= true <= found.recall.high,
                "recall_of_the_scan_alone": recall(first.rows, exact[own], k),
                "candidates": found.cost["candidates"],
                "sample": found.cost["sample"],
                "sequences_run": found.cost["sequences_run"],
                "strategy": found.cost["strategy"],
                "scan_seconds": found.cost["seconds"]["scan"],
                "sample_seconds": found.cost["seconds"].get("sample", 0.0),
                "rescoring_seconds": found.cost["seconds"]["rescoring"],
                "seconds": used,
                "largest_difference_of_exact_scores": float(largest),
            }
        )
        print({n: round(v, 4) if isinstance(v, float) else v for n, v in trials[-1].items()}, flush=True)
    raw = 4 * sum(layer.d_out * layer.columns for layer in exact_run.selection.layers)
    content: dict[str, Any] = {
        "sequences": len(train),
        "tokens_a_sequence": 32,
        "traced_parameters": raw // 4,
        "loss_a_token": facts["loss_a_token"],
        "damping": options.damping,
        "store": {"format": "1bit", **method, "bytes_a_row": store.spec.row_bytes, "share": store.spec.row_bytes / raw},
        "k": k,
        "queries_a_trial": options.queries,
        "share_rescored": trials[0]["candidates"] / len(train),
        "recall": {
            "mean": float(np.mean([t["recall_true"] for t in trials])),
            "least": min(t["recall_true"] for t in trials),
        },
        "stated_inside": sum(t["inside"] for t in trials),
        "trials": len(trials),
        "prefilters": prefilters(options, model, exact_run, store, rows, train, queries, exact),
        "seconds": {name: round(value, 2) for name, value in seconds.items() if not kept.get(name)},
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "python": platform.python_version()},
    }
    write(content, trials, options.out, options.name)
    return content


def prefilters(
    options: argparse.Namespace,
    model: Any,
    exact_run: Any,
    store: Store,
    rows: torch.Tensor,
    train: list[dict],
    queries: list[dict],
    exact: torch.Tensor,
) -> list[dict[str, Any]]:
    """What BM25 and the model's own states lose when they choose a tenth of the sequences: stated and true."""
    asked, own = queries[: options.queries], rows[: options.queries]
    ordered = [train[i] for i in store.ids]
    out = []
    makers = {
        "bm25": lambda: BM25Prefilter(asked, ordered),
        "hidden states": lambda: EmbeddingPrefilter(hidden_states(model, asked), hidden_states(model, ordered)),
    }
    for name, make in makers.items():
        started = time.perf_counter()
        prefilter = make()
        rescorer = Rescoring(exact_run, asked, train, store.ids)
        found = query_store(
            store, own, options.k, rescorer, rescore=options.rescore, sample=options.sample, prefilter=prefilter,
            keep=options.keep, documents=False,
        )  # fmt: skip
        kept = prefilter.top(int(options.keep * store.count))
        assert found.recall is not None and found.prefilter is not None
        out.append(
            {
                "prefilter": name,
                "keep": options.keep,
                "prefilter_true": recall(kept, exact[: options.queries], options.k),
                "prefilter_stated": found.prefilter.to_dict(),
                "recall_true": recall(found.rows, exact[: options.queries], options.k),
                "recall_stated": found.recall.to_dict(),
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
        print(name, out[-1]["prefilter_true"], found.prefilter, out[-1]["recall_true"], found.recall, flush=True)
    return out


def write(content: dict[str, Any], trials: list[dict[str, Any]], folder: Path, name: str) -> None:
    """``name.json`` and ``name.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.atomic_write_json(folder / f"{name}.json", content)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(trials[0]), lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        writer.writerow({n: f"{v:.4g}" if isinstance(v, float) else v for n, v in trial.items()})
    artifacts.atomic_write_bytes(folder / f"{name}.csv", text.getvalue().encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "two_stage")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sequences", type=int, default=20_480)
    parser.add_argument("--queries", type=int, default=20, help="a trial")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rescore", type=float, default=0.01, help="share of the sequences that is re-scored a query")
    parser.add_argument("--sample", type=int, default=1024, help="sequences of the calibration")
    parser.add_argument("--keep", type=float, default=0.1, help="of a prefilter")
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--rotation", default="hadamard", choices=["pca", "hadamard", "none"])
    parser.add_argument("--coordinates", type=int, default=12_288)
    parser.add_argument("--rank", type=int, default=16_384)
    parser.add_argument("--pca-sequences", type=int, default=4096, help="sampled for the principal directions")
    parser.add_argument("--name", default="two_stage", help="of the files in --out")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2)
    content = run(parser.parse_args())
    print(json.dumps({k: v for k, v in content.items() if k != "prefilters"}, indent=1))


if __name__ == "__main__":
    main()
