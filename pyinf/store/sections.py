"""The columns of a row: which layer they belong to, and how a query row meets them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyinf.errors import ConfigError

__all__ = ["KINDS", "Section", "layout", "query_offsets", "query_width", "row_width", "section_scores"]

KINDS = ("vector", "factors")
_BLOCK_ELEMENTS = 1 << 24  # float32 values of gradients rebuilt from factors at a time: 64 MiB


@dataclass(frozen=True)
class Section:
    """One layer's part of a row; ``name`` is "" where the row is one joint vector.

    ``kind="vector"``: ``width`` columns, score ``⟨q, row⟩``; ``shape`` is ``(width,)`` or ``(k_g, k_a)``, row-major.
    ``kind="factors"``: ``shape (c, m, n)``; the row holds ``u [c, m]``, then ``v [c, n]`` and stands for the gradient
    ``Σ_c u_c v_cᵀ``; with the query's ``Q [m, n]`` (row-major) the score is ``Σ_c u_cᵀ Q v_c``.
    ``offset`` is the section's first column in the row. Raises ``ConfigError`` for a kind or shape that cannot be.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        sizes = tuple(self.shape)
        object.__setattr__(self, "shape", sizes)
        if self.kind not in KINDS:
            raise ConfigError(f"section {self.name!r}: unknown kind {self.kind!r}; choose one of: {', '.join(KINDS)}")
        wanted = (3,) if self.kind == "factors" else (1, 2)
        if len(sizes) not in wanted or not all(type(s) is int and s >= 1 for s in sizes):
            raise ConfigError(f"section {self.name!r}: {list(sizes)} is not the shape of {self.kind}")
        if type(self.offset) is not int or self.offset < 0:
            raise ConfigError(f"section {self.name!r}: offset {self.offset!r} must not be negative")

    @property
    def width(self) -> int:
        """Columns of a row."""
        if self.kind == "factors":
            c, m, n = self.shape
            return c * (m + n)
        return math.prod(self.shape)

    @property
    def query_width(self) -> int:
        """Columns of a query row: ``m·n`` for factors, ``width`` for a vector."""
        return self.shape[1] * self.shape[2] if self.kind == "factors" else self.width

    @property
    def stop(self) -> int:
        """One past the section's last column in a row."""
        return self.offset + self.width

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "kind": self.kind, "shape": list(self.shape), "offset": self.offset}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Section:
        """The inverse of :meth:`to_dict`."""
        return cls(data["name"], data["kind"], tuple(data["shape"]), data["offset"])


def layout(parts: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[Section]:
    """Sections ``(name, kind, shape)`` one after the other, offsets filled in."""
    found: list[Section] = []
    for name, kind, shape in parts:
        found.append(Section(name, kind, tuple(shape), found[-1].stop if found else 0))
    return found


def row_width(sections: Sequence[Section]) -> int:
    """Float columns of a whole row."""
    return sum(section.width for section in sections)


def query_width(sections: Sequence[Section]) -> int:
    """Float columns of a whole query row."""
    return sum(section.query_width for section in sections)


def query_offsets(sections: Sequence[Section]) -> list[int]:
    """First column of every section in a query row, and the width of the whole at the end."""
    return list(accumulate((section.query_width for section in sections), initial=0))


def section_scores(queries: Tensor, rows: Tensor, sections: Sequence[Section]) -> Tensor:
    """Scores of every query against every row, summed over the sections: ``[Q, B]``.

    queries: float ``[Q, query_width]``, rows: float ``[B, width]``. In float64 where either is, else float32.
    Factors are multiplied out (``Σ_c u_c v_cᵀ``) a block of rows at a time, which costs less than ``Q`` sandwiches.
    Raises ``ConfigError`` where a width does not fit the sections.
    """
    if queries.dim() != 2 or queries.shape[1] != query_width(sections):
        raise ConfigError(f"query rows must be [Q, {query_width(sections)}]; got {tuple(queries.shape)}")
    if rows.dim() != 2 or rows.shape[1] != row_width(sections):
        raise ConfigError(f"rows must be [B, {row_width(sections)}]; got {tuple(rows.shape)}")
    dtype = torch.float64 if torch.float64 in (queries.dtype, rows.dtype) else torch.float32
    queries, rows = queries.to(dtype), rows.to(dtype)
    if all(section.kind == "vector" for section in sections):
        return queries @ rows.T
    out = torch.zeros(queries.shape[0], rows.shape[0], dtype=dtype, device=queries.device)
    for section, start in zip(sections, query_offsets(sections), strict=False):
        q = queries[:, start : start + section.query_width]
        part = rows[:, section.offset : section.stop]
        if section.kind == "vector":
            out += q @ part.T
            continue
        c, m, n = section.shape
        step = max(1, _BLOCK_ELEMENTS // (m * n))
        for b in range(0, rows.shape[0], step):
            block = part[b : b + step]
            u, v = block[:, : c * m].reshape(-1, c, m), block[:, c * m :].reshape(-1, c, n)
            out[:, b : b + step] += q @ torch.bmm(u.transpose(1, 2), v).flatten(1).T
    return out
