"""dattri-llm, `EKFACAttributor.attribute`: gradients streamed live (default), or each side captured once in memory."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from typing import Any

import torch
from common import Run, summed_loss
from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig
from dattri_llm.gradient import ops
from torch.utils.data import Dataset


class Tokens(Dataset):
    """Token ids as the mappings that the library hashes to know a sample."""

    def __init__(self, ids: Any) -> None:
        self.ids = torch.from_numpy(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return summed_loss(model, batch["input_ids"])


def main() -> None:
    """Run and write the result."""
    run = Run(__doc__ or "", variants=("default", "memory"))
    recorder = run.recorder
    folder = run.out / "dattri"
    with recorder.stage("setup"):
        shutil.rmtree(folder, ignore_errors=True)
        model = run.model()
        # Its documented probe without weight gradients: everything frozen but one small input-side parameter. GPT-2
        # ties its token embedding to the head, so there the position embedding carries the graph.
        model.requires_grad_(False)
        input_side = model.transformer.wpe if run.shape.family == "gpt2" else model.model.embed_tokens
        input_side.requires_grad_(True)
        arguments = AttributionArguments(
            output_dir=str(folder),
            per_device_train_batch_size=run.shape.batch,
            per_device_eval_batch_size=len(run.queries),
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        config = HookManagerConfig(
            linear_io=[rf"^{name.replace('.', chr(92) + '.')}$" for name in run.shape.tracked()], include_frozen=True
        )
        attributor = EKFACAttributor(arguments, task=AttributionTask(_loss, model))

        fit, transform, route = attributor.fit_factors, attributor.transform_test_rep, attributor._route_test_rep
        eigh = ops.kfac_eigh

        def timed_eigh(*args: Any, **kwargs: Any) -> Any:
            recorder.switch("eigendecomposition")
            try:
                return eigh(*args, **kwargs)
            finally:
                # Between two of these there is nothing; after the last one comes the pass for Lambda.
                recorder.switch("lambda")

        def timed_fit(*args: Any, **kwargs: Any) -> Any:
            with recorder.stage("covariances"):
                return fit(*args, **kwargs)

        def timed_transform(block: Any) -> Any:
            with recorder.stage("queries"):
                return transform(block)

        def timed_route(block: Any) -> Any:
            with recorder.stage("queries"):
                return route(block)

        ops.kfac_eigh = timed_eigh
        attributor.fit_factors = timed_fit
        attributor.transform_test_rep = timed_transform
        attributor._route_test_rep = timed_route
        recorder.wrap(attributor, "collect_gradients", "capture")
        recorder.wrap(attributor, "build_score", "other")
    with recorder.stage("scores"):
        score = attributor.attribute(
            Tokens(run.train),
            Tokens(run.queries),
            hook_config=config,
            damping=run.damping,
            relative_damping=True,
            gradient_cache_residency="memory" if run.variant == "memory" else None,
        )
    _, matrix = score.agnostic_matrix()
    shutil.rmtree(folder, ignore_errors=True)
    how = "each side captured once and held in memory" if run.variant == "memory" else "gradients live, three passes"
    run.finish(
        matrix.T,
        "dattri-llm",
        version("dattri-llm"),
        f"fp32; eigendecomposition fp32 (its only choice); {how}; query passes of the model counted in scores; "
        "covariances drop positions whose gradient is zero",
        positions="all_but_last",
    )


if __name__ == "__main__":
    main()
