"""What convergence does to the LDS: that of the iterates of refinement, one by one, on the board's tuning queries.

    python -m benchmarks.board.convergence [--dampings 0.1 1 10] [--iterations 6]

The reported queries are left alone. The curvature is that of all training sequences, the start EK-FAC's own solution.
Writes `benchmarks/results/board/convergence.csv`: damping, iteration, LDS, mean relative residual of the recurrence.
Rows of other dampings that are there stay.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pyinf
from benchmarks.board.__main__ import RESULTS, ROOT, open_bank
from pyinf import artifacts, evaluate
from pyinf.cli.evaluate import bank_model
from pyinf.data.batching import make_batches, prepare
from pyinf.plan import default_token_budget
from pyinf.solve import Damped, GGNOperator, Layout, block_cg


def main() -> None:
    """Run it and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "board")
    parser.add_argument("--protocol", default="small", choices=sorted(evaluate.PROTOCOLS))
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.1, 1.0, 10.0])
    parser.add_argument("--iterations", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bank = open_bank(options)
    protocol, model = bank.protocol, bank_model(bank)
    train = [{"input_ids": ids} for ids in protocol.train_tokens]
    queries = [{"input_ids": protocol.query_tokens[q]} for q in protocol.tuning]
    counts, outcomes = bank.table("half")
    attributor = pyinf.Attributor(model, "ekfac", certify=False).fit(train)
    run, factors, layout = attributor._run, attributor.factors, Layout.of(attributor.selection.layers)
    assert factors is not None
    data = prepare(train, "train", model)
    batches = make_batches(data.lengths, None, None, default_token_budget(torch.device("cpu")))
    V = run.raw_gradients(
        prepare(queries, "queries", model), list(range(len(queries))), attributor.plan(train, queries)
    )
    gradients = run.gradient_rows(data, batches, "train")
    G, order = gradients.matrix(), gradients.indices
    kept = RESULTS / "convergence.csv"
    rows: list[dict[str, float]] = []
    if kept.exists():
        with kept.open(newline="") as handle:
            found = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(handle)]
        rows = [{**r, "iteration": int(r["iteration"])} for r in found if r["damping"] not in options.dampings]

    def lds(X: Tensor) -> float:
        scores = np.zeros((len(queries), len(train)))
        scores[:, order] = (X @ G.T).double().numpy()
        return evaluate.lds(scores, counts, outcomes[:, protocol.tuning], resamples=1).value

    with GGNOperator(model, attributor.selection, pyinf.CausalLM(), data, batches, len(train)) as curvature:
        for damping in options.dampings:

            def inverse(X: Tensor, damping: float = damping) -> Tensor:
                return layout.pack(factors.ihvp(layout.unpack(X), damping))

            def precondition(X: Tensor, damping: float = max(10.0, damping)) -> Tensor:  # as ekfac_cg does
                return layout.pack(factors.ihvp(layout.unpack(X), damping))

            def note(iteration: int, X: Tensor, R: Tensor, damping: float = damping) -> None:
                residual = float((R.norm(dim=1) / V.norm(dim=1)).mean())
                rows.append({"damping": damping, "iteration": iteration, "lds": lds(X), "relative_residual": residual})
                print(json.dumps(rows[-1]), flush=True)
                artifacts.atomic_write_bytes(kept, evaluate.to_csv(rows).encode())

            system = Damped(curvature, layout.spread(factors.dampings(damping, "relative"), V))
            block_cg(system, V, precondition, inverse(V), 1e-6, options.iterations, final=False, after=note)


if __name__ == "__main__":
    main()
