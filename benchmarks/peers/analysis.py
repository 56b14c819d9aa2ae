"""From per-run results to the table: medians and spread by stage, agreement of the scores, and the arithmetic floor."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import STAGES
from inputs import Shape
from reference import agreement

COLUMNS = (
    "shape",
    "library",
    "variant",
    "version",
    "stage",
    "seconds_median",
    "seconds_min",
    "seconds_max",
    "runs",
    "peak_mb",
    "ratio_to_fastest_peer",
    "pearson_min_vs_kronfluence",
    "relative_difference_vs_kronfluence",
    "pearson_min_vs_float64",
    "relative_difference_vs_float64",
    "covariance_positions",
    "settings",
    "error",
)


@dataclass
class Entry:
    """One library (and variant): its finished runs, or why there are none."""

    name: str
    results: list[dict[str, Any]] = field(default_factory=list)
    scores: np.ndarray | None = None
    error: str = ""
    vs_kronfluence: tuple[float, float] | None = None
    vs_float64: tuple[float, float] | None = None

    @property
    def library(self) -> str:
        """Name without the variant."""
        return self.name.partition(":")[0]

    @property
    def variant(self) -> str:
        """Variant, "default" unless named."""
        return self.name.partition(":")[2] or "default"

    @property
    def positions(self) -> str:
        """Which positions its input covariances count."""
        return self.results[0].get("positions", "all") if self.results else ""

    def stages(self) -> list[str]:
        """Stages it reported that count, in running order; unknown ones last."""
        seen = {name for result in self.results for name in result["stages"] if name != "setup"}
        return [s for s in STAGES if s in seen] + sorted(seen - set(STAGES))

    def seconds(self, stage: str | None = None) -> list[float]:
        """Seconds of `stage` in each run; None = the sum of all that count."""
        if stage is None:
            return [r["total_seconds"] for r in self.results]
        return [r["stages"].get(stage, {}).get("seconds", 0.0) for r in self.results]

    def peak(self, stage: str | None = None) -> float:
        """Median over runs of the peak resident MB of `stage`; None = of the whole run."""
        if stage is None:
            return statistics.median(r["peak_mb"] for r in self.results)
        return statistics.median(r["stages"].get(stage, {}).get("peak_mb", 0.0) for r in self.results)

    @property
    def total(self) -> float:
        """Median of the runs' totals, seconds."""
        return statistics.median(self.seconds())


def is_peer(entry: Entry) -> bool:
    """Whether the entry is another library, timed: not pyinf, the bare model, or a run made to check agreement."""
    return bool(entry.results) and entry.library not in ("pyinf", "bare") and entry.variant != "all_but_last"


def fill_agreement(entries: Iterable[Entry], references: dict[str, np.ndarray]) -> None:
    """Compare each entry with kronfluence and with the float64 reference of the same covariance positions."""
    entries = list(entries)
    kronfluence = {e.positions: e.scores for e in entries if e.library == "kronfluence" and e.scores is not None}
    for entry in entries:
        if entry.scores is None:
            continue
        if entry.positions in kronfluence and entry.library != "kronfluence":
            entry.vs_kronfluence = agreement(entry.scores, kronfluence[entry.positions])
        if entry.positions in references:
            entry.vs_float64 = agreement(entry.scores, references[entry.positions])


def floor(shape: Shape, rate: float, passes_seconds: float) -> list[dict[str, Any]]:
    """Arithmetic that EK-FAC cannot avoid, by stage, at `rate` FLOP/s of plain products in float32.

    Symmetric updates count half, inputs shared by several layers count once, rotations are taken of the factors or of
    the per-sequence gradients, whichever is less; an eigendecomposition of size d is taken as 14/3 d^3
    (tridiagonalisation 4/3, its eigenvectors 4/3, back-transformation 2). `passes_seconds` is one measured bare pass
    (forward, and backward to the activations) over the training tokens. Returns rows: stage, flops, seconds.
    """
    n, t, sequences, queries = shape.tokens, shape.length, shape.train, shape.queries
    flops = dict.fromkeys(("covariances", "eigendecomposition", "lambda", "queries", "scores"), 0.0)
    seen: set[str] = set()
    for _, d_in, d_out, source in shape.linear_layers():
        fresh = source not in seen
        seen.add(source)
        sides = (d_in if fresh else 0, d_out)
        flops["covariances"] += sum(n * d * d for d in sides)
        flops["eigendecomposition"] += sum(14 / 3 * d**3 for d in sides)
        outer = 2 * d_in * d_out
        sandwich = 2 * d_in * d_out * (d_in + d_out)
        rotate = 2 * sum(d * d for d in sides)
        flops["lambda"] += n * outer + min(n * rotate, sequences * sandwich)
        flops["queries"] += queries * (t * outer + min(t * rotate, sandwich) + sandwich)
        flops["scores"] += min(n * outer + 2 * sequences * queries * d_in * d_out, queries * n * outer)
    rows = [{"stage": "one model pass", "flops": None, "seconds": passes_seconds * (1 + queries / sequences)}]
    rows += [{"stage": k, "flops": v * shape.layers, "seconds": v * shape.layers / rate} for k, v in flops.items()]
    whole = {"flops": sum(r["flops"] or 0 for r in rows), "seconds": sum(r["seconds"] for r in rows)}
    return [*rows, {"stage": "total", **whole}]


