"""What a run will do before it does it: batches, passes, what fits in memory, and about how long it takes."""

from __future__ import annotations

import functools
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyinf.capture import LayerSelection
from pyinf.errors import ConfigError, ResourceError

__all__ = ["Plan", "available_memory", "make_plan", "matmul_rate", "parse_bytes"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_DEFAULT_SHARE = 0.6
_SIBLINGS = {"qkv": re.compile(r"(q|k|v|query|key|value)(_proj)?"), "gated": re.compile(r"(gate|up)_proj|w1|w3")}
_FIXED_OVERHEAD = 64 << 20


def parse_bytes(value: int | float | str | None) -> int | None:
    """``"2GiB"``, ``"500 MB"`` or a number of bytes → bytes; None stays None.

    Raises:
        ConfigError: not a size.
    """
    if value is None or isinstance(value, int):
        return value
    text = str(value).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        raise ConfigError(f"'{value}' is not a size; write it as 2GiB, 500MB or a number of bytes") from None


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on ``device``: free device memory, or the least of free RAM and the cgroup's
    limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            bound = Path(limit).read_text().strip()
            if bound != "max":
                free.append(int(bound) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    if not free:
        pages = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
        free.append(pages * os.sysconf("SC_PAGE_SIZE") if pages else 4 << 30)
    return max(0, min(free))


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Measured FLOP/s of a square matrix product on ``device``; a few milliseconds."""
    n = 1024 if device.type == "cpu" else 4096
    x = torch.randn(n, n, device=device, dtype=dtype)
    x @ x

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return 2 * n**3 / min(once() for _ in range(3))


@dataclass
class Plan:
    """The plan of a run; :meth:`rows` prints it, ``notes`` say what was decided and why."""

    layers: int
    traced_parameters: int
    total_parameters: int
    train_sequences: int
    train_tokens: int
    queries: int
    token_budget: int | None
    batch_size: int | None
    batches: int
    fit_passes: int
    score_passes: int
    query_block: int
    query_rank: Any
    memory: dict[str, int] = field(default_factory=dict)
    memory_budget: int = 0
    cache_memory: int = 0
    cache_disk: int = 0
    capture_bytes: int = 0
    disk_bytes: int = 0
    score_rotated: bool = False
    query_basis: str | None = None
    flops: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Traced share of the model's parameters."""
        return self.traced_parameters / max(1, self.total_parameters)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, one pair a line."""
        blocks = -(-self.queries // max(1, self.query_block)) if self.queries else 0
        out = [
            (
                "layers traced",
                f"{self.layers} ({100 * self.share:.1f} % of {_count(self.total_parameters)} parameters)",
            ),
            (
                "training set",
                f"{self.train_sequences:,} sequences, {_count(self.train_tokens)} tokens, {self.batches} batches",
            ),
        ]
        if self.queries:
            kept = "dense" if self.query_rank is None else f"rank {self.query_rank}"
            kept += " in one shared basis" if self.query_basis == "shared" else ""
            out.append(("queries", f"{self.queries} in {blocks} block{'s' if blocks != 1 else ''}, kept {kept}"))
        out.append(("passes over the training set", f"{self.fit_passes} to fit, {self.score_passes} to score"))
        memory = ", ".join(f"{k} {_bytes(v)}" for k, v in self.memory.items() if v)
        out.append(("memory", f"{_bytes(sum(self.memory.values()))} of {_bytes(self.memory_budget)} ({memory})"))
        if self.disk_bytes:
            out.append(("disk", _bytes(self.disk_bytes)))
        out.append(("estimated time", _duration(self.seconds)))
        return out

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _count(n: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def _bytes(n: float) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def default_token_budget(device: torch.device) -> int:
    """Padded tokens per batch when neither it nor a batch size was given."""
    return 2048 if device.type == "cpu" else 16384


def make_plan(
    selection: LayerSelection,
    *,
    device: torch.device,
    element_size: int,
    vocabulary: int,
    train_lengths: list[int],
    query_lengths: list[int],
    batches: int,
    token_budget: int | None,
    batch_size: int | None,
    factors: str | None,
    fisher: str,
    fitted: bool,
    query_rank: Any,
    dampings: int,
    solver_rows: int = 0,
    memory_budget: int | None,
    cache: str,
    keep_for_scores: bool,
    disk_free: int | None,
    to_disk: bool,
    blocks: int | None = None,
    own_inputs: bool = False,
    query_basis: str | None = None,
) -> Plan:
    """Decide query blocks and what is captured once, from shapes and free memory.

    ``own_inputs``: every layer has an input factor of its own, also where several read one input. ``query_basis``:
    "shared", queries in one basis of ``query_rank`` (planned as if nothing were cut where that is an energy).

    Raises:
        ResourceError: even one query with an empty cache does not fit, or the disk is too small.
        ConfigError: unknown cache mode.
    """
    if cache not in ("auto", "memory", "disk", "none"):
        raise ConfigError(f"unknown cache '{cache}'; choose auto, memory, disk or none")
    tokens, queries = sum(train_lengths), len(query_lengths)
    wide = 8 if element_size == 8 else 4
    sizes = [(layer.d_out, layer.columns) for layer in selection.layers]
    parameters = sum(o * i for o, i in sizes)
    in_widths = {}
    for layer in selection.layers:
        own = (layer.name, layer.columns)
        in_widths.setdefault(own if own_inputs else _shared_input(*own), layer.columns)
    widths_in, widths_out = sum(in_widths.values()), sum(o for o, _ in sizes)
    free = available_memory(device)
    budget = memory_budget if memory_budget is not None else int(_DEFAULT_SHARE * free)
    largest = max([token_budget or 0, max([*train_lengths, *query_lengths, 1]) * (batch_size or 1)])
    per_token = element_size * (widths_in + widths_out) + vocabulary * max(element_size, 4) * 2
    memory = {"batch": largest * per_token}
    squares = sum(i * i for i in in_widths.values()) + sum(o * o for o, _ in sizes)
    if factors in ("ekfac", "kfac"):
        memory["factors"] = wide * (squares + parameters)
    elif factors == "diagonal":
        memory["factors"] = wide * parameters
    rank_cost = parameters
    if query_basis == "shared":  # cores; moments while the bases are found, bases afterwards
        sides = [(min(query_rank, o), min(query_rank, i)) if isinstance(query_rank, int) else (o, i) for o, i in sizes]
        rank_cost = sum(r * s for r, s in sides)
        memory["query basis"] = wide * sum(o * o + i * i for o, i in sizes)
    elif isinstance(query_rank, int):
        rank_cost = sum(min(query_rank, o, i) * (o + i) for o, i in sizes)
    # A solver works on dense rows: right-hand side, iterate, residual, directions and their products.
    per_query = wide * (rank_cost * max(1, dampings) + solver_rows * parameters)
    plan = Plan(
        layers=len(selection.layers),
        traced_parameters=selection.traced_parameters,
        total_parameters=selection.total_parameters,
        train_sequences=len(train_lengths),
        train_tokens=tokens,
        queries=queries,
        token_budget=token_budget,
        batch_size=batch_size,
        batches=batches,
        fit_passes=0,
        score_passes=0,
        query_block=0,
        query_rank=query_rank,
        query_basis=query_basis,
        memory=memory,
        memory_budget=budget,
    )
    room = budget - sum(memory.values()) - _FIXED_OVERHEAD
    if room < per_query and queries:
        raise ResourceError(
            f"the plan needs {_bytes(sum(memory.values()) + _FIXED_OVERHEAD + per_query)} for one "
            f"query at a time, the budget is "
            f"{_bytes(budget)}; lower the batch size, trace fewer layers (modules=) or set query_rank"
        )
    if not queries and room < 0:
        raise ResourceError(
            f"the plan needs {_bytes(sum(memory.values()) + _FIXED_OVERHEAD)}, the budget is {_bytes(budget)}; "
            "lower the batch size or trace fewer layers (modules=)"
        )
    if queries:
        plan.query_block = max(1, min(queries, room // max(1, per_query)))
        memory["queries"] = plan.query_block * per_query
        plan.score_passes = -(-queries // plan.query_block)
        if plan.score_passes > 1:
            plan.notes.append(
                f"{queries} queries need {_bytes(queries * per_query)}; {plan.query_block} at a "
                f"time, {plan.score_passes} passes "
                "over the training set (a query_rank makes them smaller)"
            )
    plan.fit_passes = 0 if fitted else {"ekfac": 2, "kfac": 1, "diagonal": 1, None: 0}[factors]
    plan.capture_bytes = tokens * element_size * (widths_in + widths_out)
    _choose_cache(plan, cache, fisher, keep_for_scores, budget - sum(memory.values()) - _FIXED_OVERHEAD, disk_free)
    _choose_basis(plan, sizes, squares, factors, query_rank, dampings, fisher == "empirical" and keep_for_scores)
    if to_disk:
        plan.disk_bytes = 2 * memory.get("factors", 0) + 4 * queries * len(train_lengths) + plan.cache_disk
        if disk_free is not None and plan.disk_bytes > disk_free:
            raise ResourceError(
                f"the run writes up to {_bytes(plan.disk_bytes)}, only {_bytes(disk_free)} are "
                f"free; use another directory"
            )
    _estimate_time(plan, sizes, in_widths, device, query_lengths, squares)
    return plan


def _shared_input(name: str, columns: int) -> tuple[str, int]:
    """Key of a layer's input: which layers read one input is not known before the first pass, but these do by their
    names.
    """
    parent, _, own = name.rpartition(".")
    for kind, pattern in _SIBLINGS.items():
        if pattern.fullmatch(own):
            return f"{parent}.{kind}", columns
    return name, columns


def _choose_cache(plan: Plan, cache: str, fisher: str, keep: bool, room: int, disk_free: int | None) -> None:
    uses = (plan.fit_passes + (plan.score_passes if keep else 0)) if fisher == "empirical" else plan.fit_passes
    shared = "covariances, Λ and scores" if fisher == "empirical" and keep else "covariances and Λ"
    if cache == "none" or uses < 2:
        if uses >= 2:
            plan.notes.append("the model runs again for every stage (cache='none')")
        return
    if cache in ("auto", "memory"):
        plan.cache_memory = max(0, min(plan.capture_bytes, room))
    if cache == "disk":
        plan.cache_disk = min(plan.capture_bytes, int(0.5 * (disk_free or 0)))
    kept = plan.cache_memory + plan.cache_disk
    plan.memory["captured"] = plan.cache_memory
    share = kept / max(1, plan.capture_bytes)
    if share >= 1:
        where = "memory" if plan.cache_memory else "scratch files"
        plan.notes.append(
            f"what the layers see ({_bytes(plan.capture_bytes)}) stays in {where}: one model pass serves {shared}"
        )
    elif kept:
        plan.notes.append(
            f"{100 * share:.0f} % of what the layers see ({_bytes(plan.capture_bytes)}) is kept for "
            f"{shared}; the rest is run again"
        )
    else:
        plan.notes.append(
            f"what the layers see ({_bytes(plan.capture_bytes)}) does not fit; the model runs again for every stage"
        )


def _choose_basis(
    plan: Plan, sizes: list[tuple[int, int]], squares: int, factors: str | None, rank: Any, dampings: int, reuse: bool
) -> None:
    """Rotate the queries back, or meet the training set in the eigenbases: whichever has fewer FLOPs.

    Back: ``2·d_out·d_in(d_out + d_in)`` a query and layer. There: ``2(d_in² + d_out²)`` a training token and layer,
    nothing
    for tokens that the Λ pass left rotated in the cache.
    """
    if factors not in ("ekfac", "kfac") or rank is not None or not plan.queries:
        return
    kept = min(1.0, plan.cache_memory / max(1, plan.capture_bytes)) if reuse and factors == "ekfac" else 0.0
    back = 2.0 * plan.queries * max(1, dampings) * sum(o * i * (o + i) for o, i in sizes)
    there = 2.0 * (1.0 - kept) * plan.train_tokens * plan.score_passes * squares
    plan.score_rotated = there < back
    if plan.score_rotated:
        plan.notes.append(
            "scores are formed in the eigenbases: rotating the training side costs less than rotating the queries back"
        )


def _estimate_time(
    plan: Plan,
    sizes: list[tuple[int, int]],
    in_widths: dict,
    device: torch.device,
    query_lengths: list[int],
    squares: int,
) -> None:
    share = 1 - (plan.cache_memory + plan.cache_disk) / max(1, plan.capture_bytes)
    parameters = sum(o * i for o, i in sizes)
    passes = plan.fit_passes + plan.score_passes
    model_passes = 1 + share * (passes - 1) if passes else 0
    flops = {"model": 4.0 * plan.total_parameters * plan.train_tokens * model_passes}
    flops["queries"] = 6.0 * plan.total_parameters * sum(query_lengths)
    if plan.fit_passes:
        flops["covariances"] = float(squares * plan.train_tokens)
        flops["eigendecomposition"] = 9.0 * (sum(i**3 for i in in_widths.values()) + sum(o**3 for o, _ in sizes))
    if plan.fit_passes == 2:
        flops["lambda"] = 2.0 * plan.train_tokens * (squares + parameters)
    if plan.queries:
        flops["queries"] += 2.0 * plan.queries * sum(o * i * (o + i) for o, i in sizes) * bool(plan.fit_passes)
        per_token = per_pair = float(parameters)
        if plan.query_basis == "shared" and isinstance(plan.query_rank, int):
            sides = [(min(plan.query_rank, o), min(plan.query_rank, i)) for o, i in sizes]
            per_pair = float(sum(r * s for r, s in sides))
            per_token = per_pair + sum(r * o + s * i for (r, s), (o, i) in zip(sides, sizes, strict=True))
        flops["scores"] = 2.0 * per_token * plan.train_tokens * plan.score_passes
        flops["scores"] += 2.0 * per_pair * plan.queries * plan.train_sequences
    plan.flops = flops
    plan.seconds = sum(flops.values()) / (0.6 * matmul_rate(device))
