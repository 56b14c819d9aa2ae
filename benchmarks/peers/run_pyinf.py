"""pyinf, the one call: `Attributor.run`. Variants: what the plan chooses (default), the model anew for each pass,
and the eigendecomposition in float64 as kronfluence and bergson have it.

Stage times and memory come from the library's own progress events; the seconds it reports itself stand beside them.
"""

from __future__ import annotations

import contextlib

import torch
from common import Run

import pyinf
from pyinf import progress

STAGE_OF = {
    "covariances": "covariances",
    "eigenbases": "eigendecomposition",
    "corrected eigenvalues": "lambda",
    "query gradients": "queries",
    "training pass and scores": "scores",
}


class _Sink:
    """Turns progress events into stages of the recorder."""

    def __init__(self, run: Run) -> None:
        self.recorder = run.recorder
        self.open: list[contextlib.AbstractContextManager[None]] = []
        self.notes: list[str] = []

    def start(self, stage: progress.Stage) -> None:
        self.open.append(self.recorder.stage(STAGE_OF.get(stage.name, "other")))
        self.open[-1].__enter__()

    def advance(self, stage: progress.Stage) -> None:
        pass

    def end(self, stage: progress.Stage) -> None:
        self.open.pop().__exit__(None, None, None)

    def note(self, text: str) -> None:
        self.notes.append(text)


def main() -> None:
    """Run and write the result."""
    run = Run(__doc__ or "", variants=("default", "no_cache", "fp64"))
    with run.recorder.stage("setup"):
        model = run.model()
        train = [{"input_ids": torch.from_numpy(row)} for row in run.train]
        queries = [{"input_ids": torch.from_numpy(row)} for row in run.queries]
        sink = _Sink(run)
    with run.recorder.stage("other"), progress.use(sink):
        attributor = pyinf.Attributor(
            model,
            method="ekfac",
            modules=run.shape.tracked(),
            damping=run.damping,
            fisher="empirical",
            cache="none" if run.variant == "no_cache" else "auto",
            eigensolver="fp64" if run.variant == "fp64" else "auto",
            certify=False,  # the other libraries certify nothing
        )
        scores = attributor.run(train, queries, batch_size=run.shape.batch)
    run.finish(
        scores.values,
        "pyinf",
        pyinf.__version__,
        f"fp32; eigensolver {'fp64' if run.variant == 'fp64' else 'auto'}; "
        + ("cache none, three passes" if run.variant == "no_cache" else "cache as planned"),
        positions="all",
        own_timings=dict(attributor.timings),
        plan=scores.meta.get("plan"),
        notes=sink.notes,
    )


if __name__ == "__main__":
    main()
