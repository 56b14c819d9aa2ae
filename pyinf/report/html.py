"""The report as one HTML file: everything inline, nothing fetched, and no script but its own may run."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from pyinf.report.schema import ExampleReport, Histogram, QueryReport, ReportData, write_text

__all__ = ["render_html", "write_html"]

LEVELS = 10  # steps of shading on either side of zero
_INDEX = re.compile(r"\.(\d+)(?:\.|$)")
# Characters that move or hide others: shown by name, so that a hostile text cannot rearrange the page.
_INVISIBLE = {*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF, 0x00AD, 0x061C}


def _visible(text: str) -> str:
    """``text`` with line ends as ↵ and control and direction characters spelled out."""
    if text.isprintable():
        return text
    out = []
    for character in text:
        code = ord(character)
        if character == "\n":
            out.append("↵\n")
        elif character == "\t":
            out.append("⇥\t")
        elif code < 0x20:
            out.append(chr(0x2400 + code))
        elif 0x7F <= code < 0xA0 or code in _INVISIBLE or 0xD800 <= code < 0xE000:
            # A joiner stays as it is: emoji and many scripts need it, and it moves nothing.
            out.append(character if code in (0x200C, 0x200D) else f"⟨U+{code:04X}⟩")
        else:
            out.append(character)
    return "".join(out)


def _number(value: float) -> str:
    """Four significant digits with a sign; the typographic minus."""
    if value == 0:
        return "0"
    size = abs(value)
    text = f"{value:+.3e}" if size >= 1e5 or size < 1e-3 else f"{value:+.4g}"
    return text.replace("-", "−").replace("e+0", "e").replace("e−0", "e−")


def _scale(query: QueryReport) -> float:
    """The token score that gets the full colour: the 99th percentile of the absolute values shown for the query."""
    values = sorted(abs(v) for e in (*query.top, *query.bottom) for v in e.token_scores or ())
    return values[min(len(values) - 1, int(0.99 * len(values)))] if values else 0.0


def _shaded(example: ExampleReport, scale: float) -> Markup:
    """The passage of one example, a span a token."""
    if example.token_scores is None:
        return Markup("").join(escape(_visible(token)) for token in example.tokens)
    parts = []
    for token, value in zip(example.tokens, example.token_scores, strict=True):
        level = min(LEVELS, math.ceil(LEVELS * abs(value) / scale - 0.5)) if scale > 0 else 0
        shade = f' class="{"p" if value > 0 else "n"}{level}"' if level > 0 else ""
        parts.append(Markup(f'<span{shade} data-v="{_number(value)}">') + escape(_visible(token)) + Markup("</span>"))
    return Markup("").join(parts)


def _asked(query: QueryReport) -> Markup:
    """The query's passage: the tokens that carry the loss are marked, the others only set the scene."""
    parts, position = [], 0
    while position < len(query.tokens):
        end = position
        while end < len(query.tokens) and query.counted[end] == query.counted[position]:
            end += 1
        text = escape(_visible("".join(query.tokens[position:end])))
        parts.append(Markup("<mark>") + text + Markup("</mark>") if query.counted[position] else text)
        position = end
    return Markup("").join(parts)


def _plot(query: QueryReport) -> dict[str, Any] | None:
    """Bars and markers in percent of the plot's width and height; heights on a logarithmic scale."""
    histogram = query.histogram
    if histogram is None or not histogram.counts:
        return None
    low, high = histogram.edges[0], histogram.edges[-1]
    width = high - low or 1.0

    def across(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (value - low) / width)), 3)

    tallest = math.log1p(max(histogram.counts)) or 1.0
    bars = []
    for count, left, right in zip(histogram.counts, histogram.edges, histogram.edges[1:], strict=False):
        if count:
            height = max(2.0, 100 * math.log1p(count) / tallest)
            span = f"{count} example{'s' if count != 1 else ''} from {_number(left)} to {_number(right)}"
            bars.append({"x": across(left), "w": max(0.3, across(right) - across(left)), "h": height, "name": span})
    markers = [
        {"x": across(e.score), "side": side, "name": f"#{e.index}, rank {e.rank}: {_number(e.score)}"}
        for side, shown in (("n", query.bottom), ("p", query.top))
        for e in reversed(shown)  # the strongest is drawn last, on top
    ]
    zero = across(0.0) if low < 0 < high else None
    return {
        "bars": bars,
        "markers": markers,
        "zero": zero,
        "label_zero": zero is not None and 12 < zero < 88,
        "low": _number(low),
        "high": _number(high),
        "total": sum(histogram.counts),
    }


