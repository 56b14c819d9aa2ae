"""Tail-patch: one training step on what was retrieved, and how much likelier the target is after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyinf import progress
from pyinf.errors import ConfigError, DataError
from pyinf.evaluate.statistics import bootstrap_mean, matrix
from pyinf.tasks import CausalLM, Task

__all__ = ["tail_patch"]


def tail_patch(
    model: nn.Module,
    train: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]],
    scores: Any,
    k: int = 10,
    rate: float = 1e-3,
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] | None = None,
    task: Task | None = None,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Tail-patch score: ``f_q(θ) − f_q(θ_i)``, where ``θ_i`` is ``θ`` after one step on the loss of training example i
    alone, averaged over the top ``k`` examples of the query, then over queries. Positive = the query becomes likelier.

    Args:
        model: trained; not changed. train, queries: mappings with ``input_ids`` (and ``labels``).
        scores: ``[Q, N]``.
        rate: learning rate of the step; that of the end of training is usual. The loss of the step is a mean over the
            counted tokens of the example.
        optimizer: ``(parameters, rate) -> optimizer``; plain gradient descent by default, since the moments of the
            training's optimizer are not at hand as a rule.

    Returns:
        ``{"value": Estimate over queries, "per_query": [Q]}``, in the unit of the measurement (nats a sequence).

    Source: Chang et al. 2024 (TrackStar), arXiv 2410.17413, section 4.
    """
    values = matrix(scores, "scores")
    if values.shape != (len(queries), len(train)):
        raise DataError(
            f"scores have shape {values.shape}; for {len(queries)} queries and {len(train)} training examples it must "
            f"be {(len(queries), len(train))}"
        )
    if not 1 <= k <= len(train) or rate <= 0:
        raise ConfigError(f"k is {k} and rate {rate}; k must be from 1 to {len(train)} and the rate above 0")
    task = task or CausalLM()
    work = copy.deepcopy(model).eval()
    start = {name: p.detach().clone() for name, p in work.named_parameters()}
    device = next(work.parameters()).device
    make = optimizer or (lambda parameters, lr: torch.optim.SGD(parameters, lr=lr))
    wanted: dict[int, list[int]] = {}  # example -> queries: one step serves all that retrieved it
    for q in range(len(queries)):
        for i in np.argsort(-values[q], kind="stable")[:k]:
            wanted.setdefault(int(i), []).append(q)
    batches = [_single(query, device) for query in queries]
    before = [_measure(task, work, batch) for batch in batches]
    gain = np.zeros(len(queries))
    with progress.stage("tail patches", len(wanted), "steps") as stage:
        for i, asking in wanted.items():
            with torch.no_grad():
                for name, p in work.named_parameters():
                    p.copy_(start[name])
            step = make(work.parameters(), rate)
            batch = _single(train[i], device)
            counted = max(1, int((batch["labels"][:, 1:] != -100).sum()))
            step.zero_grad()
            (task.train_loss(work, batch) / counted).backward()
            step.step()
            for q in asking:
                gain[q] += (before[q] - _measure(task, work, batches[q])) / k
            stage.advance(1)
    return {"value": bootstrap_mean(gain, resamples), "per_query": gain}


def _single(example: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    ids = torch.as_tensor(example["input_ids"]).long()[None].to(device)
    labels = example.get("labels")
    batch = {"input_ids": ids, "labels": ids if labels is None else torch.as_tensor(labels).long()[None].to(device)}
    if example.get("attention_mask") is not None:
        batch["attention_mask"] = torch.as_tensor(example["attention_mask"]).long()[None].to(device)
    return batch


def _measure(task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return float(task.measurement(model, batch))
