"""The bars of the design, held against the rows of a benchmark: met, or missed by how much and what limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """``value(row)`` must be at least ``least`` on every row that ``on`` accepts."""

    op: str
    text: str
    least: float
    value: Callable[[Row], float | None]
    on: Callable[[Row], bool] = lambda row: True


def _size(row: Row, name: str) -> int:
    return next((int(w.split("=")[1]) for w in row["sizes"].split() if w.startswith(f"{name}=")), 0)


def _ratio(row: Row) -> float | None:
    return row["ratio_to_torch"]


def _percent(row: Row) -> float | None:
    return row["percent_of_ceiling"]


BARS = (
    Bar("accumulate_covariance", "1.5x torch at d >= 4096", 1.5, _ratio, lambda r: _size(r, "d_in") >= 4096),
    Bar("accumulate_squared_gradients", "60 % of peak at T >= 512", 60, _percent),
    Bar("precondition", "not slower than the four products", 1.0, _ratio),
    Bar(
        "precondition_low_rank",
        "10x the dense sandwich at 14336x4096",
        10,
        _ratio,
        lambda r: _size(r, "d_out") == 14336,
    ),
    Bar("low_rank_scores", "1.3x torch", 1.3, _ratio),
    Bar("low_rank_scores", "60 % of peak", 60, _percent),
    Bar("dense_scores", "1.2x torch", 1.2, _ratio),
    Bar("gradient_dot", "1.5x torch at T = 512", 1.5, _ratio),
    Bar("gradient_norm", "1.5x torch at T = 512", 1.5, _ratio),
    Bar("project_gradients", "80 % of the copy rate at k <= 64", 80, _percent, lambda r: _size(r, "k") <= 64),
    Bar("scan_topk", "80 % of the copy rate", 80, _percent),
)
"""Of the projections the bars are ratios to fast_jl (4x) and sjlt (2x): seen only where those are installed."""
_OTHERS = {"random_projection": ("fast_jl", 4.0), "sparse_projection": ("sjlt", 2.0)}


def bars(rows: list[Row]) -> list[str]:
    """A Markdown table; a kernel without a speed has no bar met."""
    timed = [
        r for r in rows if r.get("provider") in ("triton", "cuda", "fast_jl", "sjlt") and r.get("dtype") == "bfloat16"
    ]
    lines = ["| op | bar | provider | shape | value | met | limited by |", "|---|---|---|---|---:|---|---|"]
    for bar in BARS:
        own = [r for r in timed if r["op"] == bar.op and r["provider"] in ("triton", "cuda") and bar.on(r)]
        for row in own:
            value = bar.value(row) if row["median_ms"] else None
            shown = "" if value is None else f"{value:.2f}"
            met = row["note"] or "not measured" if value is None else "yes" if value >= bar.least else "**no**"
            where = " ".join(p for p in (row["shape"], row["variant"]) if p)
            limit = "" if value is None else row["limit"]
            lines.append(f"| {bar.op} | {bar.text} | {row['provider']} | {where} | {shown} | {met} | {limit} |")
        if not own:
            lines.append(f"| {bar.op} | {bar.text} | | | | not measured | |")
    for op, (other, least) in _OTHERS.items():
        theirs = {r["shape"]: r["median_ms"] for r in rows if r.get("op") == op and r.get("provider") == other}
        own = [r for r in timed if r["op"] == op and r["provider"] in ("triton", "cuda") and r["median_ms"]]
        ratios = [(r, theirs[r["shape"]] / r["median_ms"]) for r in own if theirs.get(r["shape"])]
        for row, ratio in ratios:
            met = "yes" if ratio >= least else "**no**"
            cells = [op, f"{least:g}x {other}", row["provider"], row["shape"], f"{ratio:.2f}", met, row["limit"]]
            lines.append(f"| {' | '.join(cells)} |")
        if not ratios:
            lines.append(f"| {op} | {least:g}x {other} | | | | not measured beside {other} | |")
    return lines
