"""Block conjugate gradients: products against plain CG, and seconds for Q queries at once against one at a time.

python -m benchmarks.block_cg [--queries 32] [--tol 1e-3] [--out benchmarks/results/solve/block_cg.json]

A small GPT-2 is trained here on random Markov chains; queries are sequences of the same chain. Solvers stop at the true
relative residual (``bound=False``), so that counts compare with the literature's.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import pyinf
from pyinf.data.batching import make_batches, prepare
from pyinf.solve import Damped, GGNOperator, Layout, block_cg, cg

RESULT = Path(__file__).parent / "results" / "solve" / "block_cg.json"
VOCABULARY, WIDTH, LAYERS = 32, 16, 1


def trained(sequences: int, queries: int, steps: int) -> tuple[Any, list[dict], list[dict], float]:
    """A model trained on chains, its data, fresh queries, and its loss a token at the end."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    rng = random.Random(0)
    chain = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)), -1)

    def sequence() -> dict[str, list[int]]:
        ids = [rng.randrange(VOCABULARY)]
        for _ in range(rng.randrange(12, 24) - 1):
            ids.append(rng.choices(range(VOCABULARY), chain[ids[-1]].tolist())[0])
        return {"input_ids": ids}

    data, asked = ([sequence() for _ in range(n)] for n in (sequences, queries))
    rows = [torch.tensor(e["input_ids"]) for e in data]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = pad(rows, batch_first=True), pad(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = torch.randperm(sequences)[:32]
        loss = model(input_ids=ids[chosen], labels=labels[chosen], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), data, asked, float(loss.detach())


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--one-at-a-time", type=int, default=4, help="how many of the queries are solved alone")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model, train, queries, loss = trained(args.sequences, args.queries, args.steps)
    attributor = pyinf.Attributor(model, "ekfac", damping=args.damping, certify=False).fit(train)
    layout, factors = Layout.of(attributor.selection.layers), attributor.factors
    assert factors is not None
    V = attributor._run.raw_gradients(
        prepare(queries, "queries", model), list(range(len(queries))), attributor.plan(train, queries)
    )
    data = prepare(train, "train", model)
    lam = layout.spread(factors.dampings(args.damping, "relative"), V)

    def preconditioner(damping: float):
        return lambda X: layout.pack(factors.ihvp(layout.unpack(X), damping))

    own, heavy = preconditioner(args.damping), preconditioner(max(10.0, args.damping))
    rows: list[dict[str, Any]] = []
    batches = make_batches(data.lengths, None, None, 2048)
    with GGNOperator(model, attributor.selection, pyinf.CausalLM(), data, batches, len(train)) as C:
        C(V[:1])  # warm up

        def run(name: str, solve: Any, rhs: Any, precondition: Any, x0: Any) -> dict[str, Any]:
            started = time.perf_counter()
            found = solve(
                Damped(C, lam), rhs, precondition, None if x0 is None else x0(rhs), args.tol, 3000, bound=False
            )
            seconds = time.perf_counter() - started
            row = {
                "solver": name, "queries": rhs.shape[0],
                "products": found.products, "iterations": max(found.iterations),
                "solved": sum(found.solved), "worst_residual": max(found.residuals), "seconds": round(seconds, 3),
            }  # fmt: skip
            print(row, flush=True)
            rows.append(row)
            return row

        plain = run("plain CG", cg, V, None, None)
        run("CG, EK-FAC at the system's damping", cg, V, own, own)
        run("block CG, no preconditioner", block_cg, V, None, None)
        run("block CG, EK-FAC at the system's damping", block_cg, V, own, own)
        best = run("block CG, EK-FAC at damping 10 (ekfac_cg)", block_cg, V, heavy, own)
        alone = [
            run(f"query {q} alone, EK-FAC at damping 10", block_cg, V[q : q + 1], heavy, own)
            for q in range(min(args.one_at_a_time, len(queries)))
        ]
    separate = sum(r["seconds"] for r in alone) / len(alone) * len(queries)
    summary = {
        "products_ratio": round(best["products"] / plain["products"], 4),
        "seconds_together": best["seconds"],
        "seconds_one_at_a_time": round(separate, 3),
        "seconds_ratio": round(best["seconds"] / separate, 4),
    }
    print(summary)
    result = {
        "model": f"GPT-2, {LAYERS} layer, d = {WIDTH}, {layout.size:,} traced parameters, loss {loss:.3f} a token",
        "train": len(train), "tokens": sum(data.counted), "queries": len(queries), "tol": args.tol,
        "damping": args.damping, "dtype": "float64", "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows, **summary,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
