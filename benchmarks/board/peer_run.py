"""What the peers' runners share: their command line, stage times, the inputs, the results.

Runs in the peers' own environments, so it needs only the standard library, numpy, torch and transformers (and
`benchmarks/peers/common.py`, found through PYTHONPATH).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import Recorder


class PeerRun:
    """One run of a peer: `--inputs DIR` (model, train.npy, queries.npy), `--out DIR`, `--dampings 0.01 0.1`.

    Leaves `scores_0.npy`, `scores_1.npy`, … (`[queries, train]`, one a damping) and `result.json` in DIR. Seconds are
    of everything but the stage `setup` (loading model and data), as for the other libraries.
    """

    def __init__(self, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--inputs", type=Path, required=True)
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--dampings", type=float, nargs="+", required=True)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--steps", type=int, default=0)
        parser.add_argument("--documents", type=int, default=256)
        options = parser.parse_args()
        import torch

        torch.set_num_threads(options.threads)
        self.inputs, self.out, self.dampings = options.inputs, options.out, options.dampings
        self.steps, self.documents = options.steps, options.documents
        self.out.mkdir(parents=True, exist_ok=True)
        self.train = np.load(self.inputs / "train.npy")
        self.queries = np.load(self.inputs / "queries.npy")
        self.recorder = Recorder()

    def finish(self, scores: list[Any], library: str, version: str, settings: str) -> None:
        """Write the matrices and the result."""
        for number, values in enumerate(scores):
            array = np.asarray(values, dtype=np.float64)
            if array.shape != (len(self.queries), len(self.train)) or not np.isfinite(array).all():
                raise SystemExit(f"{library}: scores of shape {array.shape}, or not finite")
            np.save(self.out / f"scores_{number}.npy", array)
        counted = [v for k, v in self.recorder.stages.items() if k != "setup"]
        result = {
            "library": library,
            "version": version,
            "settings": settings,
            "stages": self.recorder.stages,
            "seconds": sum(v["seconds"] for v in counted),
            "peak_mb": max(v["peak_mb"] for v in counted),
        }
        (self.out / "result.json").write_text(json.dumps(result, indent=1))
