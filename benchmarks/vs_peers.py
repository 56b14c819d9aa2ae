"""The same EK-FAC attribution in pyinf and in the libraries users have today, stage by stage, on this machine's CPU.

    python benchmarks/peers/envs.py                                  # once: the peers' environments
    python benchmarks/vs_peers.py --shape small_llama --repeats 3    # or gpt2_small, tiny, tiny_gpt2

Every library gets the same weights, tokens, tracked layers, loss, labels (empirical Fisher) and damping, in its own
process and environment, one at a time; repeats are interleaved (A B C, A B C, ...). A run that was interrupted goes on
where it stopped: finished runs are kept in the work folder and used again while inputs, versions, threads and (for
pyinf) the source are the same; `--fresh` drops them, `--redo NAME` drops one library's.

Writes `<shape>.csv` (seconds, memory, agreement), `<shape>-floor.csv`, `<shape>.json` (machine and conditions) and
`<shape>.svg`/`.png` to `--out`, and prints the table. Agreement: lowest per-query Pearson correlation and relative
difference, against kronfluence and against a plain float64 reference that averages A over the same positions.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
sys.path.insert(0, str(PEERS))

import numpy as np  # noqa: E402
from analysis import COLUMNS, Entry, csv_rows, fill_agreement, floor, load_entry, table, write_csv  # noqa: E402
from envs import ENVS, STAMP, python_of  # noqa: E402
from envs import PEERS as PINS  # noqa: E402
from inputs import DAMPING, SHAPES, Shape, make_inputs  # noqa: E402

LIBRARIES = ("pyinf", "pyinf:no_cache", "kronfluence", "bergson", "dattri_llm", "dattri_llm:memory")
CHECK = "kronfluence:all_but_last"  # once, untimed: the definition that bergson and dattri-llm share
REFERENCE_SHAPES = ("tiny", "tiny_gpt2", "small_llama")  # where float64 gradients of every sequence are cheap enough
MACHINE_BUSY = 0.15


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _source_of(name: str) -> dict[str, str]:
    """What a finished run depends on besides inputs and threads; a change makes it stale."""
    library = name.partition(":")[0]
    runner = {"runner": _digest([PEERS / f"run_{library}.py"])}
    if library == "pyinf":
        patterns = ("pyinf/**/*.py", "triton_kernels/**/*.py", "csrc/**/*.*")
        return runner | {"source": _digest([path for pattern in patterns for path in ROOT.glob(pattern)])}
    return runner | ({"package": PINS[library]} if library in PINS else {})


def _interpreter(name: str) -> Path:
    library = name.partition(":")[0]
    return Path(sys.executable) if library in ("pyinf", "bare") else python_of(library)


def _environment(threads: int, work: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return (
        kept
        | dict.fromkeys(names, str(threads))
        | {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(work / "huggingface"),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
        }
    )


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _busy_seconds() -> float:
    import psutil

    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def run_once(name: str, folder: Path, inputs: Path, key: dict[str, Any], options: argparse.Namespace) -> str:
    """Run one library once unless a matching finished run is there. Leaves `run.json`; returns a line to print."""
    state = folder / "run.json"
    if state.is_file():
        note = json.loads(state.read_text())
        if note["status"] == "ok" and note["key"] == key:
            return "kept"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    library, _, variant = name.partition(":")
    python = _interpreter(name)
    note = {"key": key, "started": time.time(), "status": "failed", "error": ""}
    if library in PINS and not (ENVS / library / STAMP).is_file():
        note["error"] = f"environment missing: make it with `python benchmarks/peers/envs.py {library}`"
        state.write_text(json.dumps(note, indent=1))
        return f"FAILED: {note['error']}"
    command = [str(python), str(PEERS / f"run_{library}.py"), "--inputs", str(inputs), "--out", str(folder)]
    command += ["--threads", str(options.threads), *(["--variant", variant] if variant else [])]
    log = folder / "log.txt"
    own, everyone = resource.getrusage(resource.RUSAGE_CHILDREN), _busy_seconds()
    with log.open("w") as handle:
        environment = _environment(options.threads, options.work)
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        try:
            code: int | str = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"no result after {options.timeout} s"
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)
            raise
    note["ended"] = time.time()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    mine = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
    wall = (note["ended"] - note["started"]) * (os.cpu_count() or 1)
    note["other_load"] = round(max(0.0, _busy_seconds() - everyone - mine) / wall, 3)
    if code == 0 and (folder / "result.json").is_file():
        note["status"] = "ok"
        seconds = json.loads((folder / "result.json").read_text())["total_seconds"]
        line = f"{seconds:.2f} s"
        if note["other_load"] > MACHINE_BUSY:
            line += f"  (other programs took {note['other_load']:.0%} of the machine)"
    else:
        note["error"] = f"exit {code}: {_last_words(log)}" if isinstance(code, int) else code
        line = f"FAILED: {note['error']} (log: {log})"
    state.write_text(json.dumps(note, indent=1))
    return line


def reference(shape: Shape, inputs: Path, fingerprint: str, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Float64 reference scores for both conventions, computed once and kept; empty if `--reference` leaves them out."""
    wanted = options.reference == "yes" or (options.reference == "auto" and shape.name in REFERENCE_SHAPES)
    out = {}
    for positions in ("all", "all_but_last") if wanted else ():
        digest = hashlib.sha256(fingerprint.encode() + (PEERS / "reference.py").read_bytes()).hexdigest()[:12]
        path = options.work / f"reference-{positions}-{digest}.npy"
        if not path.is_file():
            if options.report_only:
                continue
            print(f"float64 reference, A over {positions.replace('_', ' ')} positions ...", flush=True)
            part = path.with_name(f"part-{path.name}")
            command = [sys.executable, str(PEERS / "reference.py"), "--inputs", str(inputs), "--out", str(part)]
            command += ["--threads", str(options.threads), "--positions", positions]
            subprocess.run(command, check=True, env=_environment(options.threads, options.work))
            part.rename(path)
        out[positions] = np.load(path)
    return out


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _notes(folders: list[Path]) -> list[dict[str, Any]]:
    return [json.loads((f / "run.json").read_text()) for f in folders if (f / "run.json").is_file()]


