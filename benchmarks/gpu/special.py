"""What a kernel must bear beside right values: another stream, capture in a graph, offsets beyond 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.journal import Item
from benchmarks.gpu.options import Options
from benchmarks.gpu.parts import gpu_backends
from pyinf.bench.cases import OPS, Inputs, backends, call, supports
from pyinf.bench.shapes import ODD, Shape
from pyinf.bench.timing import resolve_device
from pyinf.bench.verify import Case, allowed_error, copies, errors, exact_result, result_of
from pyinf.ops import philox, reference

TILE = next(s for s in ODD if s.label == "tile")
DTYPE = "bfloat16"
GROUPS = 3
"""Processes a backend: starting one takes longer than what it does for an op."""


def shards(options: Options) -> list[str]:
    """``backend:group``; the ops of a group are every third one."""
    return [f"{backend}:{group}" for backend in gpu_backends(options) for group in range(GROUPS)]


class FarInputs(Inputs):
    """Matrices whose rows lie so far apart that the last one starts more than ``far`` elements after the first."""

    far = (1 << 31) + (1 << 20)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        if rows < 2:
            return self.randn(rows, columns, dtype=dtype)
        stride = max(columns, -(-self.far // (rows - 1)))
        stride += -stride % 8  # 16-byte aligned rows, as real activations have
        storage = torch.empty((rows - 1) * stride + columns, dtype=dtype or self.dtype, device=self.device)
        view = storage.as_strided((rows, columns), (stride, 1))
        view.copy_(self.randn(rows, columns, dtype=dtype))
        return view


def items(shard: str, options: Options) -> Iterator[Item]:
    backend, _, group = shard.partition(":")
    for op in list(OPS)[int(group) :: GROUPS]:
        if backend in backends(op):
            yield from _of(op, backend, options)


def _of(op: str, backend: str, options: Options) -> Iterator[Item]:
    shard = f"{op}:{backend}"
    device = resolve_device(options.device)
    dtype = DTYPE if options.gpu else "float32"
    yield f"{shard} side stream", lambda: _row(op, backend, "side stream", side_stream(op, backend, dtype, device))
    yield f"{shard} graph", lambda: _row(op, backend, "graph", graph(op, backend, dtype, device))
    far = FarInputs.far if options.gpu else 1 << 14
    yield f"{shard} far rows", lambda: _row(op, backend, "far rows", far_rows(op, backend, dtype, device, far))
    if op in ("random_projection", "sparse_projection"):
        length = far if options.gpu else 1 << 11
        yield f"{shard} long row", lambda: _row(op, backend, "long row", long_row(op, backend, dtype, device, length))


def _row(op: str, backend: str, test: str, state: str) -> dict[str, Any]:
    return {"op": op, "backend": backend, "test": test, "state": state}


def _judge(op: str, dtype: str, shape: Shape, outputs: list[Tensor], args: tuple[Any, ...]) -> str:
    exact = exact_result(op, args)
    allowed = allowed_error(Case(op, "torch", shape, dtype, OPS[op].variants[0]), args, exact)[1]
    error = errors(op, outputs, exact, args)
    return "ok" if error <= allowed else f"WRONG: error {error:.1e}, allowed {allowed:.1e}"


def _make(
    op: str,
    dtype: str,
    device: torch.device,
    kind: type[Inputs] = Inputs,
    seed: int = 0,
    layout: str = "device offsets",
) -> tuple[Any, ...]:
    inputs = kind({"bfloat16": torch.bfloat16}.get(dtype, torch.float32), device, layout, seed)
    return OPS[op].make(inputs, TILE, OPS[op].variants[0])


def _floating(args: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]


def has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def side_stream(op: str, backend: str, dtype: str, device: torch.device) -> str:
    """The inputs are NaN until the side stream, after a long wait, fills them: work on any other stream reads NaN."""
    args = _make(op, dtype, device)
    reason = supports(op, backend, args)
    if reason is not None:
        return f"not taken: {reason}"
    if not has_streams(device):
        return "not run: no streams on a CPU"
    real = [x.clone() for x in _floating(args)]
    stream = torch.cuda.Stream(device)
    own = copies(op, args)
    call(op, backend, copies(op, args))  # compiles and loads: that may synchronise
    inputs = _floating(own)
    for x in inputs:
        x.fill_(float("nan"))
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for x, value in zip(inputs, real, strict=True):
            x.copy_(value)
        made = call(op, backend, own)
    stream.synchronize()
    outputs = _outputs(op, own, made)
    torch.cuda.synchronize(device)
    fresh = _make(op, dtype, device)
    return _judge(op, dtype, TILE, outputs, fresh)


def _outputs(op: str, args: tuple[Any, ...], made: Any) -> list[Tensor]:
    return result_of(op, lambda *_: made, args) if not OPS[op].accumulates else _accumulated(op, args[0])


def _accumulated(op: str, buffer: Tensor) -> list[Tensor]:
    return [buffer.tril() if op == "accumulate_covariance" else buffer]


def graph(op: str, backend: str, dtype: str, device: torch.device) -> str:
    """Captured once, replayed on other inputs in the same memory; with the offsets on the device, or else the host."""
    reason = supports(op, backend, _make(op, dtype, device))
    if reason is not None:
        return f"not taken: {reason}"
    if not has_streams(device):
        return "not run: no graphs on a CPU"
    try:
        return _replayed(op, backend, dtype, device, "device offsets")
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        state = _replayed(op, backend, dtype, device, "contiguous")
        first = " ".join(str(error).split())[:120]
        return f"{state}, with offsets on the host only (on the device: {first})"


def _replayed(op: str, backend: str, dtype: str, device: torch.device, layout: str) -> str:
    args = _make(op, dtype, device, layout=layout)
    own = copies(op, args)
    warm = torch.cuda.Stream(device)
    warm.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(warm):
        for _ in range(2):
            call(op, backend, copies(op, args))
    torch.cuda.current_stream(device).wait_stream(warm)
    torch.cuda.synchronize(device)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        made = call(op, backend, own)
    other = _make(op, dtype, device, seed=1, layout=layout)
    for x, value in zip(_floating(own), _floating(other), strict=True):
        x.copy_(value)
    captured.replay()
    torch.cuda.synchronize(device)
    return _judge(op, dtype, TILE, _outputs(op, own, made), other)


def far_rows(op: str, backend: str, dtype: str, device: torch.device, far: int) -> str:
    """Row offsets beyond what 32 bits hold."""
    kind = type("Far", (FarInputs,), {"far": far})
    args = _make(op, dtype, device, kind)
    reason = supports(op, backend, args)
    if reason is not None:
        return f"not taken: {reason}"
    outputs = result_of(op, lambda *a: call(op, backend, a), args)
    return _judge(op, dtype, TILE, outputs, args)


def long_row(op: str, backend: str, dtype: str, device: torch.device, length: int) -> str:
    """One gradient of more than 2³¹ elements, of which only the last are not zero."""
    kind = {"bfloat16": torch.bfloat16}.get(dtype, torch.float32)
    tail, k, seed = min(4096, length // 4), 64, 5
    x = torch.zeros(1, length, dtype=kind, device=device)
    x[0, -tail:] = Inputs(kind, device).randn(tail)
    args = (x, k, seed, "rademacher") if op == "random_projection" else (x, k, seed, 1)
    reason = supports(op, backend, args)
    if reason is not None:
        return f"not taken: {reason}"
    out = call(op, backend, args)
    rows = (length - tail, length)
    if op == "random_projection":
        P = philox.random_matrix(rows, (0, k), seed, reference.STREAM_PROJECTION, "rademacher", device).double()
        exact = x[:, -tail:].double() @ P / k**0.5
    else:
        bucket, sign = philox.sparse_coordinates(rows, k, 1, seed, reference.STREAM_PROJECTION, device)
        exact = torch.zeros(k, dtype=torch.float64, device=device)
        exact = exact.index_add_(0, bucket[:, 0], x[0, -tail:].double() * sign[:, 0].double())[None]
    error = float((out.double() - exact).norm() / exact.norm())
    return "ok" if error <= 1e-5 else f"WRONG: error {error:.1e}, allowed 1.0e-05"
