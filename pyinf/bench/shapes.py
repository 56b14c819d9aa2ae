"""Sizes that ops are verified and measured at: layers of three models, odd sizes, and sizes given by hand."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from pyinf.errors import ConfigError

__all__ = ["MODELS", "ODD", "Shape", "model_shapes", "parse_shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, for any op; an op reads the fields it knows.

    ``lengths`` are the tokens of each sequence. ``queries`` Q and ``rank`` r are those of scores and low-rank
    preconditioning, ``query_length`` the tokens of one query there; ``k`` is one side of a projected gradient. Flat
    gradients are ``[batch, flat]`` and are projected to ``sketch`` numbers; a store is ``[rows, width]`` and ``top`` of
    its rows are kept. Pairs of sequences (``gradient_dot``) are formed with the first ``pairs`` sequences.
    """

    label: str
    d_out: int
    d_in: int
    lengths: tuple[int, ...]
    queries: int = 3
    rank: int = 5
    query_length: int = 0
    k: int = 6
    batch: int = 5
    flat: int = 0
    sketch: int = 40
    nnz: int = 2
    rows: int = 70
    width: int = 40
    top: int = 9
    pairs: int = 0

    @property
    def tokens(self) -> int:
        """Counted tokens of all sequences."""
        return sum(self.lengths)

    @property
    def sequences(self) -> int:
        """How many sequences."""
        return len(self.lengths)

    def __str__(self) -> str:
        return self.label


# (layers of one block) d_out × d_in, the different ones only.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "gpt2": {"c_attn": (2304, 768), "attn.c_proj": (768, 768), "c_fc": (3072, 768), "mlp.c_proj": (768, 3072)},
    "llama-1b": {"q_proj": (2048, 2048), "k_proj": (512, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192)},
    "llama-8b": {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)},
}
"""GPT-2 (124M), Llama-3.2-1B, Llama-3-8B."""

LONGEST = 1 << 24
"""Elements of a flat gradient in the shapes of a model, at most: longer ones only repeat the same loop."""

ODD: tuple[Shape, ...] = (
    Shape("small", 5, 9, (3, 4), flat=45, rank=2, k=3),
    Shape("odd", 33, 65, (17, 0, 1, 40), flat=1001, sketch=130, width=129, rows=333),
    Shape("tile", 128, 64, (64, 64, 128), flat=4096, sketch=64, width=64, rows=512, k=16, rank=16, queries=4),
    Shape("long", 70, 130, (300, 129, 513), flat=777, sketch=7, rank=3, k=17),
    Shape("wide", 400, 264, (3, 2), flat=20000, sketch=700, batch=33, width=512, rows=3000, top=64, k=64),
    Shape("no tokens", 6, 7, (0, 0), batch=3, rows=5),
    Shape("no sequences", 6, 7, (), batch=0, flat=11, rows=0, queries=2),
)
"""What correctness is judged on: sizes below, at and between tiles, empty sequences, nothing at all."""


def model_shapes(name: str, batch: int = 8, length: int = 1024) -> list[Shape]:
    """One shape for each different layer of a model, at ``batch`` sequences of ``length`` tokens.

    Raises ``ConfigError`` for an unknown model.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; choose one of: {', '.join(MODELS)}")
    found = []
    for layer, (d_out, d_in) in MODELS[name].items():
        found.append(
            Shape(
                f"{name}.{layer}",
                d_out,
                d_in,
                (length,) * batch,
                queries=32,
                rank=64,
                query_length=128,
                k=64,
                batch=32,
                flat=min(d_out * d_in, LONGEST),
                sketch=512,
                nnz=1,
                rows=1 << 19,
                width=1024,
                top=100,
            )
        )
    return found


_FIELDS = {f.name: f.type for f in dataclasses.fields(Shape)}
_HELP = "a model (gpt2, llama-1b, llama-8b), 4096x14336 (d_out x d_in), or d_out=4096,d_in=1024,batch=8,length=512,…"


def parse_shape(text: str) -> list[Shape]:
    """Shapes of a model by name, or one given by hand: ``4096x14336`` or ``d_out=512,d_in=256,length=128,sequences=4``.

    By hand, ``sequences`` of ``length`` tokens each (8 of 512 if not given); the other keys are the fields of
    :class:`Shape`. Raises ``ConfigError`` for anything else.
    """
    if text in MODELS:
        return model_shapes(text)
    values: dict[str, int] = {}
    short = re.fullmatch(r"(\d+)x(\d+)", text)
    if short:
        values = {"d_out": int(short[1]), "d_in": int(short[2])}
    else:
        for item in text.split(","):
            key, _, value = item.partition("=")
            key = key.strip()
            if not value.strip().isdigit() or key not in {*_FIELDS, "length", "sequences"} - {"label", "lengths"}:
                raise ConfigError(f"cannot read the shape {text!r} ({item!r}); write {_HELP}")
            values[key] = int(value)
    if "d_out" not in values or "d_in" not in values or min(values["d_out"], values["d_in"]) < 1:
        raise ConfigError(f"the shape {text!r} needs d_out and d_in of at least 1; write {_HELP}")
    lengths = (values.pop("length", 512),) * values.pop("sequences", 8)
    defaults = {"queries": 32, "rank": 64, "query_length": min(128, lengths[0] if lengths else 0), "k": 64, "batch": 8}
    defaults |= {
        "flat": min(values["d_out"] * values["d_in"], LONGEST),
        "sketch": 512,
        "rows": 1 << 16,
        "width": 1024,
        "top": 100,
    }
    label = f"{values['d_out']}x{values['d_in']}"
    return [Shape(label, lengths=lengths, **{**defaults, "nnz": 1, **values})]
