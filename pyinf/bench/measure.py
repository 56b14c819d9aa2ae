"""Benchmarks of ops: speed by provider, shape by shape, and no speed without right values."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf import artifacts
from pyinf.bench import providers as who
from pyinf.bench.cases import OPS, Inputs, forced
from pyinf.bench.shapes import Shape
from pyinf.bench.timing import Clock, Timing, copies_needed
from pyinf.bench.verify import (
    DTYPES,
    Case,
    allowed_error,
    copies,
    errors,
    exact_result,
    multiplying,
    poisoned,
    result_of,
)
from pyinf.errors import ConfigError
from pyinf.ops import registry

__all__ = ["FIELDS", "Row", "Target", "measure", "share_of_ceiling", "sizes_of", "targets", "write_csv"]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is measured: one op on one shape in one dtype."""

    op: str
    shape: Shape
    dtype: str = "bfloat16"
    variant: str = ""

    def __str__(self) -> str:
        return " ".join(p for p in (self.op, self.variant, self.shape.label, self.dtype) if p)


@dataclasses.dataclass(frozen=True)
class Row:
    """One provider on one target. ``seconds`` and what follows from it are None where there is no speed: the provider
    cannot run it, or its values are wrong; ``note`` says which."""

    op: str
    variant: str
    shape: str
    sizes: str
    dtype: str
    provider: str
    formulation: str
    auto: str
    median_ms: float | None
    low_ms: float | None
    high_ms: float | None
    runs: int | None
    tflops: float | None
    gb_per_s: float | None
    limit: str
    percent_of_ceiling: float | None
    ratio_to_torch: float | None
    error: float | None
    allowed_error: float | None
    flops: float
    bytes: float
    note: str = ""


FIELDS = [f.name for f in dataclasses.fields(Row)]


def targets(ops: Sequence[str], shapes: Sequence[Shape], dtypes: Sequence[str]) -> Iterator[Target]:
    """Targets in the order given: an op's shapes after each other, without those that ask the same of it twice."""
    for op in ops:
        if op not in OPS:
            raise ConfigError(f"unknown op {op!r}; choose among: {', '.join(OPS)}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}; choose among: {', '.join(DTYPES)}")
    seen = set()
    for op in ops:
        for shape in shapes:
            for variant in OPS[op].timed:
                for dtype in dtypes:
                    for target in _sides(Target(op, shape, dtype, variant)):
                        key = (op, variant, dtype, sizes_of(op, target.shape))
                        if key not in seen:
                            seen.add(key)
                            yield target


def _sides(target: Target) -> Iterator[Target]:
    """A covariance is measured for both sides of a layer."""
    s = target.shape
    if target.op == "accumulate_covariance":
        yield dataclasses.replace(target, shape=dataclasses.replace(s, label=f"{s.label}.in"))
        yield dataclasses.replace(target, shape=dataclasses.replace(s, label=f"{s.label}.out", d_in=s.d_out))
    else:
        if target.op in ("gradient_dot", "gradient_norm") and s.lengths and s.lengths[0] > 512:
            s = dataclasses.replace(s, lengths=(512,) * s.sequences, pairs=s.sequences)
        yield dataclasses.replace(target, shape=dataclasses.replace(s, pairs=s.pairs or s.sequences))


_READS = {
    "accumulate_covariance": ("tokens", "d_in"),
    "precondition": ("d_out", "d_in", "queries"),
    "precondition_low_rank": ("d_out", "d_in", "queries", "query_length", "rank"),
    "dense_scores": ("d_out", "d_in", "tokens", "sequences", "queries"),
    "low_rank_scores": ("d_out", "d_in", "tokens", "sequences", "queries", "rank"),
    "project_gradients": ("d_out", "d_in", "tokens", "sequences", "k"),
    "random_projection": ("batch", "flat", "sketch"),
    "sparse_projection": ("batch", "flat", "sketch", "nnz"),
    "scan_topk": ("queries", "rows", "width", "top"),
}


def sizes_of(op: str, shape: Shape) -> str:
    """The sizes that the op reads, as ``name=value`` words."""
    names = _READS.get(op, ("d_out", "d_in", "tokens", "sequences"))
    return " ".join(f"{name}={getattr(shape, name)}" for name in names)


def input_bytes(args: Sequence[Any]) -> int:
    """Bytes of the tensors among the arguments."""
    return sum(x.numel() * x.element_size() for x in args if isinstance(x, Tensor))