def csv_rows(shape: Shape, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Rows of the CSV: one a stage and library, and a `total`; a failed library has one row with its error."""
    entries = list(entries)
    fastest = min((e.total for e in entries if is_peer(e)), default=None)
    rows = []
    for entry in entries:
        common = {"shape": shape.name, "library": entry.library, "variant": entry.variant, "error": entry.error}
        if not entry.results:
            rows.append(common)
            continue
        last = entry.results[-1]
        common |= {
            "version": last["version"],
            "settings": last["settings"],
            "covariance_positions": entry.positions if entry.scores is not None else "",
            "runs": len(entry.results),
        }
        for stage in [*entry.stages(), *([] if entry.library == "bare" else ["total"])]:
            key = None if stage == "total" else stage
            seconds = entry.seconds(key)
            row = common | {
                "stage": stage,
                "seconds_median": round(statistics.median(seconds), 4),
                "seconds_min": round(min(seconds), 4),
                "seconds_max": round(max(seconds), 4),
                "peak_mb": round(entry.peak(key), 1),
            }
            if stage == "total":
                if fastest:
                    row["ratio_to_fastest_peer"] = round(entry.total / fastest, 4)
                for label, pair in (("kronfluence", entry.vs_kronfluence), ("float64", entry.vs_float64)):
                    if pair is not None:
                        row[f"pearson_min_vs_{label}"] = f"{pair[0]:.9f}"
                        row[f"relative_difference_vs_{label}"] = f"{pair[1]:.3g}"
            rows.append(row)
    return rows


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with the given columns; absent values are empty."""
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)


def table(entries: Iterable[Entry], floor_rows: list[dict[str, Any]]) -> str:
    """The table that is printed: seconds by stage, total and spread, ratio to the fastest peer, memory, agreement."""
    entries = [e for e in entries if e.library != "bare"]
    timed = [e for e in entries if e.results and e.variant != "all_but_last"]
    fastest = min((e for e in timed if is_peer(e)), key=lambda e: e.total, default=None)
    leanest = min((e.peak() for e in timed if is_peer(e)), default=None)
    stages = [s for s in STAGES if any(s in e.stages() for e in timed)]
    head = ["", *stages, "total", "min-max", "x fastest peer", "peak MB", "r kronfluence", "r float64", "rel. diff."]
    lines = [head]
    for entry in entries:
        if not entry.results:
            lines.append([entry.name, f"FAILED: {entry.error}"])
            continue
        seconds = entry.seconds()
        pairs = [f"{pair[0]:.7f}" if pair else "-" for pair in (entry.vs_kronfluence, entry.vs_float64)]
        pair = entry.vs_float64 or entry.vs_kronfluence
        timing = [f"{statistics.median(entry.seconds(s)):.2f}" if s in entry.stages() else "-" for s in stages]
        ratio = f"{fastest.total / entry.total:.2f}" if fastest else "-"
        if entry.variant == "all_but_last":
            ratio = "(check)"
        lines.append(
            [
                entry.name,
                *timing,
                f"{entry.total:.2f}",
                f"{min(seconds):.2f}-{max(seconds):.2f}",
                ratio,
                f"{entry.peak():.0f}",
                *pairs,
                f"{pair[1]:.1e}" if pair else "-",
            ]
        )
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[i]) for line in full) for i in range(len(head))]
    widths[0] = max(len(line[0]) for line in lines)
    text = []
    for name, *cells in lines:
        aligned = [c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)] if len(cells) == len(head) - 1 else cells
        text.append("  ".join([name.ljust(widths[0]), *aligned]))
    if fastest is not None:
        text.append(f"fastest peer: {fastest.name}, {fastest.total:.2f} s; leanest peer: {leanest:.0f} MB")
    for row in floor_rows:
        flops = f" ({row['flops'] / 1e12:.3g} TFLOP)" if row["flops"] else ""
        text.append(f"arithmetic floor, {row['stage']}: {row['seconds']:.2f} s{flops}")
    return "\n".join(text)


def load_entry(name: str, folders: Iterable[Path]) -> Entry:
    """Collect the finished runs of one library from its run folders; the last error, if any, when none finished."""
    entry = Entry(name)
    for folder in folders:
        state = folder / "run.json"
        if not state.is_file():
            continue
        note = json.loads(state.read_text())
        if note["status"] != "ok":
            entry.error = note["error"]
            continue
        entry.results.append(json.loads((folder / "result.json").read_text()))
        if (folder / "scores.npy").is_file():
            entry.scores = np.load(folder / "scores.npy")
    if entry.results:
        failed = entry.error
        entry.error = f"one run of several failed: {failed}" if failed else ""
    return entry
