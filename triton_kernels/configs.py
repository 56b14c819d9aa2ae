"""Which tile sizes a kernel takes on which card. Every kernel module holds a table ``CONFIGS[family][kind]``.

Families are "sm_80" (163 KiB of shared memory a block), "sm_86" and "sm_89" (99 KiB), "sm_90" (227 KiB) and "default":
what any other card gets, small enough for 99 KiB. Rows whose name ends in :data:`OLD` ("default old", "sm_90 old") go
before all others where Triton is older than 3.6: its register allocation and layouts differ, and some tiles that fit
later spill there, or stop the compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
import triton

__all__ = ["FAMILIES", "OLD", "Config", "Table", "all_configs", "family_of", "is_old", "lookup"]

FAMILIES = ("sm_80", "sm_86", "sm_89", "sm_90")
OLD = " old"
"""What the name of a row for Triton before 3.6 ends in."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile-time constants of one kernel, and its warps and pipeline stages."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        """Short and unique within a kernel, for tables and caches: ``BM128_BN64_w8_s3``."""
        sizes = "_".join(f"{key}{value}" for key, value in self.constants.items())
        return f"{sizes}_w{self.num_warps}_s{self.num_stages}"


Table = Mapping[str, Mapping[str, Config]]
"""``table[family][kind]``; the kinds are the kernel's own ("half", "float32", "small", ...)."""


@lru_cache(maxsize=64)
def family_of(device: torch.device) -> str:
    """The family of a CUDA device; "default" for a card without a table and for the CPU (the interpreter)."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in FAMILIES else "default"


@lru_cache(maxsize=1)
def is_old() -> bool:
    """Whether this is a Triton before 3.6."""
    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) < (3, 6)


def lookup(table: Table, family: str, kind: str) -> Config:
    """The entry of a family, else of "default"; before these, what old releases of Triton need."""
    if is_old():
        for row in (family + OLD, "default" + OLD):
            if kind in table.get(row, {}):
                return table[row][kind]
    entries = table.get(family, table["default"])
    return entries.get(kind) or table["default"][kind]


def all_configs(table: Table, family: str) -> Iterator[tuple[str, Config]]:
    """Every (kind, configuration) that a card of this family may be given: what the ahead-of-time gate compiles."""
    for kind in table["default"]:
        yield kind, lookup(table, family, kind)
