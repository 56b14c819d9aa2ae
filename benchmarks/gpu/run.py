"""Running the parts: processes, time, and one JSON file a part."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.collect import summarise, tables
from benchmarks.gpu.journal import UNFINISHED, Journal, supervise
from benchmarks.gpu.options import Options
from benchmarks.gpu.parts import ASK_REGISTRY, PARTS, Part

TOTAL = 515  # seconds for the parts: with the start and the last tables under nine minutes


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, also when killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def capability() -> str | None:
    """``9.0`` as the driver says it, without importing torch."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            return lines[0].strip()
    return None


def architecture(cap: str) -> str:
    """What ``TORCH_CUDA_ARCH_LIST`` must say for a card: ``9.0`` needs the ``a`` for wgmma and its kin."""
    return "9.0a" if cap == "9.0" else cap


def build(options: Options, deadline: float) -> dict[str, Any]:
    """Compile the extension in place for this card alone."""
    if not options.gpu:
        return {"complete": True, "rows": [], "note": "not needed on a CPU: make build compiles the extension"}
    cap = capability()
    if cap is None:
        return {"complete": False, "rows": [], "note": "nvidia-smi names no card"}
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture(cap), "PYINF_CUDA": "1"}
    begun = time.time()
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "build_extension.py")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, deadline - begun),
        )
        text, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        text, status = (error.stdout or b"").decode(errors="replace"), 124
    except OSError as error:
        text, status = str(error), 1
    row = {"architecture": architecture(cap), "status": status, "seconds": time.time() - begun, "log": text[-4000:]}
    note = "" if status == 0 else f"the build failed with status {status}: Triton kernels only"
    return {"complete": status == 0, "rows": [row], "note": note}


