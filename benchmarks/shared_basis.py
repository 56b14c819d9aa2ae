"""What scoring in a basis that all queries share costs beside the bare pass, at the shape of GPT-2 small.

python -m benchmarks.shared_basis [--queries 100] [--ranks 64 256] [--sequences 4] [--length 512] [--out FILE]

Weights, queries and bases are random: the time does not depend on them. A bare pass is the forward and the backward to
the layers' outputs with everything captured and nothing done with it. Repetitions are interleaved; the best of each is
compared, since other work on the machine only ever adds time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from pyinf.capture import Consumer, InputGroups, PassSource, TracingSession, select_layers
from pyinf.data.batching import prepare
from pyinf.score import QueryBlock, ScoreConsumer
from pyinf.tasks import CausalLM

RESULT = Path(__file__).parent / "results" / "projections" / "shared_basis.json"


class Nothing(Consumer):
    """Takes what is captured and drops it."""

    def consume(self, *args: Any) -> None:
        pass


def block(layers: list[Any], queries: int, rank: int) -> QueryBlock:
    """Random cores and orthonormal bases."""
    out = QueryBlock(queries)
    for layer in layers:
        r, s = min(rank, layer.d_out), min(rank, layer.columns)
        out.core[layer.name] = torch.randn(queries, r, s)
        out.basis_out[layer.name] = torch.linalg.qr(torch.randn(layer.d_out, r)).Q
        out.basis_in[layer.name] = torch.linalg.qr(torch.randn(layer.columns, s)).Q
    return out


def low_rank(layers: list[Any], queries: int, rank: int) -> QueryBlock:
    """Random queries, each of a rank of its own."""
    out = QueryBlock(queries)
    for layer in layers:
        out.left[layer.name] = torch.randn(queries, layer.d_out, rank)
        out.right[layer.name] = torch.randn(queries, rank, layer.columns)
    return out


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--own-rank", type=int, default=16, help="rank of queries on their own; 0: not measured")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=args.layers)).eval()
    selection, task, groups = select_layers(model), CausalLM(), InputGroups()
    ids = torch.randint(0, 50_000, (args.sequences, args.length)).tolist()
    data = prepare([{"input_ids": row} for row in ids], "train", model)
    batches = [[i] for i in range(args.sequences)]
    consumers: dict[str, Any] = {"bare pass": Nothing()}
    for rank in args.ranks:
        for queries in args.queries:
            name = f"shared basis of rank {rank}, {queries} queries"
            consumers[name] = ScoreConsumer(block(selection.layers, queries, rank), False, False, False)
    if args.own_rank:
        for queries in args.queries:
            name = f"each query of rank {args.own_rank}, {queries} queries"
            own = low_rank(selection.layers, queries, args.own_rank)
            consumers[name] = ScoreConsumer(own, False, False, False)
    seconds: dict[str, list[float]] = {name: [] for name in consumers}
    for repeat in range(args.repeats + 1):
        for name, consumer in consumers.items():
            start = getattr(consumer, "start_batch", lambda consumer=consumer: consumer)
            with TracingSession(model, selection, task, groups) as session:
                began = time.perf_counter()
                PassSource(session, data, batches).run(lambda *_, start=start: start(), "train", name)
                if repeat:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
    bare = min(seconds["bare pass"])
    entries = [
        {
            "what": name,
            "seconds": round(min(values), 3),
            "median": round(statistics.median(values), 3),
            "spread": round((max(values) - min(values)) / statistics.median(values), 3),
            "share_of_the_pass": round(min(values) / bare - 1, 3),
        }
        for name, values in seconds.items()
    ]
    result = {
        "model": f"GPT-2 small, {args.layers} blocks",
        "tokens": args.sequences * args.length,
        "sequences": args.sequences,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "entries": entries,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for entry in entries:
        print(f"{entry['what']:45s} {entry['seconds']:8.3f} s  {100 * entry['share_of_the_pass']:+6.1f} %")


if __name__ == "__main__":
    main()
