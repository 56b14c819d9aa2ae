"""From a finished run to a report: which examples to show, their tokens, and each token's and layer's part."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pyinf.errors import ConfigError, DataError
from pyinf.plan import Plan
from pyinf.report.html import histogram
from pyinf.report.schema import ExampleReport, QueryReport, ReportData, Table

__all__ = ["collect"]

_BLOCK = 16  # queries a pass over the shown examples
_TEXT_FIELDS = {"text", "prompt", "response", "messages", "completion", "input_ids", "labels", "attention_mask"}
_CURVATURE = {
    "ekfac": "H the eigenvalue-corrected Kronecker-factored Fisher matrix",
    "kfac": "H the Kronecker-factored Fisher matrix",
    "diagonal": "H the diagonal of the Fisher matrix",
}


def _formula(method: Any) -> str:
    if method.kind != "gradient":
        return "τ(q, i) = Σ over q's words of idf(w) · f(w, i) / (f(w, i) + k₁(1 − b + b·|i| / mean|i|)): shared words."
    if method.compressor is not None:
        return f"τ(q, i): {method.summary} ({method.source}). Positive: giving i more weight lowers q's loss."
    if method.normalise:
        return "τ(q, i) = cos(∇f(q), ∇L(i)): the cosine of the two gradients over all traced layers."
    if method.factors is None:
        return "τ(q, i) = Σ over layers of ⟨∇f(q), ∇L(i)⟩: the dot product of the two gradients."
    what = _CURVATURE.get(method.factors, f"H from {method.factors}")
    score = "τ(q, i) = Σ over layers of ⟨(H + λ)⁻¹ ∇f(q), ∇L(i)⟩"
    return f"{score}, with {what}. Positive: giving i more weight lowers q's loss."


def _tokens(examples: Any, index: int, tokenizer: Any) -> list[str]:
    """One string a token; joined they read as the text."""
    own = getattr(examples, "tokens", None)
    if callable(own):
        return list(own(index))
    ids = torch.as_tensor(examples[index]["input_ids"]).reshape(-1).tolist()
    if tokenizer is None:
        return [f"{i} " for i in ids]
    # A character may span tokens: it is shown at the last of them, the others stay empty.
    pieces: list[str] = []
    anchor = read = 0  # the text of ids[anchor:read] has been given out
    for end in range(1, len(ids) + 1):
        before, now = (tokenizer.decode(ids[anchor:stop]) for stop in (read, end))
        if now.endswith("\ufffd") and end < len(ids) and end - read < 8:
            pieces.append("")
            continue
        pieces.append(now[len(before) :] if now.startswith(before) else tokenizer.decode(ids[read:end]))
        anchor, read = read, end
    return pieces


def _text(examples: Any, index: int, tokens: Sequence[str]) -> str:
    own = getattr(examples, "text", None)
    return str(own(index)) if callable(own) else "".join(tokens)


def _metadata(examples: Any, index: int, text: str) -> dict[str, Any]:
    """The columns of a row that say something about it: short values that are not the text itself."""
    records = getattr(examples, "records", None)
    if records is None:
        return {}
    kept: dict[str, Any] = {}
    for name, value in records[index].items():
        if name in _TEXT_FIELDS:
            continue
        if not (value is None or isinstance(value, str | int | float | bool)):
            value = json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, float) and value != value:
            value = None
        if isinstance(value, str) and (len(value) > 80 or (len(value) >= 16 and value in text)):
            continue
        kept[str(name)] = value
    return kept


def _select(examples: Any, indices: Sequence[int]) -> Any:
    own = getattr(examples, "select", None)
    return own(indices) if callable(own) else [examples[i] for i in indices]


def _counted(example: Mapping[str, Any], length: int) -> list[bool]:
    """Which tokens carry the loss: those with a label, the first (which nothing predicts) aside."""
    labels = example.get("labels")
    mask = example.get("attention_mask")
    counted = torch.ones(length, dtype=torch.bool) if labels is None else torch.as_tensor(labels).reshape(-1) != -100
    if mask is not None:
        counted = counted & torch.as_tensor(mask).reshape(-1).bool()
    marks = counted.tolist()[:length]
    return [False, *marks[1:]] if marks else []


def _plain(value: Any) -> Any:
    """``value`` as a cell of a report."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _certificate(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A certificate as rows: names in words, what has no value left out."""
    rows = {str(name).replace("_", " "): _plain(value) for name, value in entry.items()}
    return {name: value for name, value in rows.items() if value is not None}


