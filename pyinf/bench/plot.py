"""The roofline: operations per second over operations per byte, against what the device was measured to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyinf.errors import ConfigError

__all__ = ["roofline"]

_MARKS = {"torch": "o", "triton": "^", "cuda": "s", "cpu": "D", "fast_jl": "x", "sjlt": "+"}


def roofline(
    rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float], path: Path, title: str = ""
) -> Path | None:
    """Draw the rows that have a speed; None where there is none. ``path`` ends in .svg, .png or .pdf.

    Raises ``ConfigError`` without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install 'pyinf[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r["tflops"] not in (None, "")]
    if not timed:
        return None
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    points = [(float(r["flops"]) / float(r["bytes"]), float(r["tflops"])) for r in timed if float(r["bytes"]) > 0]
    low, high = min(x for x, _ in points) / 3, max(x for x, _ in points) * 3
    for name in dict.fromkeys(str(r["dtype"]) for r in timed):
        peak = ceilings.get("tf32" if "tf32" in name else name)
        if not peak or "copy" not in ceilings:
            continue
        ridge = peak / ceilings["copy"]
        xs = sorted({low, min(max(ridge, low), high), high})
        axes.plot(xs, [min(peak, x * ceilings["copy"]) / 1e12 for x in xs], lw=1, label=f"ceiling, {name}")
    colours = {op: f"C{i % 10}" for i, op in enumerate(dict.fromkeys(str(r["op"]) for r in timed))}
    for row, (x, y) in zip([r for r in timed if float(r["bytes"]) > 0], points, strict=True):
        axes.plot(x, y, _MARKS.get(str(row["provider"]), "."), color=colours[str(row["op"])], ms=6, alpha=0.8)
    for op, colour in colours.items():
        axes.plot([], [], "s", color=colour, label=op)
    for provider in dict.fromkeys(str(r["provider"]) for r in timed):
        axes.plot([], [], _MARKS.get(provider, "."), color="black", label=provider)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=title)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
