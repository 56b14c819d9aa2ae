"""The kernels under compute-sanitizer: bad accesses, bad barriers, races; and a planted error that it must find."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.journal import Item
from benchmarks.gpu.options import Options

TOOLS = ("memcheck", "synccheck", "racecheck")
CONTROL = "memcheck:planted error"


def tool() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which("compute-sanitizer") or next(
        (p for p in ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer") if Path(p).is_file()),
        None,
    )


def shards(options: Options) -> list[str]:
    """A process for each tool and backend, and the control. In a rehearsal without the tool, the backends alone."""
    from benchmarks.gpu.parts import gpu_backends

    if not options.gpu:
        return [f"none:{name}" for name in gpu_backends(options)]
    if tool() is None:
        return []
    return [CONTROL, *(f"{t}:{name}" for t in TOOLS for name in gpu_backends(options))]


def prefix(shard: str) -> list[str]:
    """The command that the worker runs under."""
    name = shard.split(":")[0]
    found = tool()
    if name == "none" or found is None:
        return []
    return [found, "--tool", name, "--print-limit", "20"]


def environment(shard: str) -> dict[str, str]:
    """Every tensor in an allocation of its own, so that memcheck sees where it ends."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if not shard.startswith("none") else {}


def items(shard: str, options: Options) -> Iterator[Item]:
    if shard == CONTROL:
        yield "planted error", planted
        return
    from pyinf.bench.cases import OPS, backends
    from pyinf.bench.shapes import ODD

    backend = shard.split(":")[1]
    shapes = [s for s in ODD if s.label in (("small",) if options.tiny else ("odd", "small"))]
    for op in OPS:
        if backend not in backends(op):
            continue
        for shape in shapes:
            for dtype in ("bfloat16", "float32") if options.gpu else ("float32",):
                yield f"{shard} {op} {shape.label} {dtype}", lambda a=(op, backend, shape, dtype): once(options, *a)


def once(options: Options, op: str, backend: str, shape: Any, dtype: str) -> dict[str, Any]:
    """One call of every variant; inputs are drawn on the CPU, so that little else runs under the tool."""
    import torch

    from pyinf.bench.cases import OPS, Inputs, call, supports
    from pyinf.bench.timing import resolve_device

    device = resolve_device(options.device)
    row: dict[str, Any] = {"op": op, "backend": backend, "dtype": dtype, "shape": shape.label, "calls": 0}
    for variant in OPS[op].variants:
        made = OPS[op].make(Inputs(getattr(torch, dtype), torch.device("cpu")), shape, variant)
        args = tuple(x.to(device) if isinstance(x, torch.Tensor) and not _offsets(x) else x for x in made)
        if supports(op, backend, args) is None:
            call(op, backend, args)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            row["calls"] += 1
    return row


def _offsets(x: Any) -> bool:
    import torch

    return x.dtype == torch.int64


def planted() -> dict[str, Any]:
    """A store beyond the end of an allocation: a tool that does not report it reports nothing."""
    import torch

    from benchmarks.gpu.planted import store_beyond

    x = torch.zeros(1024, device="cuda")
    store_beyond[(1,)](x, 1 << 20, BLOCK=128)
    torch.cuda.synchronize()
    return {}


def findings(log: str) -> dict[str, int]:
    """Errors and hazards that the summaries of a log count; -1 where it holds no summary."""
    errors = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", log)]
    hazards = [int(n) for n in re.findall(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?", log)]
    found = errors + hazards
    return {"summaries": len(found), "errors": sum(found) if found else -1}
