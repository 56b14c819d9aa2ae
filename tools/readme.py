"""Fill the tables of README.md from committed result files: ``python tools/readme.py [--check]``.

A block between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is rewritten; no number in it is typed by hand.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SHAPES = {
    "small_llama": "Llama, 4 layers, d = 256, 256 training and 16 query sequences of 128 tokens",
    "gpt2_small": "GPT-2 small shape, 12 layers, d = 768, 32 training and 8 query sequences of 128 tokens",
}
STAGES = ("covariances", "eigendecomposition", "lambda", "queries", "scores")


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none when it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table; all columns but the first are aligned right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in body])


def demo() -> str:
    """Planted examples found, by method."""
    data: dict[str, Any] = json.loads((RESULTS / "demo" / "results.json").read_text())
    mean = [sum(m["hits"]) / len(m["hits"]) for m in data["methods"]]
    head = ["method", *[f"question {i + 1}" for i in range(len(data["questions"]))], "mean", "seconds"]
    body = [
        [f"`{m['method']}`", *[str(h) for h in m["hits"]], f"{average:.1f}", f"{m['seconds']:.1f}"]
        for m, average in zip(data["methods"], mean, strict=True)
    ]
    text = (
        f"\n\nFound of {data['planted']} planted examples among {data['train']:,} "
        f"({data['train_tokens']:,} tokens, a model of "
        f"{data['parameters']:,} parameters, {data['device']}); training took "
        f"{data['seconds']['training']:.0f} s, the whole "
        f"demo {data['seconds']['total']:.0f} s there."
    )
    return markdown(head, body) + text


def methods() -> str:
    """The methods that exist."""
    sys.path.insert(0, str(ROOT))
    from pyinf.methods import METHODS

    lines = ["| method | what it is | source | needs |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{m.name}` | {m.summary} | {m.source} | {m.needs} |" for m in METHODS.values()])


def _label(row: dict[str, str]) -> str:
    variant = {
        "": "",
        "default": "",
        "no_cache": ", model run again for each stage",
        "fp64": ", fp64 eigensolver",
        "memory": " (captured in memory)",
    }.get(row["variant"], f" ({row['variant']})")
    bold = "**" if row["library"] == "pyinf" else ""
    return f"{bold}{row['library'].replace('_', '-')} {row['version']}{variant}{bold}"


def peers() -> str:
    """Seconds by stage and library, one table a shape."""
    out = []
    for shape, title in SHAPES.items():
        rows = rows_of(RESULTS / "peers" / f"{shape}.csv")
        names = list(dict.fromkeys((r["library"], r["variant"]) for r in rows if r["library"] != "bare"))
        body = []
        for name in names:
            own = {r["stage"]: r for r in rows if (r["library"], r["variant"]) == name}
            if name[1] == "all_but_last":
                continue
            total = own.get("total")
            if total is None:
                body.append(
                    [name[0], *["–"] * len(STAGES), f"failed: {next(iter(own.values()))['error']}", "–", "–", "–", "–"]
                )
                continue
            seconds = [f"{float(own[s]['seconds_median']):.1f}" if s in own else "–" for s in STAGES]
            faster = 1 / float(total["ratio_to_fastest_peer"]) if total["ratio_to_fastest_peer"] else None
            pearson = total["pearson_min_vs_float64"] or total["pearson_min_vs_kronfluence"]
            body.append(
                [
                    _label(total),
                    *seconds,
                    f"{float(total['seconds_median']):.1f}",
                    f"{faster:.2f}×" if faster else "–",
                    f"{float(total['peak_mb']):,.0f}",
                    f"{float(pearson):.6f}" if pearson else "–",
                    total["runs"],
                ]
            )
        if body:
            conditions = json.loads((RESULTS / "peers" / f"{shape}.json").read_text())
            head = [
                "seconds",
                "covariances",
                "eigen",
                "Λ",
                "queries",
                "scores",
                "total",
                "speed",
                "peak MB",
                "lowest Pearson",
                "runs",
            ]
            out += [
                f"{title}; {_machine(conditions)}:",
                "",
                markdown(head, body),
                "",
                f"![stages](benchmarks/results/peers/{shape}.svg)",
                "",
            ]
    if not out:
        raise FileNotFoundError(RESULTS / "peers")
    out.append(
        "*speed*: fastest peer's time over this one's, medians. *lowest Pearson*: over queries, "
        "against float64 where it was "
        "computed, else against kronfluence, each with the covariance positions of that library "
        "(bergson and dattri-llm leave out "
        "each sequence's last position)."
    )
    return "\n".join(out)


def _machine(conditions: dict[str, Any]) -> str:
    order = "runs interleaved" if conditions["interleaved"] else "the runs of pyinf not interleaved with the others'"
    repeats = f"{conditions['repeats']} repeats" if conditions["repeats"] > 1 else "one repeat"
    load = f"other programs took up to {100 * conditions['largest_load_by_other_programs']:.0f} % of the machine"
    return f"{conditions['processor']}, {conditions['threads']} threads, fp32; {repeats}, {order}; {load}"


def floor() -> str:
    """Where pyinf's time goes against the arithmetic floor."""
    body = []
    for shape in SHAPES:
        ours = {
            r["stage"]: r
            for r in rows_of(RESULTS / "peers" / f"{shape}.csv")
            if r["library"] == "pyinf" and r["variant"] in ("", "default")
        }
        for row in rows_of(RESULTS / "peers" / f"{shape}-floor.csv"):
            mine = ours.get(row["stage"], {}).get("seconds_median", "")
            flops = f"{float(row['flops']) / 1e12:.2f}" if row.get("flops") else "–"
            body.append(
                [
                    shape,
                    row["stage"],
                    flops,
                    f"{float(row['seconds']):.1f}",
                    f"{float(mine):.1f}" if mine else "in the first stage",
                ]
            )
    if not body:
        raise FileNotFoundError(RESULTS / "peers")
    text = markdown(["shape", "stage", "TFLOP", "floor, s", "pyinf, s"], body)
    return text + "\n\npyinf's first stage holds the one model pass; with what it captured the others run no model."


