"""One worker process: ``python -m benchmarks.gpu.worker PART --shard SHARD --journal FILE --deadline T ...``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu import locate_kernels
from benchmarks.gpu.journal import Journal, work
from benchmarks.gpu.options import Options


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--shard", default="all")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    Options.add_to(parser)
    given = parser.parse_args(arguments)
    locate_kernels()
    from benchmarks.gpu.parts import PARTS

    options = Options(given.device, given.out, given.tiny)
    items = PARTS[given.part].items
    assert items is not None, f"{given.part} has no worker"

    def healthy() -> None:
        if options.gpu:
            import torch

            torch.cuda.synchronize()

    return work(items(given.shard, options), Journal(given.journal), given.deadline, healthy)


if __name__ == "__main__":
    sys.exit(main())
