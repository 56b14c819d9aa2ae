"""What an unfinished fit or scoring run must find unchanged to be gone on with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pyinf import artifacts
from pyinf.curvature import Factors
from pyinf.data.batching import PreparedExamples
from pyinf.methods.gradient import ScoreRequest
from pyinf.methods.solved import SolvedRun
from pyinf.plan import Plan

__all__ = ["data_fingerprint", "fit_identity", "score_home"]


def data_fingerprint(data: PreparedExamples) -> str:
    """SHA-256 of prepared examples: token ids, labels, masks and the task's own fields."""
    rows = []
    for ids, labels, mask, extras in zip(data.input_ids, data.labels, data.masks, data.extras, strict=True):
        row = {"input_ids": ids.tolist(), "labels": labels.tolist(), **{k: v.tolist() for k, v in extras.items()}}
        rows.append(row if mask is None else {**row, "attention_mask": mask.long().tolist()})
    return artifacts.fingerprint_examples(rows)


def fit_identity(run: SolvedRun, data: PreparedExamples, plan: Plan) -> dict[str, Any]:
    """Of a fit of the run's factors on ``data``."""
    return {
        "what": "pyinf fit",
        "method": run.method.factors,
        "model": artifacts.fingerprint_model(run.model),
        "data": data_fingerprint(data),
        "layers": run.selection.names,
        "fisher": run.fisher,
        "seed": run.seed,
        "eigensolver": run.eigensolver,
        **({} if run.factor_block is None else {"factor_block": run.factor_block}),
        "task": run.task.fingerprint(),
        "batch_size": plan.batch_size,
        "token_budget": plan.token_budget,
    }


def score_home(
    run: SolvedRun,
    run_dir: Path | None,
    queries: PreparedExamples,
    train: PreparedExamples,
    factors: Factors | None,
    request: ScoreRequest,
    plan: Plan,
) -> Path | None:
    """The directory of an unfinished scoring run, claimed for it; None for what is not resumable.

    Raises:
        ArtifactError: the directory holds something else.
    """
    if run_dir is None or request.granularity == "token" or request.topk is not None:
        return None
    identity = {
        "what": "pyinf score",
        "method": run.method.name,
        "model": artifacts.fingerprint_model(run.model),
        "train": data_fingerprint(train),
        "queries": data_fingerprint(queries),
        "layers": run.selection.names,
        "task": run.task.fingerprint(),
        "seed": run.seed,
        "request": str(request),
        "options": run.identity_of([*run.method.options, "certify"]),
        "refine": [run.refine, run.options.get("tol")],
        "batches": [plan.batch_size, plan.token_budget, plan.query_block],
        "factors": None if factors is None else factors.meta,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    home = run_dir / "unfinished" / digest
    artifacts.claim_directory(home, identity)
    return home