def eigen() -> str:
    """Eigensolvers compared."""
    rows = rows_of(RESULTS / "eigen" / "eigensolvers.csv")
    if not rows:
        raise FileNotFoundError(RESULTS / "eigen" / "eigensolvers.csv")
    return markdown(list(rows[0]), [list(r.values()) for r in rows])


def cpu_ops() -> str:
    """C++ kernels against torch."""
    rows = rows_of(RESULTS / "cpu" / "ops.csv")
    if not rows:
        raise FileNotFoundError(RESULTS / "cpu" / "ops.csv")
    return markdown(list(rows[0]), [list(r.values()) for r in rows])


def board() -> str:
    """Methods on one bank of retrainings: LDS, its difference to EK-FAC's, what else was measured."""
    rows = rows_of(RESULTS / "board" / "board.csv")

    def value(row: dict[str, str], name: str, digits: int = 3, sign: str = "") -> str:
        found = row.get(name)
        if not found:
            return "–"
        text = f"{float(found):{sign}.{digits}f}"
        if row.get(f"{name}_low"):
            text += f" [{float(row[f'{name}_low']):{sign}.{digits}f}, {float(row[f'{name}_high']):{sign}.{digits}f}]"
        return text

    columns = [
        ("LDS", "lds", 3, ""),
        ("over EK-FAC", "lds_over_ekfac", 3, "+"),
        ("LDS, 1 % removed", "lds_removal", 3, ""),
        ("over EK-FAC, 1 %", "lds_removal_over_ekfac", 3, "+"),
        ("loss rise, top 10 removed", "qld_10", 2, ""),
        ("damping", "damping", 0, ""),
        ("seconds", "seconds", 1, ""),
        ("peak MB", "peak_mb", 0, ""),
    ]
    columns = [c for c in columns if any(row.get(c[1]) for row in rows)]
    body = []
    for row in rows:
        row["damping"] = f"{float(row['damping']):g}" if row["damping"] else "–"
        body.append([f"`{row['name']}`", *(row[c[1]] if c[1] == "damping" else value(row, *c[1:]) for c in columns)])
    pairs = json.loads((RESULTS / "board" / "board.json").read_text())["over"].get("pairs", [])
    text = "".join(
        f"\n\n`{p['name']}` over `{p['over']}`: {p['value']:+.3f} [{p['low']:+.3f}, {p['high']:+.3f}]." for p in pairs
    )
    return markdown(["method", *(c[0] for c in columns)], body) + text


def compiled() -> str:
    """What the ahead-of-time compilers made of the kernels, module by module."""
    body = []
    for name in ("triton", "cuda"):
        path = RESULTS / "compile" / f"{name}.csv"
        if not path.is_file():
            raise FileNotFoundError(path)
        with path.open(newline="") as handle:
            version = handle.readline().removeprefix("#").strip()
            lines = list(csv.DictReader(handle))
        for module in dict.fromkeys(line["module"] for line in lines):
            own = [line for line in lines if line["module"] == module]
            cores = sorted({kind for line in own for kind in line["tensor_core_kinds"].split("+") if kind != "none"})
            body.append(
                [
                    f"`{module}`",
                    version,
                    str(len(own)),
                    " ".join(sorted({line["arch"] for line in own})),
                    str(max(int(line["registers"]) for line in own)),
                    str(sum(int(line["spill_instructions"]) > 0 for line in own)),
                    " ".join(cores) or "–",
                ]
            )
    head = ["kernels", "compiler", "compiled", "architectures", "most registers", "with spills", "tensor cores"]
    return markdown(head, body)


