"""Scores against a bank: every metric that its retrainings allow, damping chosen on held-out queries, a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyinf.errors import ConfigError, DataError
from pyinf.evaluate import counterfactual as cf
from pyinf.evaluate.bank import Bank
from pyinf.evaluate.matrices import oriented
from pyinf.evaluate.subsets import random_removals, top_k_removals

__all__ = ["Evaluation", "bank_noise", "choose_damping", "evaluate_scores", "plan_removals", "to_csv", "to_rows"]


@dataclass
class Evaluation:
    """What a bank says about one score matrix: ``results`` maps a metric to its JSON, ``notes`` says what is odd."""

    name: str
    results: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    damping: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "damping": self.damping, "results": self.results, "notes": self.notes}


def _split(bank: Bank, reported: Sequence[int] | None) -> list[int]:
    if reported is None:
        reported = getattr(bank.protocol, "reported", None) or range(bank.protocol.query_size)
    chosen = [int(q) for q in reported]
    if not chosen or min(chosen) < 0 or max(chosen) >= bank.protocol.query_size:
        raise ConfigError(f"queries to report must be from 0 to {bank.protocol.query_size - 1}, at least one")
    return chosen


def choose_damping(
    scores: Mapping[float, Any], bank: Bank, queries: Sequence[int] | None = None, kind: str = "half", seed: int = 0
) -> tuple[float, dict[float, float]]:
    """The damping whose scores have the highest LDS on held-out queries.

    Args:
        scores: ``{damping: [Q, N]}`` over all queries of the bank.
        queries: which queries to choose on (default: the protocol's tuning queries). They must not be reported.

    Returns:
        The damping, and the mean LDS of each on those queries. The larger damping wins a tie.

    Raises:
        ConfigError: nothing to choose from, or no held-out queries.
    """
    if not scores:
        raise ConfigError("there is no damping to choose from; give at least one")
    held = list(queries) if queries is not None else list(getattr(bank.protocol, "tuning", ()))
    if not held:
        raise ConfigError("the protocol holds no queries out for tuning; name some, and report the others")
    counts, outcomes = bank.table(kind, seed)
    found = {}
    for damping, values in scores.items():
        own = oriented(values, bank.protocol.query_size, bank.protocol.train_size, "queries_by_train", "scores")
        found[damping] = float(cf.lds(own[held], counts, outcomes[:, held], resamples=1).value)
    best = max(found, key=lambda d: (found[d], d))
    return best, found


def plan_removals(
    bank: Bank, scores: Any, name: str, k: int, reported: Sequence[int] | None = None, controls: int = 10, seed: int = 0
) -> list[Any]:
    """The retrainings of a query loss difference: each reported query without its top ``k``, and ``controls`` random
    removals of ``k``.
    """
    plan = top_k_removals(scores, k, name, _split(bank, reported), seed)
    return plan + random_removals(bank.protocol.train_size, controls, seed=seed, size=k)


def bank_noise(bank: Bank, reported: Sequence[int] | None = None) -> dict[str, Any]:
    """How far the bank agrees with itself: repeats of one subset and seed, and the same subsets with another seed."""
    queries = _split(bank, reported)
    repeats, largest = bank.repeats()
    found: dict[str, Any] = {"repeats": repeats, "largest_difference_of_repeats": largest if repeats else None}
    for kind in bank.kinds():
        if kind == "half" or kind.startswith("removal"):
            first, second = bank.pairs(kind)
            if len(first) >= 3:
                found[kind] = cf.noise_ceiling(first[:, queries], second[:, queries]).to_dict()
    return found


def evaluate_scores(
    bank: Bank,
    scores: Any,
    name: str,
    layout: str = "auto",
    reported: Sequence[int] | None = None,
    qld_k: int | None = None,
    resamples: int = 2000,
) -> Evaluation:
    """Every metric that the finished retrainings of the bank allow, on the reported queries.

    ``lds`` (half subsets), ``lds_removal`` (1 % removals, same seed), ``lds_removal_other_seed``, ``leave_one_out``,
    ``copies``, and, where the retrainings without these scores' top k are in the bank, ``qld`` and ``brittleness``.

    Args:
        scores: ``[Q, N]`` over all queries of the bank, positive = a proponent.
        qld_k: which top-k removals to read (default: every k for which all reported queries are there).

    Raises:
        DataError: wrong shape, or a bank without any retrainings.
    """
    protocol = bank.protocol
    values = oriented(scores, protocol.query_size, protocol.train_size, layout, f"scores of {name}")
    queries = _split(bank, reported)
    own = values[queries]
    kinds = bank.kinds()
    if not any(kind != "full" for kind in kinds):
        raise DataError(f"the bank in {bank.directory} holds no retrainings yet; build it with: pyinf evaluate bank")
    result = Evaluation(name, {})
    for metric, kind, seed in (
        ("lds", "half", 0),
        ("lds_removal", "removal", 0),
        ("lds_removal_other_seed", "removal", 1),
    ):
        if len(bank.entries(kind, seed)) >= 3:
            counts, outcomes = bank.table(kind, seed)
            result.results[metric] = cf.lds(own, counts, outcomes[:, queries], resamples).to_dict()
    full = np.stack([e.measured["loss"] for e in bank.entries("full", 0)])[:, queries] if "full" in kinds else None
    if full is not None:
        _against_full(bank, own, queries, full, result, resamples)
        _removals(bank, values, queries, full, result, qld_k, resamples)
    value = result.results.get("lds", {}).get("value")
    if value is not None and value < -0.1:
        result.notes.append(
            "LDS is clearly negative: the sign looks reversed. Positive must mean that the example lowers the "
            "query's loss"
        )
    return result


def _against_full(
    bank: Bank, own: np.ndarray, queries: list[int], full: np.ndarray, result: Evaluation, resamples: int
) -> None:
    left_out = bank.entries("leave-one-out", 0)
    if len(left_out) >= 3:
        outcomes = np.stack([e.measured["loss"] for e in left_out])[:, queries]
        removed = [int(np.flatnonzero(e.retraining.counts == 0)[0]) for e in left_out]
        found = cf.leave_one_out_correlation(own, outcomes, full, removed, resamples)
        result.results["leave_one_out"] = {m: found[m].to_dict() for m in ("pearson", "spearman")}
    if bank.entries("copies", 0):
        counts, outcomes = bank.table("copies", 0)
        result.results["copies"] = cf.group_effect(own, counts, outcomes[:, queries], full)


def _removals(
    bank: Bank,
    values: np.ndarray,
    queries: list[int],
    full: np.ndarray,
    result: Evaluation,
    only: int | None,
    resamples: int,
) -> None:
    from pyinf.evaluate.bank import Entry

    sizes = sorted(int(k.split("-")[1]) for k in bank.kinds() if k.startswith("top-"))
    margins: dict[int, np.ndarray] = {}
    for k in sizes if only is None else [only]:
        plan = top_k_removals(values, k, result.name, queries)
        if bank.missing(plan):
            continue
        entries = [Entry.load(bank.path(r), bank.identity) for r in plan]
        outcomes = np.array([e.measured["loss"][q] for e, q in zip(entries, queries, strict=True)])
        kind = random_removals(bank.protocol.train_size, 1, size=k)[0].kind
        controls = bank.entries(kind, 0)
        control = np.stack([e.measured["loss"] for e in controls])[:, queries] if controls else None
        found = cf.query_loss_difference(outcomes, full, control, resamples).to_dict()
        result.results.setdefault("qld", {})[str(k)] = found
        if "margin" in entries[0].measured:
            margins[k] = np.array([e.measured["margin"][q] for e, q in zip(entries, queries, strict=True)])
    if margins:
        start = np.stack([e.measured["margin"] for e in bank.entries("full", 0)])[:, queries].mean(0)
        if (start > 0).any():
            result.results["brittleness"] = cf.brittleness(start, margins).to_dict()


# ------------------------------------------------------------------------------------------ tables


def to_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One flat row a score matrix: the value of every metric with its interval."""
    rows = []
    for evaluation in evaluations:
        row: dict[str, Any] = {"name": evaluation.name, "damping": evaluation.damping}
        for metric, found in evaluation.results.items():
            if metric.startswith("lds"):
                both = found["interval"]["both"]
                row |= {metric: found["value"], f"{metric}_low": both["low"], f"{metric}_high": both["high"]}
            elif metric == "leave_one_out":
                row |= {"loo_spearman": found["spearman"]["value"], "loo_pearson": found["pearson"]["value"]}
            elif metric == "copies":
                row |= {"copies_spearman": found["spearman"], "copies_slope": found["slope"]}
            elif metric == "qld":
                for k, part in found.items():
                    net = part["net"] or part["removed"]
                    row |= {f"qld_{k}": net["value"], f"qld_{k}_low": net["low"], f"qld_{k}_high": net["high"]}
            elif metric == "brittleness":
                row |= {f"flipped_{k}": share for k, share in found["flipped"].items()}
        rows.append(row)
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]], digits: int = 4) -> str:
    """Rows as CSV, columns in order of first appearance, floats with ``digits`` decimals, dampings as they are."""

    def cell(name: str, value: Any) -> Any:
        if not isinstance(value, float):
            return "" if value is None else value
        return f"{value:g}" if name == "damping" else f"{value:.{digits}f}"

    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([cell(name, row.get(name)) for name in columns])
    return text.getvalue()
