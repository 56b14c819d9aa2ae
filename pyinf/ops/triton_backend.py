"""What every Triton op shares: when Triton can run, which tensors it takes, registration, and the launch itself.

The kernels are in ``pyinf.triton_kernels``, which imports triton and is therefore imported on first use; a wrapper
module ``triton_<group>.py`` beside this one checks arguments, allocates, and calls :func:`run`. With
``TRITON_INTERPRET=1`` they take CPU tensors, under Triton's interpreter: slow, for tests, never chosen by "auto".
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyinf.ops import registry
from pyinf.ops.verified import is_verified

if TYPE_CHECKING:
    from pyinf.triton_kernels.launch import Launch

__all__ = [
    "FLOATS",
    "aligned_rows",
    "check_tensors",
    "device_of",
    "interpreted",
    "register_triton",
    "run",
    "unavailable",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16
"""Triton knows of a size or stride that 16 divides it, or nothing."""
LARGEST_STRIDE = (1 << 31) // 512
"""Rows of a tile may not lie 2³¹ elements apart or more: offsets inside a tile have 32 bits."""
_OLDEST = (8, 0)
_WRAPPERS = (
    "triton_covariance",
    "triton_squares",
    "triton_precondition",
    "triton_scores",
    "triton_gradients",
    "triton_projection",
    "triton_scan",
)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, read by triton when it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@lru_cache(maxsize=1)
def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None, or a module without a spec
        return False


@lru_cache(maxsize=16)
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= _OLDEST:
        return None
    return f"pyinf's Triton kernels need compute capability 8.0 or newer; {device} has {major}.{minor}"


NEWER: dict[str, tuple[int, int]] = {}
"""Ops whose kernels the oldest supported Triton does not compile well, and the version that they need. None at present:
where 3.2 spills or stops, configurations of its own stand in the tables (configs.OLD)."""


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """Major and minor version of the installed Triton."""
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


def too_old_for(op: str) -> str | None:
    """Why the installed Triton cannot serve ``op``, or None."""
    needed = NEWER.get(op)
    if needed is None or interpreted() or triton_version() >= needed:
        return None
    have, wanted = (".".join(map(str, version)) for version in (triton_version(), needed))
    return f"the Triton kernel of {op} needs triton {wanted} or newer (here: {have}): older ones do not compile it well"


def unavailable() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if not _installed():
        return "triton is not installed; run: pip install triton"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs Triton kernels on the CPU, slowly)"
    if torch.version.hip is not None:
        return "pyinf's Triton kernels are proved for NVIDIA cards only"
    return None


def check_tensors(*tensors: Tensor | None, dtypes: Sequence[torch.dtype] = FLOATS) -> str | None:
    """Why these tensors cannot go to a Triton kernel, or None: one CUDA device (the CPU in the interpreter), dtypes."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    for tensor in given:
        if tensor.device != device:
            return f"Triton kernels take tensors of one device; got {device} and {tensor.device}"
        if tensor.dtype not in dtypes:
            return f"no Triton kernel for {tensor.dtype}, only for {', '.join(str(dtype) for dtype in dtypes)}"
    if device.type == "cpu":
        return None if interpreted() else "Triton kernels take CUDA tensors; these are on the CPU"
    if device.type != "cuda":
        return f"Triton kernels take CUDA tensors; these are on {device}"
    if interpreted():
        return "TRITON_INTERPRET=1 is set: the interpreter takes CPU tensors only"
    return _too_old(device)


def aligned_rows(x: Tensor) -> tuple[Tensor, int]:
    """x ``[N, d]``, or a copy of it, whose rows a kernel may read in 16-byte pieces; and how far: d rounded up to 16.

    Triton fetches rows asynchronously only where 16 divides the row stride and the number of columns read. What lies
    between d and the width returned is any memory at all (the kernel's results there are never stored).
    """
    rows, d = x.shape
    width = -(-d // ALIGNMENT) * ALIGNMENT
    stride = x.stride(0)
    if x.stride(1) == 1 and stride % ALIGNMENT == 0 and width <= stride < LARGEST_STRIDE and x.data_ptr() % 16 == 0:
        last = x.storage_offset() + (rows - 1) * stride + width
        if rows == 0 or last * x.element_size() <= x.untyped_storage().nbytes():
            return x, width
    padded = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    padded[:, :d] = x
    return padded, width


def device_of(args: Iterable[Any]) -> torch.device:
    """The device of the first tensor among the arguments of an op."""
    return next(arg for arg in args if isinstance(arg, Tensor)).device


def register_triton(
    op: str,
    function: Callable[..., Any],
    check: Callable[..., str | None],
    prefer: Callable[..., bool] | None = None,
) -> None:
    """Register ``function`` as the Triton implementation of ``op``.

    ``check(*args)`` says why these arguments cannot be served, or None; it is asked only where Triton can run at all.
    "auto" takes the kernel only on a CUDA card where it was verified (verified.py), and there only where ``prefer``
    (None: always) says that it was measured to win.
    """

    def cannot_run() -> str | None:
        return unavailable() or too_old_for(op)

    def full_check(*args: Any) -> str | None:
        return cannot_run() or check(*args)

    def full_prefer(*args: Any) -> bool:
        device = device_of(args)
        if device.type != "cuda" or not is_verified(op, torch.cuda.get_device_name(device), backend="triton"):
            return False
        return prefer is None or prefer(*args)

    full_check.unavailable = cannot_run  # type: ignore[attr-defined]
    registry.register(op, "triton", function, full_check, full_prefer)


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run the launches in order, on the current stream of ``device``."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            for launch in launches:
                launch.run()
    else:
        for launch in launches:
            launch.run()


# Each wrapper registers its ops when it is imported; none of them imports triton before an op is called.
for _name in _WRAPPERS:
    importlib.import_module(f"pyinf.ops.{_name}")