def _certificates(scores: Any, shown: int) -> list[Table]:
    """One row a query: the verdict and the numbers behind it."""
    if not scores.certificate:
        return []
    names = ("verdict", "relative_residual", "error_bound", "iterations", "captured_energy", "reason")
    kept = [n for n in names if any(entry.get(n) is not None for entry in scores.certificate[:shown])]
    rows = [[q, *(_plain(entry.get(n)) for n in kept)] for q, entry in enumerate(scores.certificate[:shown])]
    note = "How well (C + λ)x = v behind each query's scores was solved, under the exact curvature C."
    return [Table("Certificates", ["query", *(n.replace("_", " ") for n in kept)], rows, note)]


def _versions() -> str:
    import transformers

    from pyinf._version import __version__

    parts = [f"pyinf {__version__}", f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    return ", ".join([*parts, f"Python {platform.python_version()}"])


def _model_name(model: Any) -> str:
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    return f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters"


def collect(
    attributor: Any,
    scores: Any,
    queries: Sequence[Any],
    train: Sequence[Any],
    k: int = 8,
    bottom: int = 3,
    *,
    tokenizer: Any = None,
    title: str | None = None,
    max_queries: int = 100,
    max_tokens: int = 512,
    tables: Sequence[Table] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> ReportData:
    """Gather a report of ``scores`` (of ``attributor`` over ``queries`` and ``train``).

    The shown examples only are scored again, once per token and once per layer. A cosine splits over neither, and BM25
    sees no gradient: their passages stay unshaded, and the report says so.

    Args:
        attributor: fitted where its method needs it.
        k: proponents a query.
        bottom: opponents a query, those with the lowest scores (of positive sign too, where nothing is negative).
        tokenizer: to read token ids of collections that cannot say their own tokens.
        max_queries: later ones are left out; the report says so.
        max_tokens: of a passage; the report says how many are cut off.
        tables, facts: shown beside it.

    Raises:
        ConfigError: ``k`` < 1, or ``bottom`` < 0.
        DataError: scores of other sizes than the data.
    """
    if k < 1 or bottom < 0:
        raise ConfigError(f"A report shows k ≥ 1 proponents and bottom ≥ 0 opponents, not k={k}, bottom={bottom}.")
    if tuple(scores.shape[:2]) != (len(queries), len(train)):
        have, need = tuple(scores.shape[:2]), (len(queries), len(train))
        raise DataError(f"These scores are {have}, the data {need} (queries, training examples); score them again.")
    gathered = _Gather(attributor, scores, queries, train, tokenizer, max_tokens)
    notes = [(str(n), str(v)) for n, v in facts]
    stages = [(str(n), float(s)) for n, s in (scores.meta.get("timings") or {}).items()]
    shown = min(len(queries), max_queries)
    if shown < len(queries):
        notes.append(("queries", f"the first {shown} of {len(queries)} are shown"))
    if scores.values is None:
        notes.append(("opponents", "only the largest scores were kept, so neither opponents nor the distribution"))
    if not gathered.splits:
        name = attributor.method.name
        notes.append(("shading", f"{name} does not split over tokens or layers, so passages are unshaded"))
    reports: list[QueryReport] = []
    for start in range(0, shown, _BLOCK):
        reports += gathered.block(range(start, min(start + _BLOCK, shown)), k, bottom)
    names = ("damping", "damping_mode", "fisher", "query_rank", "seed")
    options = {n: _plain(scores.meta[n]) for n in names if scores.meta.get(n) is not None}
    plan = scores.meta.get("plan")
    # The estimate is left out: the time it took is known by now.
    rows_of_plan = [r for r in Plan(**plan).rows() if r[0] != "estimated time"] if plan else []
    model = getattr(attributor, "model", None)
    uses_model = attributor.method.kind == "gradient" and model is not None
    return ReportData(
        title=title or "Which training examples made the model say this?",
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        model=_model_name(model) if uses_model else "no model",
        method=f"{attributor.method.name}: {attributor.method.summary}",
        formula=_formula(attributor.method),
        train_size=len(train),
        queries=reports,
        options=options,
        plan=[(str(a), str(b)) for a, b in rows_of_plan],
        stages=stages,
        facts=[*notes, ("source", str(attributor.method.source)), ("versions", _versions())],
        tables=[*tables, *_certificates(scores, shown)],
    )


@dataclass
class _Gather:
    """Scores the shown examples again, in blocks of queries, and makes their entries."""

    attributor: Any
    scores: Any
    queries: Sequence[Any]
    train: Sequence[Any]
    tokenizer: Any
    max_tokens: int
    total: Any = field(init=False)

    def __post_init__(self) -> None:
        self.total = None if self.scores.values is None else self.scores.total().float().cpu()

    @property
    def splits(self) -> bool:
        """Whether a score is a sum over tokens and over layers."""
        method = self.attributor.method
        return method.kind == "gradient" and self.attributor._run.splits

    def chosen(self, query: int, k: int, bottom: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """(index, score) of the shown proponents and of the shown opponents, strongest first."""
        if self.total is None:
            values, indices = self.scores.kept[0][query][:k], self.scores.kept[1][query][:k]
            return [(int(i), float(v)) for i, v in zip(indices, values, strict=True)], []
        row = self.total[query]
        order = torch.argsort(row, descending=True, stable=True).tolist()
        k = min(k, len(order))
        low = order[max(k, len(order) - bottom) :][::-1]
        return [(i, float(row[i])) for i in order[:k]], [(i, float(row[i])) for i in low]

    def block(self, rows: range, k: int, bottom: int) -> list[QueryReport]:
        """The entries of a few queries."""
        chosen = [self.chosen(q, k, bottom) for q in rows]
        wanted = sorted({index for sides in chosen for side in sides for index, _ in side})
        place = {index: n for n, index in enumerate(wanted)}
        by_token: Any = None
        by_module: dict[str, Any] = {}
        if self.splits:
            some_queries, some_train = _select(self.queries, list(rows)), _select(self.train, wanted)
            with self.attributor.uncertified():
                by_token = self.attributor.score(some_queries, some_train, granularity="token").values.cpu()
                by_module = self.attributor.score(some_queries, some_train, per_module=True).values
        out = []
        for n, (q, (top, low)) in enumerate(zip(rows, chosen, strict=True)):
            shares: dict[str, float] = {}
            if by_module:
                at = torch.tensor([place[i] for i, _ in top])
                sizes = {name: float(values[n].cpu()[at].abs().sum()) for name, values in by_module.items()}
                whole = sum(sizes.values())
                shares = {name: size / whole for name, size in sizes.items()} if whole > 0 else {}
            parts = {i: by_token[n, place[i]] for i, _ in (*top, *low)} if by_token is not None else {}
            tokens = _tokens(self.queries, q, self.tokenizer)
            text = _text(self.queries, q, tokens)
            certificate = self.scores.certificate[q] if self.scores.certificate else None
            out.append(
                QueryReport(
                    index=q,
                    text=text,
                    tokens=tokens,
                    counted=_counted(self.queries[q], len(tokens)),
                    top=[self.example(i, v, r + 1, parts.get(i)) for r, (i, v) in enumerate(top)],
                    bottom=[self.example(i, v, len(self.train) - r, parts.get(i)) for r, (i, v) in enumerate(low)],
                    histogram=None if self.total is None else histogram(self.total[q].tolist()),
                    module_shares=shares,
                    certificate=None if certificate is None else _certificate(certificate),
                    metadata=_metadata(self.queries, q, text),
                )
            )
        return out

    def example(self, index: int, score: float, rank: int, parts: Any) -> ExampleReport:
        """One training example; ``parts`` are its token scores ``[T]``, None where there are none."""
        tokens = _tokens(self.train, index, self.tokenizer)
        text = _text(self.train, index, tokens)
        return ExampleReport(
            index=index,
            score=score,
            rank=rank,
            tokens=tokens[: self.max_tokens],
            text=text,
            token_scores=None if parts is None else parts[: len(tokens)].tolist()[: self.max_tokens],
            metadata=_metadata(self.train, index, text),
            omitted_tokens=max(0, len(tokens) - self.max_tokens),
        )
