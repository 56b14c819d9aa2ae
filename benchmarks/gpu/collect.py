"""From the JSON files of the parts: CSV tables, the roofline, the record of verified kernels, and a summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.bars import bars

__all__ = ["merge_verified", "summarise", "tables", "write_verified"]


def load(folder: Path, part: str) -> dict[str, Any]:
    """A part's file; an empty part where it was not run."""
    try:
        return json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"part": part, "rows": [], "complete": False, "note": "not run"}


def item(folder: Path, part: str, name: str) -> dict[str, Any]:
    return next((r for r in load(folder, part)["rows"] if r.get("item") == name and r["state"] == "done"), {})


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items() if k not in ("log", "report")
    }


def tables(folder: Path) -> list[Path]:
    """One CSV a part, and the roofline of the benchmark where matplotlib is."""
    from pyinf.bench.measure import write_csv

    made = []
    for part in ("correctness", "special", "sanitizer", "end_to_end", "eigen", "bench"):
        rows = [_flat(r) for r in load(folder, part)["rows"]]
        if rows:
            fields = list(dict.fromkeys(key for r in rows for key in r))
            write_csv(rows, folder / f"{part}.csv", fields)
            made.append(folder / f"{part}.csv")
    speeds = [r for r in load(folder, "bench")["rows"] if "tflops" in r]
    ceilings = item(folder, "bench", "ceilings")
    if speeds and ceilings:
        from pyinf.bench.plot import roofline
        from pyinf.errors import ConfigError

        try:
            card = item(folder, "environment", "facts").get("device", "")
            picture = roofline(speeds, ceilings, folder / "roofline.svg", str(card))
            made += [picture] if picture else []
        except ConfigError as error:
            print(f"no plot: {error}")
    return made


def judged(folder: Path) -> dict[tuple[str, str], str]:
    """For each (op, backend) of the correctness part: "verified", or why not.

    Every call must have been made: an item that crashed, hung or was not reached leaves a kernel unverified. So does a
    wrong result, or none, on a side stream or with far offsets; that a kernel cannot be captured in a graph does not.
    """
    special = [r for r in load(folder, "special")["rows"] if not r["state"].startswith(("ok", "not "))]
    part = load(folder, "correctness")
    found: dict[tuple[str, str], str] = {}
    unfinished = {text.split(": ", 1)[0] for text in part["note"].split("; ") if ": " in text}
    for shard in dict.fromkeys(r["shard"] for r in part["rows"]):
        own = [r for r in part["rows"] if r["shard"] == shard]
        bad = [r for r in own if r["state"] not in ("ok", "not taken")]
        key = tuple(shard.split(":"))
        if bad:
            first = bad[0]
            state = "WRONG" if first["state"] in ("WRONG", "failed") else first["state"]
            found[key] = (
                f"{state}: {len(bad)} of {len(own)} calls; the first: {first['item']}: {first.get('reason', '')}"
            )
        elif shard in unfinished:
            found[key] = "not all calls were made"
        elif not any(r["state"] == "ok" for r in own):
            found[key] = f"takes no call here: {own[0].get('reason', '')}"
        else:
            found[key] = "verified"
        faults = [r for r in special if r["item"].startswith(f"{shard} ") and not r["item"].endswith(" graph")]
        if found[key] == "verified" and faults:
            found[key] = f"WRONG: {faults[0]['item']}: {faults[0]['state']} {faults[0].get('reason', '')}".rstrip()
    return found


def write_verified(folder: Path) -> Path:
    """``verified.json`` of this run, in the form that ``pyinf.ops.verified`` reads."""
    from benchmarks.gpu.run import write_json
    from pyinf.ops import verified

    facts = item(folder, "environment", "facts")
    records: dict[str, Any] = {}
    rows = load(folder, "correctness")["rows"]
    for (op, backend), state in judged(folder).items():
        if state == "verified" and facts.get("device"):
            own = [r for r in rows if r["shard"] == f"{op}:{backend}" and r["state"] == "ok"]
            details = {name: facts.get(name) for name in ("torch", "triton", "driver", "capability")}
            details |= {"calls": len(own), "largest_error": max(r["error"] for r in own)}
            build = facts.get("extension")
            details["git"] = build.get("git_hash") if isinstance(build, dict) else None
            records.setdefault(op, {})[verified._key(str(facts["device"]), backend)] = details
    write_json(folder / "verified.json", records)
    return folder / "verified.json"


