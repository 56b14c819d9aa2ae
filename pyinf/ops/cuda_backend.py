"""The CUDA kernels of ``pyinf._C``: "auto" takes one only where it was verified on the card at hand (verified.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.errors import PyinfError
from pyinf.ops import registry
from pyinf.ops.packing import bounds
from pyinf.ops.verified import is_verified

try:
    from pyinf import _C
except ImportError as error:
    _C = None
    _missing = f"the extension pyinf._C is not built ({error}); run: pip install ."
else:
    built = hasattr(_C, "cuda_accumulate_squared_gradients")
    _missing = None if built else "pyinf._C was built without CUDA; rebuild with PYINF_CUDA=1 (it needs nvcc)"

_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}


def _unavailable() -> str | None:
    return _missing or (None if torch.cuda.is_available() else "torch sees no CUDA device")


def _check_squared(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if not (Lam.is_cuda and Lam.device == g.device == a.device):
        return f"the CUDA kernel takes tensors of one CUDA device; g is on {g.device} and Lam on {Lam.device}"
    if Lam.dtype != torch.float32 or g.dtype != a.dtype or g.dtype not in _DTYPES:
        return f"no CUDA kernel for g {g.dtype}, a {a.dtype}, Lam {Lam.dtype}"
    if any(x.numel() and x.stride(1) != 1 for x in (Lam, g, a)):
        return "the columns of Lam, g and a must be next to each other in memory"
    return None


def _prefer_squared(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> bool:
    return is_verified("accumulate_squared_gradients", torch.cuda.get_device_name(Lam.device))


def accumulate_squared_gradients(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    """Tiles of every gradient in registers over its tokens, squared into Λ; on the current stream."""
    if not offsets.is_cuda:  # offsets that are on the device already were checked by whoever put them there
        bounds(offsets, g.shape[0])
    marks = offsets.to(Lam.device, torch.int64).contiguous()
    code = _C.cuda_accumulate_squared_gradients(
        Lam.data_ptr(),
        Lam.stride(0),
        g.data_ptr(),
        g.stride(0),
        a.data_ptr(),
        a.stride(0),
        marks.data_ptr(),
        marks.numel() - 1,
        g.shape[1],
        a.shape[1],
        _DTYPES[g.dtype],
        Lam.device.index,
        torch.cuda.current_stream(Lam.device).cuda_stream,
    )
    if code:
        raise PyinfError(f"CUDA kernel of accumulate_squared_gradients failed: {_C.error_name(code)}")


_check_squared.unavailable = _unavailable  # type: ignore[attr-defined]
registry.register("accumulate_squared_gradients", "cuda", accumulate_squared_gradients, _check_squared, _prefer_squared)
