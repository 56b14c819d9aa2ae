"""Build the bank, run the rows, write the table and the plot.

    python -m benchmarks.board --bank-only                 # the retrainings, resumable
    python -m benchmarks.board --only ekfac kfac           # some rows; each in a process of its own, resumable
    python -m benchmarks.board                             # all of it
    python -m benchmarks.board --time --only ekfac         # seconds and memory of a finished row again
    python -m benchmarks.board --report                    # the table and the plot from the rows that are there

Rows of other libraries run in their own environments (`python benchmarks/peers/envs.py kronfluence bergson`). The
damping of every method is chosen on the bank's tuning queries, which are not reported. Results:
`benchmarks/results/board/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.board.rows import ITERATIONS, ROWS, Row
from benchmarks.peers.envs import python_of
from pyinf import artifacts, evaluate
from pyinf.cli._terminal import Screen
from pyinf.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "board"
BASELINE = "ekfac"  # what every row is compared with, query by query


class Scored(dict):
    """Scores by damping, with the seconds and memory that a runner measured itself."""

    seconds: float
    peak_mb: float


def open_bank(options: argparse.Namespace) -> evaluate.Bank:
    """The bank, with its base model made and its data read."""
    return evaluate.Bank(options.work / f"bank-{options.protocol}", evaluate.ready_protocol(options.protocol))


def build_bank(bank: evaluate.Bank, options: argparse.Namespace) -> None:
    """Every retraining that does not depend on a score matrix."""
    n = bank.protocol.train_size
    plan = evaluate.full(n, (0,), 2)
    plan += evaluate.half_subsets(n, options.half)
    plan += evaluate.half_subsets(n, options.other_seed, seed=1)
    plan += evaluate.half_subsets(n, 2, repeats=2)
    if options.removals:
        plan += evaluate.random_removals(n, options.removals)
    bank.build(plan, options.workers)


def peer_scorer(bank: evaluate.Bank, row: Row, folder: Path) -> Any:
    """A row of another library as a scorer: its runner in its own environment."""
    inputs = bank.directory.parent / "peer-inputs"

    def run(queries: list[Any], train: list[Any], dampings: Sequence[float]) -> Scored:
        python = python_of(row.library)
        if not python.exists():
            raise ConfigError(
                f"no environment of {row.library}; make it: python benchmarks/peers/envs.py {row.library}"
            )
        inputs.mkdir(parents=True, exist_ok=True)
        link = inputs / "model"
        if not link.exists():
            link.symlink_to((bank.directory / "model").resolve())
        for name, rows in (("train", train), ("queries", queries)):
            np.save(inputs / f"{name}.npy", np.stack([r["input_ids"].numpy() for r in rows]))
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            source, target = bank.directory / "base" / "model" / name, bank.directory / "model" / name
            if source.exists() and not target.exists():  # one of the peers refuses to start without a tokenizer
                target.write_bytes(source.read_bytes())
        here = Path(__file__).parent
        command = [
            str(python),
            str(here / f"peer_{row.library}.py"),
            "--inputs",
            str(inputs),
            "--out",
            str(folder / "peer"),
        ]
        command += ["--dampings", *(str(d) for d in dampings)]
        for name in ("steps", "documents"):
            command += [f"--{name}", str(row.options[name])] if name in row.options else []
        paths = os.pathsep.join([str(here), str(here.parent / "peers")])
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"})
        found = Scored({d: np.load(folder / "peer" / f"scores_{k}.npy") for k, d in enumerate(dampings)})
        result = json.loads((folder / "peer" / "result.json").read_text())
        found.seconds, found.peak_mb = result["seconds"], result["peak_mb"]
        return found

    return run


def run_row(name: str, options: argparse.Namespace) -> None:
    """One row, in this process."""
    from pyinf.cli.evaluate import bank_model, scorer

    bank, row, folder = open_bank(options), ROWS[name], options.work / f"rows-{options.protocol}" / name
    own = row.library == "pyinf"
    score = scorer(bank_model(bank), row.method, **row.options) if own else peer_scorer(bank, row, folder)
    if options.time:
        print({name: evaluate.time_row(bank, score, folder)}, flush=True)
        return
    evaluate.run_row(
        bank, name, score, folder, row.dampings, options.remove or None, options.controls, options.workers, row.about()
    )


def differences(rows: list[dict[str, Any]], folder: Path, bank: evaluate.Bank) -> dict[str, Any]:
    """LDS over that of the baseline, with the interval of the difference: as columns of ``rows``, and as JSON."""
    if not any(row["name"] == BASELINE for row in rows):
        return {}
    found: dict[str, Any] = {}
    for kind, metric in (("half", "lds"), ("removal", "lds_removal")):
        if len(bank.entries(kind, 0)) < 3:
            continue
        over = evaluate.compare_rows(folder, bank, BASELINE, kind)
        found[metric] = {name: value.to_dict() for name, value in over.items()}
        for row in rows:
            both = over[row["name"]].both.to_dict() if row["name"] in over else {}
            for end, part in (("", "value"), ("_low", "low"), ("_high", "high")):
                row[f"{metric}_over_{BASELINE}{end}"] = both.get(part)
    pairs = [(f"ekfac_cg_{steps}", f"bergson_ekfac_cg_{steps}") for steps in ITERATIONS]
    there = {row["name"] for row in rows}
    found["pairs"] = [
        {"name": own, "over": other, **evaluate.compare_rows(folder, bank, other, names=[own])[own].both.to_dict()}
        for own, other in pairs
        if {own, other} <= there
    ]
    return found


def report(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write `board.csv`, `board.json` and `board.svg`."""
    bank = open_bank(options)
    folder = options.work / f"rows-{options.protocol}"
    rows = evaluate.read_rows(folder, bank)
    protocol: Any = bank.protocol
    over = differences(rows, folder, bank)
    content = {
        "protocol": protocol.describe(),
        "facts": protocol.facts,
        "bank": bank.identity,
        "retrainings": bank.kinds(),
        "noise": evaluate.bank_noise(bank),
        "reported_queries": len(protocol.reported),
        "tuning_queries": len(protocol.tuning),
        "rows": [json.loads((folder / r["name"] / "row.json").read_text()) for r in rows],
        "over": {"baseline": BASELINE, **over},
        "machine": {"python": platform.python_version(), "threads": 1, "cpu": platform.machine()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    artifacts.atomic_write_json(RESULTS / "board.json", content)
    artifacts.atomic_write_bytes(RESULTS / "board.csv", evaluate.to_csv(rows).encode())
    from benchmarks.board.plot import plot

    plot(rows, content["noise"], RESULTS / "board.svg")
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "board", help="bank and rows (default: runs/board)"
    )
    parser.add_argument("--protocol", default="small", choices=sorted(evaluate.PROTOCOLS))
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), default=list(ROWS), help="rows (default: all)")
    parser.add_argument("--bank-only", action="store_true")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot")
    parser.add_argument("--time", action="store_true", help="only measure seconds and memory of finished rows again")
    parser.add_argument("--in-process", action="store_true", help="run the one row here (what each row's process does)")
    parser.add_argument("--workers", type=int, default=2, help="processes that retrain at once")
    parser.add_argument("--half", type=int, default=120)
    parser.add_argument("--other-seed", type=int, default=30)
    parser.add_argument("--removals", type=int, default=0)
    parser.add_argument("--remove", type=int, default=10, help="top examples to remove a query; 0: no loss difference")
    parser.add_argument("--controls", type=int, default=10)
    options = parser.parse_args()
    options.work = options.work.resolve()
    screen, failed = Screen(), []
    with screen.session():
        if options.in_process:
            for name in options.only:
                run_row(name, options)
            return 0
        if not options.report and not options.time:
            build_bank(open_bank(options), options)
        if options.bank_only:
            return 0
        for name in options.only if not options.report else []:
            again = [
                sys.executable,
                "-m",
                "benchmarks.board",
                "--in-process",
                "--only",
                name,
                "--work",
                str(options.work),
            ]
            again += ["--protocol", options.protocol, "--workers", str(options.workers)]
            again += ["--remove", str(options.remove), "--controls", str(options.controls)]
            again += ["--time"] if options.time else []
            if subprocess.run(again, cwd=ROOT).returncode:
                failed.append(name)
        rows = report(options)
    print(evaluate.to_csv(rows))
    for name in failed:
        print(f"row {name} failed; its message is above", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