def merge_verified(folder: Path, target: Path | None = None) -> Path:
    """Put the record of a run into the repository's (benchmarks/results/verified.json); what the run found wrong is
    struck from it."""
    from benchmarks.gpu.run import write_json
    from pyinf.ops import verified

    if load(folder, "correctness").get("tiny"):
        raise SystemExit(f"{folder} is a rehearsal (--tiny): it verifies nothing")
    target = target or ROOT / "benchmarks" / "results" / "verified.json"
    known = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    new = json.loads((folder / "verified.json").read_text(encoding="utf-8"))
    card = str(item(folder, "environment", "facts").get("device"))
    for (op, backend), state in judged(folder).items():
        if state != "verified":
            known.get(op, {}).pop(verified._key(card, backend), None)
    for op, entries in new.items():
        known.setdefault(op, {}).update(entries)
    write_json(target, {op: entries for op, entries in sorted(known.items()) if entries})
    return target


# ------------------------------------------------------------------------------------------ the summary


def _count(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[key(row)] = counts.get(key(row), 0) + 1
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "nothing"


def summarise(folder: Path) -> str:
    """What came of a run, on one page."""
    facts, known = item(folder, "environment", "facts"), item(folder, "environment", "ceilings")
    lines = [f"# {facts.get('device', 'no device')}", ""]
    if load(folder, "correctness").get("tiny"):
        lines += ["**A rehearsal (--tiny): it verifies and measures nothing.**", ""]
    if facts:
        shown = ("pyinf", "torch", "triton", "driver", "capability", "multiprocessors", "l2_bytes")
        lines += [", ".join(f"{k} {facts[k]}" for k in shown if facts.get(k) is not None), ""]
    if known:
        rates = [f"copy {known['copy'] / 1e9:.0f} GB/s"] if "copy" in known else []
        rates += [
            f"{k} {known[k] / 1e12:.1f} TFLOP/s" for k in ("bfloat16", "float16", "tf32", "float32") if k in known
        ]
        lines += ["Ceilings: " + ", ".join(rates), ""]
    lines += ["| part | rows | complete | seconds | note |", "|---|---:|---|---:|---|"]
    for name in ("build", "environment", "correctness", "special", "sanitizer", "end_to_end", "eigen", "bench"):
        part = load(folder, name)
        note = part["note"].replace("|", "/").replace("\n", " ")[:300]
        done = "yes" if part["complete"] else "**no**"
        lines.append(f"| {name} | {len(part['rows'])} | {done} | {part.get('seconds', '')} | {note} |")
    lines += ["", "## Correctness", "", _count(load(folder, "correctness")["rows"], lambda r: r["state"]), ""]
    lines += [f"- {op} {backend}: {state}" for (op, backend), state in judged(folder).items()]
    special = load(folder, "special")["rows"]
    lines += ["", "## Streams, graphs, offsets", "", _count(special, lambda r: r["state"].split(":")[0]), ""]
    lines += [
        f"- {r['item']}: {r['state']} {r.get('reason', '')}".rstrip()
        for r in special
        if not r["state"].startswith(("ok", "not "))
    ]
    checked = [r for r in load(folder, "sanitizer")["rows"] if r["item"] == "summary"]
    lines += [
        "",
        "## compute-sanitizer",
        "",
        *(f"- {r['shard']}: {r['state']} ({r['errors']} errors)" for r in checked),
    ]
    if not checked:
        lines.append(load(folder, "sanitizer")["note"])
    lines += ["", "## Bars", "", *bars(load(folder, "bench")["rows"])]
    lines += ["", "## End to end", ""]
    for r in load(folder, "end_to_end")["rows"]:
        if r["state"] == "done":
            stages = ", ".join(f"{name} {s:.2f}" for name, s in r["stages"].items())
            times = f"fit {r['fit_seconds']:.1f} s, score {r['score_seconds']:.1f} s"
            lines.append(f"- {r['model']} {r['backend']}: {times} ({stages})")
        else:
            lines.append(f"- {r['item']}: {r['state']} {r['reason']}")
    lines += [
        "",
        "## Eigensolvers",
        "",
        "| solver | rows | count | seconds | ‖AQ−QΛ‖/‖A‖ | ‖QᵀQ−I‖/√n |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in load(folder, "eigen")["rows"]:
        if r["state"] == "done":
            lines.append(
                f"| {r['solver']} | {r['rows']} | {r['count']} | {r['seconds']:.3f} | {r['decomposition']:.1e} | "
                f"{r['orthogonality']:.1e} |"
            )
        else:
            lines.append(f"| {r['item']} | | | {r['state']} | {r['reason'][:100]} | |")
    return "\n".join(lines) + "\n"
