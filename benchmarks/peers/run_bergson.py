"""bergson, the steps of its `hessian_pipeline`: K-FAC with corrected eigenvalues, query gradients, inverse, scores."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bergson.build import build_query
from bergson.config.config import (
    DataConfig,
    HessianConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.hessians import hessian_approximations as fitting
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.score import score as scoring
from common import Run
from datasets import Dataset


def _save(ids: Any, folder: Path) -> str:
    Dataset.from_dict({"input_ids": ids.tolist(), "length": [len(row) for row in ids]}).save_to_disk(folder)
    return str(folder)


def main() -> None:
    """Run and write the result."""
    run = Run(__doc__ or "")
    recorder = run.recorder
    import bergson.build as building

    folder = run.out / "bergson"
    with recorder.stage("setup"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        train = _save(run.train, folder / "train")
        queries = _save(run.queries, folder / "queries")
        # Every step loads the model and the data anew; the other libraries are handed both, so neither is counted.
        for module in (fitting, building, scoring):
            recorder.wrap(module, "setup_model_and_peft", "setup")
            recorder.wrap(module, "setup_data_pipeline", "setup")
        recorder.wrap(
            fitting, "collect_hessians", lambda **options: "lambda" if options.get("ev_correction") else "covariances"
        )
        recorder.wrap(fitting, "eigendecompose_owned", "eigendecomposition")

    def index(name: str, data: str) -> IndexConfig:
        return IndexConfig(
            run_path=str(folder / name),
            model=str(run.inputs / "model"),
            data=DataConfig(dataset=data),
            precision="fp32",
            include_bias=run.shape.family == "gpt2",
            token_batch_size=run.shape.batch * run.shape.length,
            loss_reduction="sum",
        )

    inversion = InversionConfig(inversion="damped_inverse", damping_factor=run.damping)
    with recorder.stage("other"):
        fitting.approximate_hessians(
            index("hessian", train), HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True)
        )
    with recorder.stage("queries"):
        build_query(index("query", queries), QuerySetConfig(dataset=queries, aggregation="none"), PreprocessConfig())
        inverted = folder / "inverted"
        inverted.mkdir()
        apply_worker(
            0,
            0,
            1,
            EkfacConfig(
                hessian_method_path=str(folder / "hessian"),
                gradient_path=str(folder / "query"),
                run_path=str(inverted),
                ev_correction=True,
                apply_batch_size=inversion.apply_batch_size,
            ),
            inversion,
        )
    with recorder.stage("scores"):
        scoring.score_dataset(
            index("scores", train), ScoreConfig(query_path=str(inverted), higher_is_better=True), PreprocessConfig()
        )
    scores = np.array(load_scores(folder / "scores")[:], dtype=np.float32).T
    shutil.rmtree(folder, ignore_errors=True)
    run.finish(
        scores,
        "bergson",
        version("bergson"),
        "fp32; eigendecomposition fp64 (default); dense query gradients on disk (its only EK-FAC path); model "
        "loading in each step not counted",
        positions="all_but_last",
    )


if __name__ == "__main__":
    main()
