"""bergson's EK-FAC, or with `--steps N` its EK-FAC refined by N steps of conjugate gradients, by its own steps.

The products of the refinement are over `--documents` documents drawn for each query, as in its own board.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson.build import build_query
from bergson.config.config import (
    AstraConfig,
    DataConfig,
    HessianConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import create_index, load_gradients, load_scores
from bergson.hessians import astra as refinement
from bergson.hessians import hessian_approximations as fitting
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.score import score as scoring
from datasets import Dataset
from peer_run import PeerRun

BATCH = 16


def _save(ids: Any, folder: Path) -> str:
    Dataset.from_dict({"input_ids": ids.tolist(), "length": [len(row) for row in ids]}).save_to_disk(folder)
    return str(folder)


def _own_rows(read: Any) -> Any:
    # On the CPU bergson 2.5.1 refines rows of a read-only memory map in place and dies of it; on a GPU they are copies.
    return lambda *args: {name: row.clone() for name, row in read(*args).items()}


def main() -> None:
    """Run and write the results."""
    import json

    import bergson.build as building

    refinement.Astra._read_row = _own_rows(refinement.Astra._read_row)
    run = PeerRun(__doc__ or "")
    recorder, folder = run.recorder, run.out / "bergson"
    torch.manual_seed(0)
    with recorder.stage("setup"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        train, queries = _save(run.train, folder / "train"), _save(run.queries, folder / "queries")
        # Every step loads model and data anew; the other libraries are handed both, so neither is counted.
        for module in (fitting, building, scoring, refinement):
            for name in ("setup_model_and_peft", "setup_data_pipeline"):
                if hasattr(module, name):
                    recorder.wrap(module, name, "setup")

    # bergson takes no batch of more tokens than the model has positions.
    positions = json.loads((run.inputs / "model" / "config.json").read_text())["max_position_embeddings"]
    tokens = min(BATCH * run.train.shape[1], positions)

    def index(name: str, data: str) -> IndexConfig:
        return IndexConfig(
            run_path=str(folder / name),
            model=str(run.inputs / "model"),
            data=DataConfig(dataset=data),
            precision="fp32",
            token_batch_size=tokens,
            loss_reduction="sum",
        )

    with recorder.stage("fit"):
        fitting.approximate_hessians(index("hessian", train), HessianConfig(method="kfac", ev_correction=True))
    with recorder.stage("queries"):
        build_query(index("query", queries), QuerySetConfig(dataset=queries, aggregation="none"), PreprocessConfig())
    found = []
    for number, damping in enumerate(run.dampings):
        inversion = InversionConfig(inversion="damped_inverse", damping_factor=damping)
        inverted = folder / f"inverted{number}"
        inverted.mkdir()
        with recorder.stage("inverse"):
            options = {"hessian_method_path": str(folder / "hessian"), "gradient_path": str(folder / "query")}
            apply_worker(0, 0, 1, EkfacConfig(**options, run_path=str(inverted), ev_correction=True), inversion)
        if run.steps:
            refined = folder / f"refined{number}"
            with recorder.stage("refinement"):
                start = load_gradients(str(inverted))
                sizes = json.loads((inverted / "info.json").read_text())["grad_sizes"]
                create_index(refined, start.shape[0], sizes, start.dtype)
                shutil.copy(inverted / "processor_config.yaml", refined)
                paths = refinement.AstraPaths(
                    query_path=str(folder / "query"),
                    init_path=str(inverted),
                    hessian_path=str(folder / "hessian"),
                    run_path=str(refined),
                )
                settings = AstraConfig(num_steps=run.steps, solver="cg", batch_size=run.documents)
                refinement.astra_worker(0, 0, 1, paths, index("refine", train), inversion, settings, True)
            inverted = refined
        with recorder.stage("scores"):
            config = ScoreConfig(query_path=str(inverted), higher_is_better=True)
            scoring.score_dataset(index(f"scores{number}", train), config, PreprocessConfig())
        found.append(np.array(load_scores(folder / f"scores{number}")[:], dtype=np.float64).T)
    shutil.rmtree(folder, ignore_errors=True)
    cg = f"; {run.steps} steps of conjugate gradients on {run.documents} documents a query" if run.steps else ""
    run.finish(found, "bergson", version("bergson"), f"fp32, sampled labels, fp64 eigendecomposition{cg}")


if __name__ == "__main__":
    main()
