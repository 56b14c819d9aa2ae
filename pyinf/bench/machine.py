"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from pyinf._version import __version__

__all__ = ["card_name", "facts", "folder_name", "processor"]


def processor() -> str:
    """Name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def card_name(device: torch.device) -> str:
    """Name of the device: the card's, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def folder_name(device: torch.device) -> str:
    """The device's name in letters that any file system takes: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", card_name(device).lower()).strip("-") if device.type == "cuda" else "cpu"


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def facts(device: torch.device) -> dict[str, Any]:
    """Versions, the device and its sizes, the build of the extension."""
    found: dict[str, Any] = {
        "pyinf": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": card_name(device),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    try:
        from pyinf import _C

        found["extension"] = _C.build_config()
    except ImportError as error:
        found["extension"] = f"not loaded: {error}"
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _driver(),
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": int(getattr(p, "L2_cache_size", 0)),
        }
    return found
