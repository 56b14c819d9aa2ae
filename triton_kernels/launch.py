"""One launch of one kernel, described before it happens: what runs is what the ahead-of-time gate compiles.

A launcher in this package returns :class:`Launch` objects, made from tensors (real ones, or tensors on the "meta"
device for the gate). ``run()`` launches on the current stream; ``specialisation()`` says how Triton will specialise the
arguments, so that the gate compiles the same machine code with the same attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Launch", "Specialisation"]

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """Types of the run-time arguments, constants (those of value 1 and None included), and what 16 divides."""

    signature: dict[str, str]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: ``kernel[grid](**arguments, **constants)``.

    ``arguments`` are what Triton specialises at run time (tensors, integers, floats, None); ``constants`` are the
    ``tl.constexpr`` parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> None:
        """Launch on the current stream of the current device; nothing for an empty grid."""
        if all(self.grid):
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)

    def specialisation(self) -> Specialisation:
        """How Triton specialises this launch: integers of value 1 and None become constants; 16 dividing an integer or
        an address is an attribute. Tensors on the "meta" device count as aligned where their storage offset is. What a
        kernel lists under ``do_not_specialize`` (a seed) keeps its type whatever its value.
        """
        signature, constants, divisible = {}, dict(self.constants), []
        plain = {p.name for p in getattr(self.kernel, "params", ()) if p.do_not_specialize}
        for name, value in self.arguments.items():
            if name in plain and type(value) is int:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            elif value is None or (type(value) is int and value == 1):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                offset = value.storage_offset() * value.element_size()
                if (offset if value.is_meta else value.data_ptr()) % 16 == 0:
                    divisible.append(name)
            elif isinstance(value, bool):
                signature[name] = "i1"
            elif isinstance(value, int):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                raise TypeError(f"{name} is a {type(value).__name__}: no argument of a Triton kernel")
        return Specialisation(signature, constants, tuple(divisible))