def run_part(part: Part, options: Options, seconds: float, again: bool = False) -> dict[str, Any]:
    """One part to its end or to the end of its time; its JSON file is written and returned."""
    path = options.out / f"{part.name}.json"
    journals = options.out / "journals"
    if again:
        path.unlink(missing_ok=True)
        for old in journals.glob(f"{part.name}.*"):
            old.unlink()
    elif path.is_file():
        with contextlib.suppress(ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.get("complete"):
                return known | {"kept": True}
    begun = time.time()
    deadline = begun + seconds
    if part.items is None:
        result = build(options, deadline)
    else:
        result = _workers(part, options, deadline, journals)
    result = {"part": part.name, "device": options.device, "tiny": options.tiny, **result}
    result["seconds"] = round(time.time() - begun, 1)
    write_json(path, result)
    return result


def _shards(part: Part, options: Options) -> list[str]:
    """Asked in a process of its own where the registry knows: this one began before the extension was built."""
    if part.shards not in ASK_REGISTRY:
        return part.shards(options)
    code = (
        "import json, sys, pathlib; from benchmarks.gpu import locate_kernels; locate_kernels(); "
        "from benchmarks.gpu.parts import PARTS; from benchmarks.gpu.options import Options; "
        "o = Options(sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4] == '1'); "
        "print('SHARDS ' + json.dumps(PARTS[sys.argv[1]].shards(o)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, part.name, options.device, str(options.out), "1" if options.tiny else "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    for line in done.stdout.splitlines():
        if line.startswith("SHARDS "):
            return json.loads(line[7:])
    raise RuntimeError(f"{part.name}: cannot list the work: {done.stderr.strip()[-1000:]}")


def _name(shard: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in shard)


def _workers(part: Part, options: Options, deadline: float, journals: Path) -> dict[str, Any]:
    try:
        shards = _shards(part, options)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"complete": False, "rows": [], "note": str(error)}
    if not shards:
        return {"complete": True, "rows": [], "note": _nothing(part, options)}

    def one(shard: str) -> str:
        name = f"{part.name}.{_name(shard)}"
        command = ["{python}", "-m", "benchmarks.gpu.worker", part.name, "--shard", shard]
        command += ["--journal", str(journals / f"{name}.jsonl"), "--deadline", str(deadline - 2)]
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        if part.name == "sanitizer":
            from benchmarks.gpu import sanitizer

            command = [*sanitizer.prefix(shard), *command]
            environment |= sanitizer.environment(shard)
        command += options.arguments()
        log = journals / f"{name}.log"
        return supervise(command, Journal(journals / f"{name}.jsonl"), log, deadline, part.limit, environment)

    with ThreadPoolExecutor(part.workers) as pool:
        ends = dict(zip(shards, pool.map(one, shards), strict=True))
    rows, notes = [], []
    for shard in shards:
        name = f"{part.name}.{_name(shard)}"
        states = Journal(journals / f"{name}.jsonl").states()
        for item, line in states.items():
            if line["state"] in UNFINISHED:
                continue
            found = line.get("row")
            for row in found if isinstance(found, list) else [found]:
                record = {"shard": shard, "item": item, "state": line["state"], "reason": line.get("reason", "")}
                record["item_seconds"] = round(line.get("seconds", 0.0), 3)
                rows.append(record | (row if isinstance(row, dict) else {} if row is None else {"value": row}))
        if ends[shard]:
            notes.append(f"{shard}: {ends[shard]}")
        if part.name == "sanitizer":
            rows.append(_sanitizer_row(shard, journals / f"{name}.log"))
    return {"complete": not notes, "rows": rows, "note": "; ".join(notes)}


def _sanitizer_row(shard: str, log: Path) -> dict[str, Any]:
    from benchmarks.gpu import sanitizer

    text = log.read_text(errors="replace") if log.is_file() else ""
    found = sanitizer.findings(text)
    if shard.startswith("none:"):
        state = "not run: a rehearsal without the tool"
    elif found["errors"] < 0:
        state = "no summary: the tool did not run to its end"
    elif shard == sanitizer.CONTROL:
        state = "ok: found" if found["errors"] > 0 else "WRONG: the planted error was not found, so nothing is proved"
    else:
        state = "ok" if found["errors"] == 0 else "WRONG"
    marked = [line for line in text.splitlines() if line.startswith("=========")]
    return {"shard": shard, "item": "summary", "state": state, **found, "report": "\n".join(marked[:60])[:6000]}


def _nothing(part: Part, options: Options) -> str:
    if part.name == "sanitizer":
        return "not run: compute-sanitizer is not on this machine"
    return f"no {' or '.join(['CUDA', 'Triton'] if options.gpu else ['CPU'])} kernel is registered"


def run_all(options: Options, names: list[str], total: float = TOTAL, again: bool = False) -> int:
    """Every part in order; what a part leaves of its time goes to the last ones. Returns 1 where values are wrong."""
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.time() + total
    if "correctness" in names and "environment" not in names and not (options.out / "environment.json").is_file():
        names = [*names, "environment"]  # what is verified is verified on a card with a name
    chosen = [PARTS[n] for n in PARTS if n in names]
    for position, part in enumerate(chosen):
        later = sum(p.seconds for p in chosen[position + 1 :])
        left = end - time.time()
        # what earlier parts left goes to the last part, and to one that may stretch; never what later parts have
        seconds = min(left, max(part.seconds, min(left - later, part.stretch * part.seconds))) if later else left
        if left < 5:
            print(f"{part.name}: not started, {left:.0f} s left", flush=True)
            continue
        print(f"{part.name}: up to {seconds:.0f} s", flush=True)
        result = run_part(part, options, seconds, again)
        note = f" ({result['note'][:500]})" if result["note"] else ""
        kept = ", kept from before" if result.get("kept") else f" in {result['seconds']} s"
        print(f"{part.name}: {len(result['rows'])} rows{kept}{note}", flush=True)
        if part.name in ("correctness", "special"):
            from benchmarks.gpu.collect import write_verified

            write_verified(options.out)
        tables(options.out)
        text = summarise(options.out)
        (options.out / "summary.md").write_text(text, encoding="utf-8")
        hand_back(options.out)
    text = summarise(options.out)
    print(text)
    return 1 if "WRONG" in text else 0


def hand_back(folder: Path) -> None:
    """Where ``$OUT`` is set: everything so far as one archive, and the summary, replaced after every part."""
    target = os.environ.get("OUT")
    if not target or Path(target).resolve() == folder.resolve():
        return
    out = Path(target)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "results.tmp"
    with tarfile.open(temporary, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    os.replace(temporary, out / "gpu-results.tar.gz")
    shutil.copyfile(folder / "summary.md", out / "summary.md")