def measure(
    target: Target,
    names: Sequence[str],
    clock: Clock,
    ceilings: dict[str, float],
    seconds: float = 0.3,
    judge: bool = True,
) -> list[Row]:
    """One row for each provider, in the order of ``names``.

    Values are checked first (``exact_result``, in float64 on the same device): a provider with an error above what
    verification allows, or with a result that is not finite, gets no speed. ``judge=False`` leaves the check out where
    it was made already, and says so in the note.
    """
    op, shape, device = OPS[target.op], target.shape, clock.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype, mode = DTYPES[target.dtype]
    sets = [op.make(Inputs(dtype, device, seed=0), shape, target.variant)]
    size = input_bytes(sets[0])
    room = _room(device)
    wanted = copies_needed(size, device)
    for seed in range(1, wanted):
        if size * (seed + 1) < room:
            sets.append(op.make(Inputs(dtype, device, seed=seed), shape, target.variant))
    args = sets[0]
    exact: list[Tensor] = []
    allowed = None
    if judge:
        exact = exact_result(target.op, args)
        allowed = allowed_error(Case(target.op, "torch", shape, target.dtype, target.variant), args, exact)[1]
    auto = registry.select(target.op, args).backend
    found: dict[str, tuple[Timing | None, str, float | None, str]] = {}
    for name in names:
        try:
            found[name] = _provider(target, name, sets, exact, allowed, clock, seconds, mode)
        except who.Unavailable as reason:
            found[name] = (None, "", None, f"cannot run: {reason}")
        except Exception as error:
            lines = str(error).splitlines() or [""]
            found[name] = (None, "", None, f"failed: {type(error).__name__}: {lines[0][:200]}")
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the context is gone
                torch.cuda.empty_cache()
    torch_time = found["torch"][0].median if "torch" in found and found["torch"][0] is not None else None
    flops = op.flops(shape, target.variant)
    moved = op.bytes(shape, target.variant, dtype.itemsize)
    rows = []
    for name, (timing, formulation, error, note) in found.items():
        limit, share = share_of_ceiling(timing, flops, moved, target.dtype, ceilings)
        rows.append(
            Row(
                target.op,
                target.variant,
                shape.label,
                sizes_of(target.op, shape),
                target.dtype,
                name,
                formulation,
                auto,
                timing and timing.median * 1e3,
                timing and timing.low * 1e3,
                timing and timing.high * 1e3,
                timing and timing.runs,
                timing and flops / timing.median / 1e12,
                timing and moved / timing.median / 1e9,
                limit,
                share,
                torch_time / timing.median if timing and torch_time else None,
                error,
                allowed,
                flops,
                moved,
                note,
            )
        )
    return rows


def _room(device: torch.device) -> int:
    """Bytes that copies of inputs may take: a third of what is free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 1 << 30


def _provider(
    target: Target,
    name: str,
    sets: Sequence[tuple[Any, ...]],
    exact: Sequence[Tensor],
    allowed: float | None,
    clock: Clock,
    seconds: float,
    mode: str,
) -> tuple[Timing | None, str, float | None, str]:
    """(time, formulation, error, note) of the fastest way in which the provider runs it with right values."""
    foreign = name in ("fast_jl", "sjlt")
    best: tuple[Timing | None, str, float | None, str] | None = None
    ways = who.runners(target.op, name, sets[0])
    with forced(target.op, "torch" if foreign else name), multiplying(mode):
        for label, run in ways.items():
            error: float | None = None
            try:
                if foreign:
                    error = who.projection_error(sets[0][0], run(*sets[0]))
                    limit: float | None = 3.0
                elif allowed is not None:
                    with poisoned():
                        error = errors(target.op, result_of(target.op, run, sets[0]), exact, sets[0])
                    limit = allowed
                else:
                    limit = None
                if limit is not None and error is not None and not error <= limit:
                    note = f"no speed: values are wrong (error {error:.1e}, allowed {limit:.1e})"
                    best = best or (None, label, error, note)
                    continue
                timing = clock.measure([_bind(run, copies(target.op, args)) for args in sets], seconds / len(ways))
            except (NotImplementedError, torch.OutOfMemoryError) as reason:
                if len(ways) == 1:
                    raise
                best = best or (None, label, None, f"cannot run: {type(reason).__name__}")
                if clock.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if best is None or best[0] is None or timing.median < best[0].median:
                note = (
                    "inner products against theory" if foreign else "" if allowed is not None else "values not judged"
                )
                best = (timing, label, error, note)
    assert best is not None
    return best


def _bind(run: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(*args)


def share_of_ceiling(
    timing: Timing | None, flops: float, moved: float, dtype: str, ceilings: dict[str, float]
) -> tuple[str, float | None]:
    """(what limits, percent of that ceiling): the floor is the larger of the times for the operations and the bytes."""
    peak = ceilings.get({"float32 tf32": "tf32", "float32 tf32x3": "tf32"}.get(dtype, dtype))
    copy = ceilings.get("copy")
    if not peak or not copy:
        return "", None
    passes = 3 if dtype == "float32 tf32x3" else 1
    arithmetic, memory = passes * flops / peak, moved / copy
    limit = "arithmetic" if arithmetic > memory else "memory"
    return limit, 100 * max(arithmetic, memory) / timing.median if timing else None


def write_csv(rows: Sequence[Row] | Sequence[dict[str, Any]], path: Path, fields: Sequence[str] = FIELDS) -> None:
    """Rows as CSV, written whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(fields), restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = row if isinstance(row, dict) else dataclasses.asdict(row)
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for k, v in values.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.atomic_write_bytes(path, text.getvalue().encode())
