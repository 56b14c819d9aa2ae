"""kronfluence, as its documentation runs it: Analyzer, one call a stage, float32, float64 eigendecomposition (default).

The variant `all_but_last` masks each sequence's last position out of the input covariances, which is what bergson and
dattri-llm do; it exists to check that those two compute the same thing, not to be timed.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from typing import Any

import torch
from common import Run, summed_loss
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from torch.utils.data import Dataset


class Tokens(Dataset):
    """Token ids `[N, T]` as a dataset of tensors."""

    def __init__(self, ids: Any) -> None:
        self.ids = torch.from_numpy(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.ids[index]


class CausalTask(Task):
    """Summed next-token loss for training and for the measurement."""

    def __init__(self, tracked: list[str], mask_last: bool) -> None:
        self.tracked = tracked
        self.mask_last = mask_last

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        """Summed loss of the data's labels; the benchmark asks for the empirical Fisher only."""
        if sample:
            raise ValueError("the benchmark compares empirical Fisher factors")
        return summed_loss(model, batch)

    def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
        """The same loss on a query."""
        return summed_loss(model, batch)

    def get_influence_tracked_modules(self) -> list[str]:
        """Names of the attention and MLP layers."""
        return self.tracked

    def get_attention_mask(self, batch: Any) -> torch.Tensor | None:
        """Which positions the input covariances count (None = all)."""
        if not self.mask_last:
            return None
        mask = torch.ones_like(batch)  # integers: it is added to an integer count
        mask[:, -1] = 0
        return mask


def main() -> None:
    """Run and write the result."""
    run = Run(__doc__ or "", variants=("default", "all_but_last"))
    with run.recorder.stage("setup"):
        task = CausalTask(run.shape.tracked(), run.variant == "all_but_last")
        model = prepare_model(run.model(conv1d="linear"), task)
        folder = run.out / "kronfluence"
        shutil.rmtree(folder, ignore_errors=True)
        analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        train, queries = Tokens(run.train), Tokens(run.queries)
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    batch = run.shape.batch
    with run.recorder.stage("covariances"):
        analyzer.fit_covariance_matrices("f", train, per_device_batch_size=batch, factor_args=arguments)
    with run.recorder.stage("eigendecomposition"):
        analyzer.perform_eigendecomposition("f", factor_args=arguments)
    with run.recorder.stage("lambda"):
        analyzer.fit_lambda_matrices("f", train, per_device_batch_size=batch, factor_args=arguments)
    with run.recorder.stage("scores"):
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            queries,
            train,
            per_device_query_batch_size=len(run.queries),
            per_device_train_batch_size=batch,
            # None asks for 0.1 x the mean of each layer's Lambda, the rule that every library here uses.
            score_args=ScoreArguments(damping_factor=None),
        )
    scores = analyzer.load_pairwise_scores("s")["all_modules"]
    shutil.rmtree(folder, ignore_errors=True)
    run.finish(
        scores,
        "kronfluence",
        version("kronfluence"),
        "fp32; eigendecomposition fp64 (default); all queries in one pass; query gradients counted in scores; "
        "Conv1D rewritten as Linear",
        positions="all" if run.variant == "default" else "all_but_last",
    )


if __name__ == "__main__":
    main()
