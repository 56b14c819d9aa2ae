"""kronfluence's EK-FAC, labels sampled from the model, as its documentation runs it; float64 eigendecomposition."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from typing import Any

import kronfluence.factor.config as factor_config
import torch
from common import summed_loss
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from peer_run import PeerRun
from torch import nn
from torch.utils.data import Dataset

BATCH = 16


class Tokens(Dataset):
    """Token ids `[N, T]`."""

    def __init__(self, ids: Any) -> None:
        self.ids = torch.from_numpy(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.ids[index]


class CausalTask(Task):
    """Summed next-token loss; labels drawn from the model where kronfluence asks for it."""

    def __init__(self, tracked: list[str]) -> None:
        self.tracked = tracked

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
        """Summed loss of the data's labels, or of sampled ones."""
        if not sample:
            return summed_loss(model, batch)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        with torch.no_grad():
            labels = torch.multinomial(flat.softmax(-1), 1).squeeze(1)
        return torch.nn.functional.cross_entropy(flat, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
        """Loss of a query."""
        return summed_loss(model, batch)

    def get_influence_tracked_modules(self) -> list[str]:
        """The linear layers of the blocks."""
        return self.tracked


def main() -> None:
    """Run and write the results."""
    from transformers import AutoModelForCausalLM

    run = PeerRun(__doc__ or "")
    torch.manual_seed(0)
    with run.recorder.stage("setup"):
        model = AutoModelForCausalLM.from_pretrained(run.inputs / "model", dtype=torch.float32).eval()
        tracked = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
        task = CausalTask(tracked)
        model = prepare_model(model, task)
        folder = run.out / "kronfluence"
        shutil.rmtree(folder, ignore_errors=True)
        analyzer = Analyzer("board", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        train, queries = Tokens(run.train), Tokens(run.queries)
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=False)
    with run.recorder.stage("covariances"):
        analyzer.fit_covariance_matrices("f", train, per_device_batch_size=BATCH, factor_args=arguments)
    with run.recorder.stage("eigendecomposition"):
        analyzer.perform_eigendecomposition("f", factor_args=arguments)
    with run.recorder.stage("lambda"):
        analyzer.fit_lambda_matrices("f", train, per_device_batch_size=BATCH, factor_args=arguments)
    found = []
    for number, damping in enumerate(run.dampings):
        # damping_factor=None is a share of each layer's mean eigenvalue; the share is a constant of the library.
        factor_config.HEURISTIC_DAMPING_SCALE = damping
        with run.recorder.stage("scores"):
            analyzer.compute_pairwise_scores(
                f"s{number}",
                "f",
                queries,
                train,
                per_device_query_batch_size=len(run.queries),
                per_device_train_batch_size=BATCH,
                score_args=ScoreArguments(damping_factor=None),
            )
        found.append(analyzer.load_pairwise_scores(f"s{number}")["all_modules"].clone())
    shutil.rmtree(folder, ignore_errors=True)
    run.finish(found, "kronfluence", version("kronfluence"), "fp32, sampled labels, fp64 eigendecomposition")


if __name__ == "__main__":
    main()
