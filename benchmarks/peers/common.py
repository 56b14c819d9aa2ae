"""What every runner shares: its command line, stage timing with peak memory, loading the inputs, writing the result.

Runs in every environment, so it needs only the standard library, numpy, torch and transformers. A runner is started by
the driver as `python run_X.py --inputs DIR --out DIR --threads 2 [--variant NAME]` and leaves `scores.npy`
(`[queries, train]` float32) and `result.json` in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from inputs import DAMPING, SHAPES, Shape

STAGES = ("capture", "covariances", "eigendecomposition", "lambda", "queries", "scores", "other")
"""Stages in the order they run. `capture`: a model pass whose outputs are kept for later stages. `other`: what a
library does between them (writing results, freeing). Loading model and data is `setup`, which is not counted."""


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


class PeakMemory:
    """Peak resident memory since the last reset, in MB: the kernel's high-water mark, reset through `clear_refs`;
    where that is not permitted, the largest of samples taken every 5 ms (`source` says which)."""

    def __init__(self) -> None:
        self.source = "VmHWM"
        self._sampled = 0.0
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.source = "sampled every 5 ms"
            threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, _status_mb("VmRSS"))
            time.sleep(0.005)

    def reset(self) -> None:
        """Start counting anew from what is resident now."""
        if self.source == "VmHWM":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            self._sampled = _status_mb("VmRSS")

    def read(self) -> float:
        """Peak since the last reset, MB."""
        return _status_mb("VmHWM") if self.source == "VmHWM" else max(self._sampled, _status_mb("VmRSS"))


class Recorder:
    """Seconds and peak memory by stage. Stages may nest: time inside an inner stage is not counted for the outer."""

    def __init__(self) -> None:
        self.memory = PeakMemory()
        self.stages: dict[str, dict[str, float]] = {}
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def _close(self) -> None:
        now = time.perf_counter()
        if self._stack:
            entry = self.stages.setdefault(self._stack[-1], {"seconds": 0.0, "peak_mb": 0.0})
            entry["seconds"] += now - self._since
            entry["peak_mb"] = max(entry["peak_mb"], self.memory.read())
        self.memory.reset()
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`."""
        self._close()
        self._stack.append(name)
        try:
            yield
        finally:
            self._close()
            self._stack.pop()

    def switch(self, name: str) -> None:
        """Count what follows, up to the end of the innermost stage, as `name` instead."""
        self._close()
        self._stack[-1] = name

    def wrap(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """Replace `owner.attribute` by itself inside a stage: `name`, or `name(*args, **kwargs)`."""
        inner = getattr(owner, attribute)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name if isinstance(name, str) else name(*args, **kwargs)):
                return inner(*args, **kwargs)

        setattr(owner, attribute, timed)


class Run:
    """One measured run: parsed options, inputs, recorder, and where the result goes."""

    def __init__(self, description: str, variants: tuple[str, ...] = ("default",)) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--inputs", type=Path, required=True)
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--variant", choices=variants, default=variants[0])
        options = parser.parse_args()
        import torch

        torch.set_num_threads(options.threads)
        self.inputs: Path = options.inputs
        self.out: Path = options.out
        self.threads: int = options.threads
        self.variant: str = options.variant
        self.out.mkdir(parents=True, exist_ok=True)
        self.shape: Shape = SHAPES[json.loads((self.inputs / "inputs.json").read_text())["shape"]["name"]]
        self.damping = DAMPING
        self.train = np.load(self.inputs / "train.npy")
        self.queries = np.load(self.inputs / "queries.npy")
        self.recorder = Recorder()

    def model(self, conv1d: str = "keep") -> Any:
        """The model, float32, eval mode. `conv1d="linear"` rewrites GPT-2's Conv1D layers as the equal `nn.Linear`."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.inputs / "model", dtype=torch.float32).eval()
        if conv1d == "linear":
            replace_conv1d(model)
        return model

    def finish(self, scores: Any, library: str, version: str, settings: str, **extra: Any) -> None:
        """Write `scores.npy` and `result.json`; `scores` is `[queries, train]`, or None when the run made none."""
        import torch
        import transformers

        if scores is not None:
            array = np.asarray(scores, dtype=np.float32)
            expected = (len(self.queries), len(self.train))
            if array.shape != expected or not np.isfinite(array).all():
                raise SystemExit(f"{library}: scores of shape {array.shape} (expected {expected}), or not finite")
            np.save(self.out / "scores.npy", array)
        counted = [v for k, v in self.recorder.stages.items() if k != "setup"]
        result = {
            "library": library,
            "variant": self.variant,
            "version": version,
            "settings": settings,
            "stages": self.recorder.stages,
            "total_seconds": sum(v["seconds"] for v in counted),
            "peak_mb": max((v["peak_mb"] for v in counted), default=0.0),
            "peak_source": self.recorder.memory.source,
            "threads": self.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            **extra,
        }
        (self.out / "result.json").write_text(json.dumps(result, indent=1))


def replace_conv1d(model: Any) -> None:
    """Rewrite every Hugging Face Conv1D (`y = x W + b`, W `[d_in, d_out]`) as the equal `nn.Linear`, in place."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                d_in, d_out = child.weight.shape
                linear = torch.nn.Linear(d_in, d_out, dtype=child.weight.dtype)
                linear.weight.data = child.weight.data.t().contiguous()
                linear.bias.data = child.bias.data.clone()
                setattr(parent, name, linear)


def summed_loss(model: Any, ids: Any) -> Any:
    """Next-token cross-entropy, summed over positions and sequences. `ids` `[B, T]`."""
    import torch

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    flat, labels = logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(flat, labels, reduction="sum")
