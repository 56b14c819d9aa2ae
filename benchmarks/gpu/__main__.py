"""``python -m benchmarks.gpu``: every part, or ``--dry-run``, or ``--collect FOLDER`` for what came back."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import ROOT, locate_kernels
from benchmarks.gpu.options import Options


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    Options.add_to(parser)
    parser.add_argument("--out", type=Path, help="folder of results (default benchmarks/results/gpu/<card>)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--dry-run", action="store_true", help="list the parts, their time and what they need")
    parser.add_argument("--again", action="store_true", help="run parts that are complete already")
    parser.add_argument("--total", type=float, help="seconds for everything")
    parser.add_argument(
        "--collect", type=Path, metavar="FOLDER", help="tables, summary and verified.json of a finished run"
    )
    given = parser.parse_args(arguments)
    locate_kernels()
    from benchmarks.gpu import collect, run
    from benchmarks.gpu.parts import PARTS

    if given.collect is not None:
        for path in collect.tables(given.collect):
            print(f"wrote {path}")
        collect.write_verified(given.collect)
        (given.collect / "summary.md").write_text(collect.summarise(given.collect), encoding="utf-8")
        print(f"merged into {collect.merge_verified(given.collect)}")
        return 0
    unknown = sorted(set(given.only or []) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are: {', '.join(PARTS)}")
    names = given.only or list(PARTS)
    total = given.total or run.TOTAL
    if given.dry_run:
        print(dry_run(names, total))
        return 0
    if given.device.startswith("cuda") and run.capability() is None:
        parser.error("nvidia-smi names no card here; --device cpu --tiny rehearses without one")
    out = given.out or ROOT / "benchmarks" / "results" / "gpu" / folder(given.device)
    return run.run_all(Options(given.device, out.resolve(), given.tiny), names, total, given.again)


def folder(device: str) -> str:
    """Name of the card, asked in a process of its own."""
    code = (
        "import sys; from pyinf.bench.machine import folder_name; from pyinf.bench.timing import resolve_device; "
        "print('NAME ' + folder_name(resolve_device(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, device], cwd=ROOT, capture_output=True, text=True, timeout=120)
    for line in done.stdout.splitlines():
        if line.startswith("NAME "):
            return line[5:]
    raise SystemExit(f"torch does not see {device}: {done.stderr.strip()[-500:]}")


def dry_run(names: list[str], total: float) -> str:
    """Every part with its time, what it does and what it needs."""
    from benchmarks.gpu.parts import PARTS

    chosen = [PARTS[n] for n in PARTS if n in names]
    lines = []
    for part in chosen:
        lines.append(f"{part.name:12} {part.seconds:4} s  {part.what}")
        lines.append(f"{'':19} needs: {part.needs}; {part.workers} at a time, {part.limit} s an item at most")
    lines.append(
        f"{'all':12} {sum(p.seconds for p in chosen):4} s of {total:.0f}; what a part leaves goes to later ones"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
