"""A board: methods × {LDS, query loss difference, time, memory} on one bank, one row at a time, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyinf import artifacts, progress
from pyinf.errors import ArtifactError, ConfigError
from pyinf.evaluate.bank import Bank
from pyinf.evaluate.counterfactual import LDS, lds_difference
from pyinf.evaluate.evaluation import Evaluation, choose_damping, evaluate_scores, plan_removals, to_rows

__all__ = ["DAMPINGS", "Scorer", "compare_rows", "measured", "read_rows", "run_row", "time_row"]

DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)

# (queries, training set, dampings) -> {damping: [Q, N]}; queries and training set are lists of {"input_ids"}.
Scorer = Callable[[list[dict[str, Any]], list[dict[str, Any]], Sequence[float]], Mapping[float, Any]]


def measured(work: Callable[[], Any]) -> tuple[Any, float, float | None]:
    """Run ``work``: its result, wall seconds, and peak resident memory in MB meanwhile (None where it cannot be read).

    The peak is the kernel's high-water mark, reset before; it includes what the process held already.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        readable = True
    except OSError:
        readable = False
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    if not readable:
        return result, seconds, None
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return result, seconds, int(line.split()[1]) / 1024


def _rows_of(tokens: Any, chosen: Sequence[int]) -> list[dict[str, Any]]:
    return [{"input_ids": tokens[q]} for q in chosen]


