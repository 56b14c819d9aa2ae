"""The scan of one-bit rows against FAISS: the same rows, queries and answer, and what the memory can deliver.

python -m benchmarks.scan [--rows 1000000] [--width 16384] [--queries 100] [--k 100] [--threads 2] [--repeats 3]
                          [--out benchmarks/results/scan]

Rows are random bits, so that nothing can be skipped. ``pyinf.ops.scan_topk`` ("1bit"), ``faiss.IndexBinaryFlat`` and,
on a slice of the rows, ``faiss.IndexFlatIP`` over their ±1 as float32 find the k best of every query. Values are
compared before a time is printed: all must be equal, and every row named must have its value. Also the time to read the
rows once (the sum of their 64-bit words, all threads): no scan of a store larger than the cache can be faster.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from pyinf import ops
from pyinf.bench.machine import facts

RESULT = Path(__file__).parent / "results" / "scan"


def timed(function: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Seconds of every repetition, and the last answer."""
    seconds, found = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        found = function()
        seconds.append(time.perf_counter() - started)
    return seconds, found


def random_bits(rows: int, width: int, seed: int) -> np.ndarray:
    """Uniform bits ``[rows, width / 8]``."""
    return np.random.Generator(np.random.SFC64(seed)).integers(0, 256, (rows, width // 8), np.uint8)


def check(
    name: str,
    values: np.ndarray,
    index: np.ndarray,
    wanted: np.ndarray,
    bits: np.ndarray,
    rows: np.ndarray,
    width: int,
) -> None:
    """Values equal to ``wanted``, and every named row has the value it is named with. Raises SystemExit otherwise."""
    if not np.array_equal(values, wanted):
        raise SystemExit(f"{name}: values differ from pyinf's; no speed is printed")
    for q in range(len(values)):
        differing = np.unpackbits(bits[q] ^ rows[index[q]], axis=1).sum(1, dtype=np.int64)
        if not np.array_equal(width - 2 * differing, values[q]) or len(set(index[q].tolist())) != len(index[q]):
            raise SystemExit(f"{name}: a row of query {q} has another value than it says; no speed is printed")


def faiss_binary(rows: np.ndarray, bits: np.ndarray, k: int, repeats: int) -> tuple[list[float], Any]:
    """Seconds and answer of ``IndexBinaryFlat``; it copies the rows, and gives them back at the end."""
    index = faiss.IndexBinaryFlat(rows.shape[1] * 8)
    index.add(rows)
    return timed(lambda: index.search(bits, k), repeats)


def read_once(rows: np.ndarray, repeats: int) -> list[float]:
    """Seconds to read every byte once, in all threads."""
    words = torch.from_numpy(rows).view(torch.int64).view(-1)
    return timed(lambda: words.sum(), repeats)[0]


def main() -> None:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=16_384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--float-rows", type=int, default=20_000, help="rows of the float32 slice")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    rows, bits = random_bits(args.rows, args.width, 0), random_bits(args.queries, args.width, 1)
    gigabytes = rows.nbytes / 1e9

    packed, asked = torch.from_numpy(rows), torch.from_numpy(bits)
    with ops.use_backend("cpu"):
        ours, (values, index) = timed(lambda: ops.scan_topk(asked, packed, args.k, "1bit"), args.repeats)
    theirs, (distances, named) = faiss_binary(rows, bits, args.k, args.repeats)
    with ops.use_backend("cpu"):
        ours += timed(lambda: ops.scan_topk(asked, packed, args.k, "1bit"), args.repeats)[0]
    # before and after, so that a slower moment of the machine does not fall on one of the two
    check("pyinf", values.numpy(), index.numpy(), values.numpy(), bits, rows, args.width)
    check("faiss.IndexBinaryFlat", args.width - 2.0 * distances, named, values.numpy(), bits, rows, args.width)
    bandwidth = read_once(rows, args.repeats)

    part = min(args.float_rows, args.rows)
    signs = 1 - 2 * np.unpackbits(rows[:part], axis=1, bitorder="little").astype(np.float32)
    query_signs = 1 - 2 * np.unpackbits(bits, axis=1, bitorder="little").astype(np.float32)
    slice_index = faiss.IndexFlatIP(args.width)
    slice_index.add(signs)
    floats, (scores, named) = timed(lambda: slice_index.search(query_signs, min(args.k, part)), args.repeats)
    expected = ops.scan_topk(asked, packed[:part], min(args.k, part), "1bit")[0].numpy()
    check("faiss.IndexFlatIP", scores, named, expected, bits, rows, args.width)

    middle, faiss_middle, read_middle, float_middle = map(statistics.median, (ours, theirs, bandwidth, floats))
    table = [
        row("pyinf.ops.scan_topk, 1bit", args.rows, ours, gigabytes, middle),
        row("faiss.IndexBinaryFlat", args.rows, theirs, gigabytes, middle),
        row("one read of the rows", args.rows, bandwidth, gigabytes, middle),
        row("faiss.IndexFlatIP, float32, a slice", part, floats, signs.nbytes / 1e9, None),
    ]
    result = {
        "machine": facts(torch.device("cpu")),
        "faiss": faiss.__version__,
        "faiss_compiled": faiss.get_compile_options().strip(),
        "backend": "cpu",
        "threads": args.threads,
        "shape": {"rows": args.rows, "width": args.width, "queries": args.queries, "k": args.k},
        "times": table,
        "ratio_to_faiss_binary": faiss_middle / middle,
        "share_of_one_read": read_middle / middle,
        "faiss_flat_float_extrapolated_seconds": float_middle * args.rows / part,
        "values": "equal to the last bit; every named row recounted",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scan.json").write_text(json.dumps(result, indent=1) + "\n")
    with open(args.out / "scan.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, table[0])
        writer.writeheader()
        writer.writerows(table)
    for line in table:
        rate = f"{line['gigabytes_per_second']:7.2f} GB/s"
        print(f"{line['what']:38} {line['rows']:>9} rows  {line['seconds']:8.3f} s  {rate}")
    ratio, reads = faiss_middle / middle, middle / read_middle
    print(f"pyinf is {ratio:.2f} times as fast as faiss.IndexBinaryFlat and takes as long as {reads:.1f} reads")


def row(what: str, rows: int, seconds: list[float], gigabytes: float, ours: float | None) -> dict[str, Any]:
    """One line of the table: median, shortest and longest time, rate, ratio to pyinf's median."""
    middle = statistics.median(seconds)
    return {
        "what": what,
        "rows": rows,
        "seconds": round(middle, 5),
        "shortest": round(min(seconds), 5),
        "longest": round(max(seconds), 5),
        "repeats": len(seconds),
        "gigabytes_per_second": round(gigabytes / middle, 3),
        "times_pyinf": "" if ours is None else round(middle / ours, 3),
    }


if __name__ == "__main__":
    main()
