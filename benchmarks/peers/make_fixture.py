"""Make the committed fixtures: kronfluence's scores of the two tiny models, with the weights and tokens they belong to.

    python benchmarks/peers/envs.py kronfluence
    python benchmarks/peers/make_fixture.py tests/peers/fixtures

One safetensors file a model: `weight.*` (its state dict, float32), `train` and `queries` (ids), `scores`
(`[queries, train]`, as the library wrote them); the metadata holds the model's configuration, the damping, and the
versions. Weights are in the file because a seed does not draw the same numbers in every torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from envs import make
from inputs import DAMPING, SHAPES, make_inputs
from safetensors.torch import load_file, save_file


def make_fixture(name: str, folder: Path) -> Path:
    """Run kronfluence on the tiny shape `name` in its environment and write the fixture. Returns its path."""
    python = make("kronfluence")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_inputs(SHAPES[name], work / "inputs")
        runner = Path(__file__).with_name("run_kronfluence.py")
        command = [str(python), str(runner), "--inputs", str(work / "inputs"), "--out", str(work / "out")]
        subprocess.run(command, check=True, stdout=sys.stderr)
        result = json.loads((work / "out" / "result.json").read_text())
        model = load_file(work / "inputs" / "model" / "model.safetensors")
        tensors = {f"weight.{key}": value.contiguous() for key, value in model.items()}
        tensors |= {
            "train": torch.from_numpy(np.load(work / "inputs" / "train.npy")).to(torch.int16),
            "queries": torch.from_numpy(np.load(work / "inputs" / "queries.npy")).to(torch.int16),
            "scores": torch.from_numpy(np.load(work / "out" / "scores.npy")),
        }
        metadata = {
            "config": (work / "inputs" / "model" / "config.json").read_text(),
            "damping": str(DAMPING),
            "tracked": json.dumps(SHAPES[name].tracked()),
            "kronfluence": result["version"],
            "torch": result["torch"],
            "transformers": result["transformers"],
        }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kronfluence-{result['version']}-{name}.safetensors"
    save_file(tensors, path, metadata)
    path.chmod(0o644)
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the fixtures of tests/peers.")
    parser.add_argument("folder", type=Path)
    for name in ("tiny", "tiny_gpt2"):
        path = make_fixture(name, parser.parse_args().folder)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