def stores() -> str:
    """Accuracy of every store by bytes, two-stage retrieval and the speed of the scan."""
    home = RESULTS / "store"
    rows = rows_of(home / "store_table.csv")
    if not rows:
        raise FileNotFoundError(home / "store_table.csv")
    limits = (1 << 10, 1 << 12, 1 << 16)
    whole = {r["name"]: r for r in rows if r["name"] in ("ekfac", "grad_dot")}
    head = ["method", *(f"LDS at ≤ {limit >> 10} KiB" for limit in limits)]
    body = []
    for method in dict.fromkeys(r["method"] for r in rows if r["name"] not in whole):
        line = [f"`{method}`"]
        for limit in limits:
            fits = [r for r in rows if r["method"] == method and int(r["bytes"]) <= limit]
            best = max(fits, key=lambda r: float(r["lds"]), default=None)
            line.append("–" if best is None else f"{float(best['lds']):.3f} ({int(best['bytes']):,} B)")
        body.append(line)
    text = markdown(head, body)
    ekfac, dot = whole["ekfac"], whole["grad_dot"]
    text += (
        f"\n\nUncompressed, {int(ekfac['bytes']):,} bytes an example: EK-FAC {float(ekfac['lds']):.3f}, "
        f"dot product {float(dot['lds']):.3f}. The best setting within each limit, and its bytes."
    )
    for name in ("two_stage", "two_stage-hadamard4096", "two_stage-pca1024"):
        trials = rows_of(home / f"{name}.csv")
        about = json.loads((home / f"{name}.json").read_text())
        size, k = about["store"]["bytes_a_row"], about["k"]
        recalls = [float(t["recall_true"]) for t in trials]
        inside = sum(t["inside"] == "True" for t in trials)
        text += (
            f"\n\nTwo stages, {about['sequences']:,} sequences, one-bit rows of {size:,} bytes: "
            f"{trials[0]['candidates']} of them scored again a query, recall@{k} {min(recalls):.3f} to "
            f"{max(recalls):.3f} in {len(trials)} trials, inside the stated interval in {inside}."
        )
    cost = json.loads((home / "store_build.json").read_text())
    shares = "; ".join(
        f"{row['build'].replace('-', ' ')} {100 * row['overhead']:.0f} % "
        f"({100 * min(row['overheads']):.0f} to {100 * max(row['overheads']):.0f} %)"
        for row in cost["overhead"]
    )
    small, large = cost["memory"]
    text += (
        f"\n\nBuilding over the bare pass, {cost['model']}, median of {len(cost['overhead'][0]['overheads'])} (all): "
        f"{shares}. Peak memory of a build over what was held before: {small['build_mb']:.0f} MB for "
        f"{small['sequences']:,} sequences, {large['build_mb']:.0f} MB for {large['sequences']:,}."
    )
    scan = {r["what"]: r for r in rows_of(RESULTS / "scan" / "scan.csv")}
    ours, faiss = scan["pyinf.ops.scan_topk, 1bit"], scan["faiss.IndexBinaryFlat"]
    shape = json.loads((RESULTS / "scan" / "scan.json").read_text())["shape"]
    return text + (
        f"\n\nA scan of {int(ours['rows']):,} rows of {shape['width']:,} bits by {shape['queries']} queries: "
        f"{float(ours['seconds']):.2f} s, {float(faiss['times_pyinf']):.2f} times as fast as FAISS's binary index "
        f"({float(faiss['seconds']):.2f} s)."
    )


BLOCKS: dict[str, Callable[[], str]] = {
    f.__name__: f for f in (demo, methods, peers, floor, eigen, cpu_ops, board, stores, compiled)
}


def render(text: str) -> str:
    """The README with every block made anew; a block without its result file says so."""

    def fill(match: re.Match[str]) -> str:
        try:
            body = BLOCKS[match[2]]()
        except FileNotFoundError as error:
            missing = Path(str(error.filename or error)).resolve()
            body = f"*not measured: {missing.relative_to(ROOT)} is not there*"
        return f"{match[1]}{body}\n{match[4]}"

    return BLOCK.sub(fill, text)


def main() -> int:
    """Rewrite README.md, or with ``--check`` only say whether it is current."""
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old)
    if "--check" in sys.argv[1:]:
        if old != new:
            print("README.md is not what its result files say; run: python tools/readme.py", file=sys.stderr)
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