def _layers(shares: dict[str, float]) -> list[dict[str, Any]]:
    """Shares summed by block number, in order of first appearance, each with its modules."""
    groups: dict[str, dict[str, Any]] = {}
    for name, share in shares.items():
        found = _INDEX.search(f".{name}")
        key = f"Layer {found[1]}" if found else name
        group = groups.setdefault(key, {"name": key, "share": 0.0, "modules": []})
        group["share"] += share
        group["modules"].append((name, share))
    longest = max((g["share"] for g in groups.values()), default=0.0) or 1.0
    for group in groups.values():
        group["width"] = round(100 * group["share"] / longest, 2)
    return list(groups.values())


def _modules(shares: dict[str, float]) -> list[dict[str, Any]]:
    longest = max(shares.values(), default=0.0) or 1.0
    return [{"name": n, "share": s, "width": round(100 * s / longest, 2)} for n, s in shares.items()]


def _short(text: str, longest: int = 110) -> str:
    line = " ".join(_visible(text).replace("↵", " ").split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else _visible(str(value))


def _stacked(stages: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    longest = max((s for _, s in stages), default=0.0) or 1.0
    return [{"name": n, "value": _duration(s), "width": round(100 * s / longest, 2)} for n, s in stages]


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _asset(name: str) -> str:
    return resources.files("pyinf.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=_number, short=_short, visible=_visible, cell=_cell, duration=_duration, asked=_asked
    )
    return environment.from_string(_asset("page.html.j2"))


def render_html(data: ReportData) -> str:
    """The page as text; see :func:`write_html`."""
    # "<" is the only character by which JSON could leave its script element.
    embedded = data.to_json().replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    shades = "\n".join(f".{side}{i}{{--a:{round(62 * i / LEVELS)}%}}" for side in "pn" for i in range(1, LEVELS + 1))
    style = _asset("page.css") + shades
    script = _asset("page.js")
    views = []
    for query in data.queries:
        scale = _scale(query)
        sides = [
            (side, [(e, _shaded(e, scale)) for e in examples])
            for side, examples in (("top", query.top), ("bottom", query.bottom))
        ]
        views.append(
            {
                "query": query,
                "sides": dict(sides),
                "scale": scale,
                "plot": _plot(query),
                "layers": _layers(query.module_shares),
                "modules": _modules(query.module_shares),
            }
        )
    return _template().render(
        data=data,
        views=views,
        stages=_stacked(data.stages),
        total_seconds=sum(s for _, s in data.stages),
        style=Markup(style),
        script=Markup(script),
        embedded=Markup(embedded),
        # Only this style and this script may run, and nothing may be fetched.
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    )


def write_html(data: ReportData, path: str | os.PathLike[str]) -> Path:
    """Write the report as one self-contained HTML file, whole or not at all.

    The page works offline and from a file: style, script and plots are inline, and its content security policy allows
    no request. All text from data is escaped; line ends show as ↵, control and direction characters by their code.

    Raises:
        ArtifactError: the file cannot be written, or the data holds a number that is not finite.
    """
    return write_text(path, render_html(data))


def histogram(values: Sequence[float], bins: int = 60) -> Histogram:
    """Equal bins from the lowest to the highest value."""
    low, high = min(values), max(values)
    if low == high:
        return Histogram([low, high], [len(values)])
    width = (high - low) / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    return Histogram([low + width * i for i in range(bins)] + [high], counts)
