"""What every test of a Triton kernel needs: inputs, the float64 reference, and the error gate.

A test draws an input (``layer``, ``layers()``), runs the op under ``use_backend("triton")`` and holds the result to
``gate``: its error is at most twice that of plain torch in the same dtype, or a small floor. Memory that a wrapper
allocates uninitialised is full of NaN in all tests of this folder (conftest.py). Inputs are float32 and float16: the
interpreter's bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from pyinf.ops import use_backend
from tests.ops.cases import Layer, make_layer

__all__ = ["DTYPES", "N_THREADS", "any_layer", "compare", "error", "framed", "gate", "quick", "sizes"]

DTYPES = (torch.float32, torch.float16)
N_THREADS = 1
FLOOR = 3e-7
"""What float32 sums of a few hundred terms may lose by chance in one run, where plain torch happens to lose less."""
CEILING = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Nothing passes above this, whatever plain torch does; half precision where intermediates are rounded to it."""

quick = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
"""Settings of a hypothesis test: ``@quick`` above ``@given(...)``. An interpreted program takes milliseconds."""


def sizes(largest: int) -> st.SearchStrategy[int]:
    """Sizes of a dimension: 0, 1, around multiples of 16 and of the tiles, or anything up to ``largest``."""
    edges = [n for n in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129) if n <= largest]
    return st.one_of(st.sampled_from(edges), st.integers(1, largest))


@st.composite
def any_layer(draw: st.DrawFn, largest: int = 70, longest: int = 40, strided: bool = True) -> Layer:
    """A packed layer: ragged sequences (some empty, or none at all), odd sizes, inputs that may not be contiguous."""
    lengths = draw(st.lists(st.integers(0, longest), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    layer = make_layer(lengths, draw(sizes(largest)), draw(sizes(largest)), dtype, False, draw(st.integers(0, 999)))
    if strided and draw(st.booleans()):
        layer = Layer(wider(layer.g, 3), wider(layer.a, 5), layer.offsets)
    return layer


def wider(x: Tensor, by: int) -> Tensor:
    """The same values as a slice of rows that are ``by`` elements longer, starting one element in; the rest is NaN."""
    out = torch.full((x.shape[0], x.shape[1] + by), float("nan"), dtype=x.dtype)
    out[:, 1 : 1 + x.shape[1]] = x
    return out[:, 1 : 1 + x.shape[1]]


def framed(x: Tensor, by: int = 64) -> Tensor:
    """The same values as every second element of a window, with ``by`` rows and columns of NaN on all its sides: what
    a kernel reads without a mask makes its result NaN, and strides of one are nowhere."""
    rows, columns = x.shape[-2:]
    out = torch.full((*x.shape[:-2], rows + 2 * by, 2 * (columns + 2 * by)), float("nan"), dtype=x.dtype)
    window = out[..., by : by + rows, 2 * by : 2 * (by + columns) : 2]
    window.copy_(x)
    return window


def error(out: Tensor, ref: Tensor) -> float:
    """``‖out − ref‖ / ‖ref‖`` in float64 (the norm of out where ref is zero)."""
    assert out.shape == ref.shape, f"shape {tuple(out.shape)} instead of {tuple(ref.shape)}"
    if out.numel() == 0:
        return 0.0
    scale = ref.double().norm().item()
    distance = (out.double() - ref.double()).norm().item()
    return distance / scale if scale > 0 else distance


def gate(out: Tensor, plain: Tensor, ref: Tensor, dtype: torch.dtype, floor: float = FLOOR, times: float = 2.0) -> None:
    """Holds ``out`` to the error of ``plain`` (torch in the same ``dtype``) against ``ref`` (float64)."""
    assert torch.isfinite(out).all(), "NaN or infinity in the result"
    got, allowed = error(out, ref), max(times * error(plain, ref), floor)
    assert got <= min(allowed, CEILING[dtype]), f"error {got:.1e}, allowed {min(allowed, CEILING[dtype]):.1e}"


def compare(
    call: Callable[[torch.dtype], Sequence[Tensor]],
    op: str,
    dtype: torch.dtype,
    floor: float = FLOOR,
    times: float = 2.0,
) -> list[Tensor]:
    """Runs ``call`` three times and gates the Triton results: returns them.

    ``call(working_dtype)`` must build its inputs from values rounded to ``dtype``, converted to ``working_dtype``
    (``dtype`` itself, or float64 for the reference), run ``torch.ops.pyinf.<op>`` and return the outputs.
    """
    with use_backend("triton", op):
        outs = call(dtype)
        again = call(dtype)
    with use_backend("torch", op):
        plain = call(dtype)
    with use_backend("reference", op):
        refs = call(torch.float64)
    for out, same, simple, ref in zip(outs, again, plain, refs, strict=True):
        gate(out, simple, ref, dtype, floor, times)
        assert torch.equal(out, same), "not the same bits twice"
    return list(outs)