def _interleaved(repeats: list[list[Path]]) -> bool:
    """Whether every run of a repeat started before any run of the next repeat did."""
    starts = [[note["started"] for note in _notes(folders)] for folders in repeats]
    return all(max(a) < min(b) for a, b in itertools.pairwise(s for s in starts if s))


def measure(shape: Shape, options: argparse.Namespace) -> tuple[list[Entry], dict[str, np.ndarray], dict[str, Any]]:
    """Run everything that has to run. Returns the entries, the references, and the conditions of the measurement."""
    inputs = options.work / "inputs"
    fingerprint = make_inputs(shape, inputs)
    names = ["bare", *options.libraries]

    def folder_of(name: str, repeat: int) -> Path:
        return options.work / "runs" / name.replace(":", "-") / f"r{repeat}"

    for name in options.redo:
        shutil.rmtree(options.work / "runs" / name.replace(":", "-"), ignore_errors=True)
    schedule = [(name, repeat) for repeat in range(options.repeats) for name in names]
    check = any(n.partition(":")[0] in ("bergson", "dattri_llm") for n in names)
    if check:
        schedule.append((CHECK, 0))
    for number, (name, repeat) in enumerate([] if options.report_only else schedule, 1):
        key = {"inputs": fingerprint, "threads": options.threads} | _source_of(name)
        print(f"[{number}/{len(schedule)}] repeat {repeat + 1}  {name} ...", end=" ", flush=True)
        print(run_once(name, folder_of(name, repeat), inputs, key, options), flush=True)
    references = reference(shape, inputs, fingerprint, options)
    folders = {name: [folder_of(name, r) for r in range(options.repeats)] for name in names}
    entries = [load_entry(name, folders[name]) for name in names]
    if check:
        entries.append(load_entry(CHECK, [folder_of(CHECK, 0)]))
    import psutil
    import torch

    load = [note.get("other_load", 0.0) for row in folders.values() for note in _notes(row)]
    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "repeats": options.repeats,
        "interleaved": _interleaved([[folders[n][r] for n in names] for r in range(options.repeats)]),
        "largest_load_by_other_programs": max(load, default=0.0),
        "definition": f"EK-FAC, empirical Fisher, float32, damping {DAMPING} x mean(Lambda) of each layer, summed "
        "next-token loss, every attention and MLP linear layer; total = all stages but loading the model and the data",
        "inputs": fingerprint,
    }
    return entries, references, facts


