"""Which tile sizes a Triton kernel takes: the table decides; with ``PYINF_AUTOTUNE=1`` a measurement, kept on disk.

Measured are the configurations that the kernel's table holds for the card, all of which the ahead-of-time gate has
compiled. The choice is kept in ``$PYINF_CACHE/triton_tuning.json`` (default ``~/.cache/pyinf``) for each card, version
of pyinf and version of Triton, and used again without measuring, as long as the variable is set.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyinf._version import __version__
from pyinf.artifacts import atomic_write_json
from pyinf.ops.verified import user_file

if TYPE_CHECKING:
    from pyinf.triton_kernels.configs import Config

__all__ = ["enabled", "tuned", "tuning_file"]

_REPEATS = 5
_known: dict[tuple[str, str, str], str] = {}


def tuning_file() -> Path:
    """Where choices are kept."""
    return user_file().with_name("triton_tuning.json")


def enabled(device: torch.device) -> bool:
    """Whether ``PYINF_AUTOTUNE=1`` is set and calls on this device can be timed: not while a CUDA graph is captured."""
    asked = os.environ.get("PYINF_AUTOTUNE", "0") == "1"
    return asked and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _card(device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)} | {__version__} | triton {triton.__version__}"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(tuning_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """Median time of one call on the current stream of ``device``, after two calls that compile and warm up."""
    call()
    call()
    times = []
    for _ in range(_REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        call()
        stop.record(torch.cuda.current_stream(device))
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def tuned(
    op: str,
    key: str,
    default: Config,
    candidates: Iterable[Config],
    run_with: Callable[[Config], None],
    device: torch.device,
    card: Callable[[torch.device], str] = _card,
    seconds: Callable[[Callable[[], None], torch.device], float] = _seconds,
) -> Config:
    """The fastest of ``default`` and ``candidates`` for calls that ``key`` describes: ask only where :func:`enabled`.

    ``run_with(config)`` runs the op once with that configuration on buffers that nobody reads. A configuration that the
    card has no room for is left out; without any that runs, the default is taken and nothing is remembered. ``card``
    and ``seconds`` are there to be replaced in tests.
    """
    by_name = {config.name: config for config in (default, *candidates)}
    where = (card(device), op, key)
    if where not in _known:
        name = _read().get(where[0], {}).get(op, {}).get(key)
        if name in by_name:
            _known[where] = name
    if where not in _known:
        best = _measure(by_name, run_with, device, seconds)
        if best is None:
            return default
        _known[where] = best
        found = _read()
        found.setdefault(where[0], {}).setdefault(op, {})[key] = best
        tuning_file().parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(tuning_file(), found)
    return by_name.get(_known[where], default)


def _measure(
    by_name: dict[str, Config],
    run_with: Callable[[Config], None],
    device: torch.device,
    seconds: Callable[[Callable[[], None], torch.device], float],
) -> str | None:
    from triton.runtime.errors import OutOfResources

    times = {}
    for name, config in by_name.items():
        try:
            times[name] = seconds(lambda config=config: run_with(config), device)
        except OutOfResources:
            continue
    return min(times, key=times.__getitem__) if times else None
