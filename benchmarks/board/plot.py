"""The board as a plot: LDS with its interval, a row a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(rows: Sequence[Mapping[str, Any]], noise: Mapping[str, Any], path: Path) -> None:
    """Write ``path`` (SVG): LDS and interval on the left, rise of the loss after removal on the right if measured."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "board", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    removal = sorted({n for r in rows for n in r if n.startswith("qld_") and n.count("_") == 1})
    figure, axes = pyplot.subplots(
        1, 1 + len(removal), figsize=(6 + 3.2 * len(removal), 0.32 * len(rows) + 1.1), sharey=True, squeeze=False
    )
    ordered = list(reversed(rows))
    for axis, column, label in zip(
        axes[0],
        ["lds", *removal],
        ["LDS (95 % over subsets and queries)", *(f"rise of the loss, top {n[4:]} removed (nats)" for n in removal)],
        strict=True,
    ):
        for y, row in enumerate(ordered):
            if row.get(column) is None:
                continue
            other = str(row["name"]).startswith(("kronfluence", "bergson"))
            axis.plot([row[f"{column}_low"], row[f"{column}_high"]], [y, y], color="0.6", lw=1.5, zorder=1)
            axis.scatter([row[column]], [y], s=26, color="tab:orange" if other else "tab:blue", zorder=2)
        axis.set_xlabel(label)
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(ordered)), [str(r["name"]) for r in ordered])
    half = noise.get("half")
    if half:
        axes[0][0].axvline(half["ceiling"], color="0.3", ls=":", lw=1)
        axes[0][0].text(half["ceiling"], len(ordered) - 0.4, "noise ceiling", ha="right", va="bottom", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
