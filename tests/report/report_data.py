"""A report made by hand, with texts that try to break the page."""

from __future__ import annotations

import random

from pyinf.report import ExampleReport, QueryReport, ReportData, Table
from pyinf.report.html import histogram

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=\"document.title='owned'\">",
    "</style><style>body{display:none}",
    " שלום",
    " עולם",
    "\n",
    "\t",
    "👩‍👩‍👧",
    "x" * 400,
    "\u202eevil",
    "\x1b[31m",
    "\x00",
    "\u2028",
    "&amp;<!--",
    "{{ 7 * 7 }}",
    "\"' onmouseover=alert(1) x='",
    "\ud800",
]


def example(index: int, score: float, rank: int, rng: random.Random, hostile: bool = False) -> ExampleReport:
    tokens = ["The", " heap", " is", " kept", " in", " a", " calendar", ".", "\n", "See", " also", " bisect"]
    tokens = tokens + HOSTILE if hostile else tokens
    values = [rng.gauss(0, 1) * score / 8 for _ in tokens]
    metadata = {"label": "planted" if index % 2 else "docstring", "checked": True, "weight": 0.5, "note": None}
    if hostile:
        metadata["<b>bold</b>"] = "<i>\u202ex</i>"
    return ExampleReport(index, score, rank, tokens, "".join(tokens), values, metadata)


def query(index: int, rng: random.Random) -> QueryReport:
    scores = [rng.gauss(0, 20) for _ in range(200)]
    ordered = sorted(scores, reverse=True)
    tokens = ["Where", " is", " the", " heap", f" number {index}", "?", "\n", "In", " a", " calendar"]
    shares = {f"model.layers.{n}.{kind}": 0.1 * (1 + n) / 0.6 / 2 for n in range(3) for kind in ("mlp.up", "attn.q")}
    return QueryReport(
        index=index,
        text="".join(tokens),
        tokens=tokens,
        counted=[n >= 8 for n in range(len(tokens))],
        top=[example(n, ordered[n], n + 1, rng, hostile=n == 1) for n in range(4)],
        bottom=[example(50 + n, ordered[-1 - n], 200 - n, rng) for n in range(2)],
        histogram=histogram(scores),
        module_shares=shares,
        certificate={"relative residual": 0.01} if index == 0 else None,
        metadata={"topic": "heaps" if index else "<script>alert(2)</script>"},
    )


def report(queries: int = 3) -> ReportData:
    rng = random.Random(0)
    return ReportData(
        title="Who said <calendar> & why?",
        created="2026-01-01 00:00 UTC",
        model="a small model",
        method="ekfac: influence",
        formula="τ(q, i) = ⟨(H + λ)⁻¹ ∇f(q), ∇L(i)⟩",
        train_size=200,
        queries=[query(n, rng) for n in range(queries)],
        options={"damping": 0.1, "fisher": "sampled", "rank": None},
        plan=[("layers traced", "6")],
        stages=[("covariances", 1.25), ("scores", 75.0)],
        facts=[("versions", "1 <2>")],
        tables=[Table("Hits", ["method", "hits"], [["ekfac", 14], ["bm25", 3]], "of 16")],
    )