def run_row(
    bank: Bank,
    name: str,
    scorer: Scorer,
    folder: Path,
    dampings: Sequence[float] = DAMPINGS,
    qld_k: int | None = None,
    controls: int = 10,
    workers: int = 1,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One row: choose the damping on the tuning queries, score the reported ones with it (timed), retrain without their
    top ``qld_k``, evaluate. Stages that are finished in ``folder`` are read.

    Args:
        scorer: how the method scores; called twice, with every damping on the tuning queries, then with the chosen one
            on the reported queries. Only the second call counts for time and memory: everything from model to scores.
        dampings: one value for a method without damping.
        qld_k: how many examples to remove a query; None: no query loss difference.

    Returns:
        The content of ``row.json``.
    """
    protocol: Any = bank.protocol
    for needed in ("tuning", "reported", "train_tokens", "query_tokens"):
        if not hasattr(protocol, needed):
            raise ConfigError(
                f"a board needs a protocol with {needed}; score your own protocol by yourself and evaluate the matrix"
            )
    folder = Path(folder)
    description = {"bank": bank.identity, "name": name, "dampings": list(dampings), **(about or {})}
    artifacts.claim_directory(folder, description)
    train = _rows_of(protocol.train_tokens, range(protocol.train_size))
    scored = folder / "scores.json"
    if not (scored.exists() and (folder / "scores.npy").exists()):
        sweep = {
            float(d): np.asarray(v, dtype=np.float64)
            for d, v in scorer(_rows_of(protocol.query_tokens, protocol.tuning), train, dampings).items()
        }
        wide = {d: _placed(v, protocol.tuning, protocol.query_size) for d, v in sweep.items()}
        best, table = choose_damping(wide, bank)
        progress.note(f"{name}: damping {best:g} of {', '.join(f'{d:g} ({v:.3f})' for d, v in table.items())}")
        own, seconds, peak = _reported(protocol, scorer, train, best)
        values = wide[best] + _placed(own, protocol.reported, protocol.query_size)
        _save_matrix(folder / "scores.npy", values)
        facts = {
            "damping": best,
            "sweep": {f"{d:g}": v for d, v in table.items()},
            "seconds": seconds,
            "peak_mb": peak,
            "sha256": artifacts.sha256_file(folder / "scores.npy"),
        }
        artifacts.atomic_write_json(scored, facts)
    facts = artifacts.read_json(scored)
    if artifacts.sha256_file(folder / "scores.npy") != facts["sha256"]:
        raise ArtifactError(f"{folder / 'scores.npy'} was changed; delete {folder} and run again")
    values = np.load(folder / "scores.npy", allow_pickle=False)
    if qld_k is not None:
        bank.build(plan_removals(bank, values, name, qld_k, controls=controls), workers)
    evaluation = evaluate_scores(bank, values, name, qld_k=qld_k)
    evaluation.damping = facts["damping"] if len(dampings) > 1 else None
    row = {**evaluation.to_dict(), **{k: facts[k] for k in ("seconds", "peak_mb", "sweep")}, "bank": bank.identity}
    artifacts.atomic_write_json(folder / "row.json", {**row, **(about or {})})
    return {**row, **(about or {})}


def _reported(
    protocol: Any, scorer: Scorer, train: list[dict[str, Any]], damping: float
) -> tuple[np.ndarray, float, float | None]:
    """Scores of the reported queries at one damping, seconds and peak memory."""
    queries = _rows_of(protocol.query_tokens, protocol.reported)
    final, seconds, peak = measured(lambda: scorer(queries, train, [damping]))
    # A scorer that works in another process measures that one itself.
    seconds, peak = getattr(final, "seconds", seconds), getattr(final, "peak_mb", peak)
    return np.asarray(final[damping], dtype=np.float64), seconds, peak


def time_row(bank: Bank, scorer: Scorer, folder: Path) -> dict[str, Any]:
    """Measure seconds and peak memory of a finished row again (with the machine alone, say) and keep those.

    Returns:
        ``{"seconds", "peak_mb"}``.

    Raises:
        ArtifactError: the row is not finished, or the scores came out differently by more than 1e-3 of their norm.
    """
    protocol: Any = bank.protocol
    folder = Path(folder)
    if not (folder / "row.json").exists():
        raise ArtifactError(f"{folder} holds no finished row; run it first")
    facts = artifacts.read_json(folder / "scores.json")
    train = _rows_of(protocol.train_tokens, range(protocol.train_size))
    own, seconds, peak = _reported(protocol, scorer, train, facts["damping"])
    before = np.load(folder / "scores.npy", allow_pickle=False)[list(protocol.reported)]
    error = float(np.linalg.norm(own - before) / np.linalg.norm(before))
    if not error <= 1e-3:
        raise ArtifactError(
            f"the scores of {folder.name} came out differently ({error:.2g} of their norm); delete {folder} and run it "
            "again"
        )
    found = {"seconds": seconds, "peak_mb": peak}
    artifacts.atomic_write_json(folder / "scores.json", {**facts, **found})
    artifacts.atomic_write_json(folder / "row.json", {**artifacts.read_json(folder / "row.json"), **found})
    return found


def _placed(values: np.ndarray, chosen: Sequence[int], queries: int) -> np.ndarray:
    wide = np.zeros((queries, values.shape[1]))
    wide[list(chosen)] = values
    return wide


def _save_matrix(path: Path, values: np.ndarray) -> None:
    with artifacts.atomic_writer(path) as handle:
        np.save(handle, values.astype(np.float64), allow_pickle=False)


def read_rows(folder: Path, bank: Bank | None = None) -> list[dict[str, Any]]:
    """Flat rows of every finished row under ``folder``, best LDS first; of one bank only, where it is given."""
    rows = []
    for path in sorted(Path(folder).glob("*/row.json")):
        found = artifacts.read_json(path, "row")
        if bank is not None and found["bank"] != bank.identity:
            raise ArtifactError(f"{path} is of another bank; delete its folder or give the bank it is of")
        evaluation = Evaluation(found["name"], found["results"], found["notes"], found["damping"])
        row = to_rows([evaluation])[0]
        rows.append({**row, "seconds": found["seconds"], "peak_mb": found["peak_mb"]})
    return sorted(rows, key=lambda r: -r.get("lds", -2.0))


def compare_rows(
    folder: Path,
    bank: Bank,
    baseline: str,
    kind: str = "half",
    seed: int = 0,
    resamples: int = 2000,
    names: Sequence[str] | None = None,
) -> dict[str, LDS]:
    """LDS of every finished row minus that of the row ``baseline``, on the reported queries: the same resamples for
    both, so that the interval is that of the difference. ``names``: these rows only.

    Raises:
        ArtifactError: ``baseline`` is not finished.
        DataError: the bank has no retrainings of that kind.
    """
    folder = Path(folder)
    if not (folder / baseline / "row.json").exists():
        raise ArtifactError(f"{folder} has no finished row '{baseline}' to compare with; run it first")
    counts, outcomes = bank.table(kind, seed)
    reported = list(bank.protocol.reported)  # type: ignore[attr-defined]

    def own(name: str) -> np.ndarray:
        return np.load(folder / name / "scores.npy", allow_pickle=False)[reported]

    found = [row["name"] for row in read_rows(folder, bank) if row["name"] != baseline]
    return {
        n: lds_difference(own(n), own(baseline), counts, outcomes[:, reported], resamples)
        for n in found
        if names is None or n in names
    }
