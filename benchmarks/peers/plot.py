"""The picture: one stacked bar a library, seconds by stage, with the bare pass and the arithmetic floor as lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis import Entry, is_peer
from common import STAGES
from inputs import Shape

COLOURS = {
    "capture": "#8c6bb1",
    "covariances": "#2b6ca3",
    "eigendecomposition": "#6baed6",
    "lambda": "#e08214",
    "queries": "#7fbf7b",
    "scores": "#1b7837",
    "other": "#bdbdbd",
}
LABELS = {"lambda": "corrected eigenvalues", "queries": "query gradients + inverse", "scores": "train pass + scores"}


def draw(
    shape: Shape, entries: Iterable[Entry], floor_rows: list[dict[str, Any]], caption: str, stem: Path
) -> list[Path]:
    """Draw `stem.svg` and `stem.png`. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pyinf"
    from matplotlib import pyplot as plt

    shown = [e for e in entries if e.results and (e.library == "pyinf" or is_peer(e))]
    shown.sort(key=lambda e: e.total)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.55 * max(1, len(shown))), layout="constrained")
    longest = max((e.total for e in shown), default=1.0)
    for row, entry in enumerate(shown):
        left = 0.0
        for stage in [s for s in STAGES if s in entry.stages()]:
            width = statistics.median(entry.seconds(stage))
            style = {"color": COLOURS[stage], "height": 0.62, "edgecolor": "white", "linewidth": 0.5}
            axes.barh(row, width, left=left, label=LABELS.get(stage, stage), **style)
            left += width
        text = f"{entry.total:.1f} s, {entry.peak() / 1000:.1f} GB"
        axes.text(left + longest * 0.01, row, text, va="center", fontsize=8)
    names = [f"{e.library} {e.results[-1]['version']}" for e in shown]
    names = [n if e.variant == "default" else f"{n} ({e.variant})" for n, e in zip(names, shown, strict=True)]
    axes.set_yticks(range(len(shown)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.18)
    axes.set_xlabel("seconds (median)")
    for row in floor_rows:
        if row["stage"] == "one model pass":
            axes.axvline(row["seconds"], color="#555555", linestyle=":", linewidth=1, label="one bare model pass")
        elif row["stage"] == "total":
            axes.axvline(
                row["seconds"], color="#c0392b", linestyle="--", linewidth=1, label="one pass + arithmetic floor"
            )
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), fontsize=7, ncols=5, loc="outside lower center", frameon=False)
    what = f"{shape.train} training and {shape.queries} query sequences x {shape.length} tokens"
    axes.set_title(f"EK-FAC fit + score, {shape.name}: {what}\n{caption}", fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=140)
    plt.close(figure)
    return paths