def publish(
    shape: Shape, entries: list[Entry], references: dict[str, np.ndarray], facts: dict[str, Any], out: Path
) -> str:
    """Write CSV, JSON and pictures to `out`. Returns the printed table."""
    fill_agreement(entries, references)
    bare = next((e for e in entries if e.library == "bare" and e.results), None)
    floor_rows: list[dict[str, Any]] = []
    if bare is not None:
        rates = {k: float(np.median([r["rates"][k] for r in bare.results])) for k in bare.results[0]["rates"]}
        facts = facts | {"matrix_rate_flops": {k: round(v) for k, v in rates.items()}}
        floor_rows = floor(shape, rates["float32"], float(np.median(bare.seconds("activations"))))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{shape.name}.csv", COLUMNS, csv_rows(shape, entries))
    write_csv(out / f"{shape.name}-floor.csv", ("stage", "flops", "seconds"), floor_rows)
    (out / f"{shape.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    from plot import draw

    caption = f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, medians of {facts['repeats']}"
    draw(shape, entries, floor_rows, caption, out / shape.name)
    text = table(entries, floor_rows)
    if bare is not None:
        parts = (f"{s} {np.median(bare.seconds(s)):.2f} s" for s in ("forward", "activations", "weights"))
        text += f"\nbare model: {', '.join(parts)}; fp32 products {rates['float32'] / 1e9:.0f} GFLOP/s"
    if not facts["interleaved"]:
        text += "\nnot interleaved: some runs were made at another time than the rest of their repeat"
    load = facts["largest_load_by_other_programs"]
    if load > MACHINE_BUSY:
        text += f"\nother programs took up to {load:.0%} of the machine: not a clean measurement"
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small_llama")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=PEERS.parent / "results" / "peers")
    parser.add_argument("--work", type=Path, help="where runs are kept (default: runs/peers/<shape>)")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="comma-separated; name or name:variant")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one run")
    parser.add_argument("--reference", choices=("auto", "yes", "no"), default="auto", help="float64 reference scores")
    parser.add_argument("--redo", default="", help="comma-separated libraries whose kept runs are dropped")
    parser.add_argument("--fresh", action="store_true", help="drop every kept run of this shape")
    parser.add_argument("--report-only", action="store_true", help="run nothing; write the tables from the kept runs")
    options = parser.parse_args(arguments)
    options.work = (options.work or ROOT / "runs" / "peers" / options.shape).resolve()
    options.libraries = [n for n in options.libraries.split(",") if n]
    options.redo = [n for n in options.redo.split(",") if n]
    known = {p.stem.removeprefix("run_") for p in PEERS.glob("run_*.py")}
    for name in (*options.libraries, *options.redo):
        if name.partition(":")[0] not in known:
            parser.error(f"unknown library {name!r}: one of {', '.join(sorted(known))}, optionally with :variant")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the results, print the table."""
    options = parse(arguments)
    shape = SHAPES[options.shape]
    if options.fresh:
        shutil.rmtree(options.work / "runs", ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    entries, references, facts = measure(shape, options)
    print("\n" + publish(shape, entries, references, facts, options.out))
    print(f"written to {options.out}")
    if any(not e.results for e in entries):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
