"""How long a call takes: CUDA events on a GPU, the wall clock on a CPU, medians of many calls on changing inputs.

Before every timed call on a GPU the second-level cache is overwritten; that work also keeps the GPU busy while the
host prepares the call, so that a launch waits for nothing but itself. On a CPU the calls go through several copies of
the inputs instead.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyinf.errors import ConfigError

__all__ = ["Clock", "Timing", "ceilings", "copies_needed", "resolve_device"]

_CPU_CACHE = 64 << 20  # bytes that all copies of the inputs together should exceed


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles of ``runs`` calls."""

    median: float
    low: float
    high: float
    runs: int

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return (self.high - self.low) / (2 * self.median) if self.median else 0.0


def _summary(seconds: Sequence[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], len(seconds))
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds))


def copies_needed(size: int, device: torch.device, limit: int = 4) -> int:
    """How many sets of inputs of ``size`` bytes to rotate through, so that together they do not fit in the cache."""
    cache = _CPU_CACHE
    if device.type == "cuda":
        cache = 3 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20))
    return max(1, min(limit, -(-cache // max(size, 1))))


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = 4 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
            self._flush = torch.empty(max(size, 256 << 20) // 4, dtype=torch.int32, device=device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(
        self,
        calls: Sequence[Callable[[], Any]],
        seconds: float = 0.3,
        least: int = 5,
        most: int = 200,
        warmup: int = 2,
    ) -> Timing:
        """Time ``calls`` in turn (the same work on different inputs) for about ``seconds``, after ``warmup`` calls.

        At least ``least`` calls are timed, fewer only where one call alone takes longer than ``seconds``.
        """
        self.synchronize()
        started = time.perf_counter()
        for i in range(max(1, warmup)):
            calls[i % len(calls)]()
        self.synchronize()
        one = (time.perf_counter() - started) / max(1, warmup)
        if self.device.type == "cuda":  # the first call compiles and loads: look again
            started = time.perf_counter()
            calls[0]()
            self.synchronize()
            one = time.perf_counter() - started
        count = int(min(most, max(least if one < seconds else 2, seconds / max(one, 1e-7))))
        return self._events(calls, count) if self.device.type == "cuda" else self._wall(calls, count)

    def _wall(self, calls: Sequence[Callable[[], Any]], count: int) -> Timing:
        seconds = []
        for i in range(count):
            begun = time.perf_counter()
            calls[i % len(calls)]()
            seconds.append(time.perf_counter() - begun)
        return _summary(seconds)

    def _events(self, calls: Sequence[Callable[[], Any]], count: int) -> Timing:
        assert self._flush is not None
        with torch.cuda.device(self.device):
            pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
            for i, (begin, end) in enumerate(pairs):
                self._flush.zero_()
                begin.record()
                calls[i % len(calls)]()
                end.record()
            torch.cuda.synchronize(self.device)
            return _summary([begin.elapsed_time(end) / 1e3 for begin, end in pairs])


def ceilings(
    clock: Clock, size: int | None = None, seconds: float = 0.3, dtypes: Sequence[str] | None = None
) -> dict[str, float]:
    """What this device reaches through torch: ``copy`` in bytes/s (read plus written) and products in operations/s.

    Products of two random square matrices in bfloat16, float16, tf32 and float32, and a copy of a large tensor. On a
    CPU the sizes are small and tf32 is left out. ``size`` overrides the side of the matrices, ``dtypes`` (names of
    ``verify.DTYPES``) says which products are of interest; None is all of them.
    """
    device = clock.device
    gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    count = (1 << 28 if gpu else 1 << 24) if size is None else max(size * size, 1 << 12)
    source = torch.randn(count, generator=generator, device=device)
    target = torch.empty_like(source)
    found = {"copy": 8.0 * count / clock.measure([functools.partial(target.copy_, source)], seconds).median}
    del source, target
    before = torch.get_float32_matmul_precision()
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
    for name, dtype in kinds.items():
        if (name == "tf32" and not gpu) or (dtypes is not None and not any(name in d for d in dtypes)):
            continue
        side = size or (8192 if gpu else 512 if dtype == torch.float32 else 256)
        x, y = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        try:
            found[name] = 2.0 * side**3 / clock.measure([lambda x=x, y=y: x @ y], seconds).median
        finally:
            torch.set_float32_matmul_precision(before)
    return found


def resolve_device(name: str) -> torch.device:
    """``auto`` (a GPU where torch sees one), ``cpu``, ``cuda`` or ``cuda:N``. Raises ``ConfigError``."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name!r}: torch sees no CUDA device; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", device.index or 0)
    return device
