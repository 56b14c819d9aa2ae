"""What building a store costs: seconds over the bare pass at GPT-2 small's shape, and peak memory for N and 2N.

    python -m benchmarks.store_build [--threads 1] [--sequences 8] [--length 128] [--repeats 3]

*Overhead.* The bare pass is forward and backward over the same batches with the same hooks on the same layers (frozen
weights), handing what it captured to nobody. A build is `build_store`: rows made, packed and written, the model's and
the data's fingerprints and all checksums included. Both are run in turn, `--repeats` times: the median of the single
ratios, and all of them. What does not grow with the data (the fingerprint of the weights, most of it) is measured on
one sequence, build minus pass, and `overhead_without_fixed` leaves it out. The weights are random: they do not change
the time. Nothing is estimated from the rows (`curvature="none"`): that grows with the rows' width, not with the pass.

*Memory.* Each build in a process of its own; the peak of its resident memory (VmHWM), reset before the build, minus
what was held then.

Results: `benchmarks/results/store/store_build.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pyinf
from pyinf import artifacts
from pyinf.capture import Consumer, PassSource, TracingSession
from pyinf.store.build import build_store

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "store"

# name -> method, options, format
BUILDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "logra-16": ("logra", {"rank": 16, "curvature": "none"}, "bfloat16"),
    "logra-32": ("logra", {"rank": 32, "curvature": "none"}, "bfloat16"),
    "logra-64": ("logra", {"rank": 64, "curvature": "none"}, "bfloat16"),
    "logra-64-1bit": ("logra", {"rank": 64, "curvature": "none"}, "1bit"),
}


class _Nobody(Consumer):
    def consume(self, *_: Any) -> None:
        """Take one layer of one batch."""


def gpt2_small() -> Any:
    """GPT-2 small's shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def llama(width: int = 64) -> Any:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def data(count: int, length: int, vocabulary: int) -> list[dict[str, Any]]:
    """Random tokens."""
    ids = torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row} for row in ids]


def bare(attributor: Any, train: list[dict[str, Any]], batch_size: int) -> float:
    """Seconds of the pass alone."""
    with attributor._placed(), attributor._backend():
        prepared = attributor._prepare(train, "train")
        rig = attributor._run.rig(attributor._make_plan(prepared, None, batch_size))
        started = time.perf_counter()
        with TracingSession(rig.model, rig.selection, rig.task, rig.groups) as session:
            PassSource(session, prepared, rig.batches(prepared)).run(lambda *_: _Nobody(), "train", "bare pass")
        return time.perf_counter() - started


def build(attributor: Any, train: list[dict[str, Any]], format: str, options: argparse.Namespace) -> tuple[float, int]:
    """Seconds of a build, and the bytes of a row."""
    directory = Path(tempfile.mkdtemp(dir=options.work))
    started = time.perf_counter()
    store = build_store(attributor, train, directory / "store", format, batch_size=options.batch_size)
    seconds = time.perf_counter() - started
    shutil.rmtree(directory)
    return seconds, store.spec.row_bytes


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a build."""
    model, train = gpt2_small(), data(options.sequences, options.length, 50257)
    out = []
    for name in options.builds:
        method, settings, format = BUILDS[name]
        attributor = pyinf.Attributor(model, method, certify=False, **settings)
        bare(attributor, train[: options.batch_size], options.batch_size)  # warm up
        pairs, one, size = [], [], 0
        for _ in range(options.repeats):
            for rows, times in ((train, pairs), (train[:1], one)):
                seconds = bare(attributor, rows, options.batch_size)
                built, size = build(attributor, rows, format, options)
                times.append((seconds, built))
        fixed = statistics.median(b - p for p, b in one)
        row = {
            "build": name,
            "bytes_a_row": size,
            "bare_seconds": statistics.median(p for p, _ in pairs),
            "build_seconds": statistics.median(b for _, b in pairs),
            "fixed_seconds": fixed,
            "overhead": statistics.median(b / p - 1 for p, b in pairs),
            "overhead_without_fixed": statistics.median((b - fixed) / p - 1 for p, b in pairs),
            "overheads": [round(b / p - 1, 4) for p, b in pairs],
            "overheads_without_fixed": [round((b - fixed) / p - 1, 4) for p, b in pairs],
        }
        print(json.dumps(row), flush=True)
        out.append(row)
    return out


def one_build(count: int, work: Path) -> dict[str, Any]:
    """In a process of its own: the peak over what was held before the build."""
    from pyinf.evaluate.board import measured

    model, train = llama(), data(count, 32, 512)
    attributor = pyinf.Attributor(model, "logra", rank=32, curvature="raw", certify=False)
    build_store(attributor, train[:64], work / "warm", "bfloat16")
    status = Path("/proc/self/status").read_text()
    held = int(next(x for x in status.splitlines() if x.startswith("VmRSS:")).split()[1]) / 1024
    store, seconds, peak = measured(lambda: build_store(attributor, train, work / "store", "bfloat16"))
    return {
        "sequences": count,
        "store_mb": store.nbytes / 2**20,
        "peak_mb": peak,
        "held_before_mb": held,
        "build_mb": None if peak is None else peak - held,
        "seconds": seconds,
    }


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """N and 2N sequences."""
    out = []
    for count in (options.memory, 2 * options.memory):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            command = [sys.executable, "-m", "benchmarks.store_build", "--one", str(count), "--work", folder]
            found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        out.append(json.loads(found.strip().splitlines()[-1]))
        print(json.dumps(out[-1]), flush=True)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="where stores are made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--builds", nargs="+", default=list(BUILDS), choices=list(BUILDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, default=4000, help="N of the memory test; 0: none")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(one_build(options.one, options.work)))
        return
    content: dict[str, Any] = {
        "model": "GPT-2 small's shape, random weights",
        "sequences": options.sequences,
        "tokens_a_sequence": options.length,
        "threads": options.threads,
        "overhead": overhead(options),
        "memory": memory(options) if options.memory else [],
        "machine": {"cpu": platform.machine(), "python": platform.python_version(), "torch": torch.__version__},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    artifacts.atomic_write_json(options.out / "store_build.json", content)


if __name__ == "__main__":
    main()
