"""Bytes an example against accuracy: every projected method on the board's retraining bank, smallest to largest.

    python -m benchmarks.store_table                     # all rows; each is kept and not run twice
    python -m benchmarks.store_table --only onebit logra # rows whose names begin so
    python -m benchmarks.store_table --report            # the table and the plot from the rows that are there

LDS is on the bank's reported queries, with each method's damping chosen on its tuning queries (as on the board).
NDCG@20 and recall@100 compare the ranking with that of uncompressed EK-FAC (its own damping chosen in the same way),
mean over the reported queries. Bytes are those of a stored row, scales included; the share is of the float32 gradient
that EK-FAC uses. Results: `benchmarks/results/store/store_table.{csv,json,svg}`.
"""

from __future__ import annotations

import argparse
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pyinf
from pyinf import artifacts, evaluate, methods
from pyinf.cli._terminal import Screen
from pyinf.cli.evaluate import bank_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "store"
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
EARLY = (1e-4, 1e-2, 1e-1)  # where every damping takes rows of its own
REFERENCE = "ekfac"

Row = tuple[str, dict[str, Any]]  # method and its options


def _grid(method: str, option: str, values: Sequence[Any], formats: Sequence[str], **fixed: Any) -> dict[str, Row]:
    rows = {}
    for value in values:
        for format in formats:
            kind = "".join(f"-{v}" for v in fixed.values() if isinstance(v, str))
            kind += {True: "-factorised", False: "-flat", None: ""}[fixed.get("factorised")]
            kind += f"-c{fixed['rank']}" if "rank" in fixed and option != "rank" else ""
            name = f"{method}{kind}-{option}{value}-{format}".replace("-rank", "-").replace("coordinates", "m")
            rows[name] = (method, {option: value, "format": format, **fixed})
    return rows


def rows() -> dict[str, Row]:
    """Every row by name: the reference first, then each method from its smallest to its largest setting."""
    found: dict[str, Row] = {REFERENCE: ("ekfac", {}), "grad_dot": ("grad_dot", {})}
    for init in ("random", "factors"):
        found |= _grid("logra", "rank", (4, 8, 16, 32), ("bfloat16",), init=init)
    # rank 64 with its raw curvature is left out: an eigendecomposition of 4,096 columns for every layer
    found |= _grid("logra", "rank", (16, 64), ("bfloat16",), init="random", curvature="ekfac")
    found |= _grid("logra", "rank", (8, 32), ("1bit",), init="random")
    found |= _grid("trak", "rank", (128, 512, 2048, 8192), ("bfloat16",))
    found |= _grid("trackstar", "rank", (4, 8, 16, 32), ("bfloat16",))
    found |= _grid("less", "rank", (128, 512, 2048, 8192), ("bfloat16",))
    found |= _grid("onebit", "rank", (32, 64, 128, 256, 512), ("1bit",), rotation="pca", coordinates=12288)
    found |= _grid("onebit", "rank", (64, 256, 1024, 4096, 16384), ("1bit",), rotation="hadamard", coordinates=12288)
    found |= _grid("onebit", "rank", (128,), ("int4", "int8", "bfloat16"), rotation="pca", coordinates=12288)
    found |= _grid("onebit", "coordinates", (1024, 12288), ("1bit",), rotation="none")
    for method, option, values, formats, fixed in OTHERS:
        if method in methods.METHODS:
            found |= _grid(method, option, values, formats, **fixed)
    return found


# method, the option that makes its rows longer, its values, formats, what is fixed
OTHERS: list[tuple[str, str, tuple[int, ...], tuple[str, ...], dict[str, Any]]] = [
    ("grass", "k", (16, 64, 256, 1024), ("bfloat16",), {"factorised": True}),
    ("grass", "k", (128, 512, 2048, 8192), ("bfloat16",), {"factorised": False}),
    ("rapidin", "k", (512, 2048, 8192, 32768), ("float16",), {}),
    ("lorif", "shrink", (16, 8, 4, 2), ("bfloat16",), {"rank": 1}),
    ("lorif", "shrink", (4,), ("bfloat16",), {"rank": 4}),
    ("factors", "rank", (1, 4, 16), ("bfloat16",), {"curvature": "ekfac"}),
]


def scorer(model: Any, method: str, options: Mapping[str, Any], facts: dict[str, Any]) -> Any:
    """A row as :func:`pyinf.evaluate.run_row` wants it; what the rows are goes to ``facts``."""

    def run(queries: list[Any], train: list[Any], dampings: Sequence[float]) -> dict[float, Any]:
        attributor = pyinf.Attributor(model, method, damping=dampings[0], certify=False, **options)
        attributor.fit(train)
        found = attributor.score(queries, train, dampings=list(dampings))
        meta = next(iter(found.values())).meta
        facts.update({name: meta[name] for name in ("bytes_per_example", "row_width", "format") if name in meta})
        return {d: s.total().double().numpy() for d, s in found.items()}

    return run


def run_rows(bank: evaluate.Bank, folder: Path, wanted: Sequence[str]) -> list[str]:
    """Every row that is not there yet; names of those that failed."""
    model, failed = bank_model(bank), []
    raw = 4 * sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    for name, (method, options) in rows().items():
        if not any(name.startswith(w) for w in wanted) or (folder / name / "store.json").exists():
            continue
        facts: dict[str, Any] = {}
        try:
            dampings = {"grad_dot": (0.1,), "onebit": EARLY}.get(method, DAMPINGS)
            about = {"method": method, "options": dict(options)}
            row = evaluate.run_row(
                bank, name, scorer(model, method, options, facts), folder / name, dampings, about=about
            )
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        if not facts and method not in (REFERENCE, "grad_dot"):  # the scores were there, what they are made of was not
            queries = [{"input_ids": bank.protocol.query_tokens[q]} for q in bank.protocol.tuning[:1]]
            train = [{"input_ids": t} for t in bank.protocol.train_tokens]
            scorer(model, method, options, facts)(queries, train, DAMPINGS[:1])
        facts.setdefault("bytes_per_example", raw)
        artifacts.atomic_write_json(folder / name / "store.json", facts)
        print(f"{name}: {facts['bytes_per_example']} bytes, LDS {row['results']['lds']['value']:.4f}", flush=True)
    return failed


def table(bank: evaluate.Bank, folder: Path) -> list[dict[str, Any]]:
    """A row a setting that is there, smallest first within a method."""
    reported = list(bank.protocol.reported)
    reference = np.load(folder / REFERENCE / "scores.npy")[reported]
    best = np.argsort(-reference, axis=1)[:, :100]
    relevant = np.zeros(reference.shape, dtype=bool)
    np.put_along_axis(relevant, best, True, axis=1)
    raw = artifacts.read_json(folder / REFERENCE / "store.json")["bytes_per_example"]
    whole = artifacts.read_json(folder / REFERENCE / "row.json")["results"]["lds"]["value"]
    out = []
    for name, (method, options) in rows().items():
        if not (folder / name / "store.json").exists():
            continue
        row, facts = (artifacts.read_json(folder / name / file) for file in ("row.json", "store.json"))
        scores = np.load(folder / name / "scores.npy")[reported]
        lds = row["results"]["lds"]
        out.append(
            {
                "name": name,
                "method": method,
                "options": json.dumps(options),
                "bytes": facts["bytes_per_example"],
                "share_of_float32": facts["bytes_per_example"] / raw,
                "damping": row["damping"],
                "lds": lds["value"],
                "lds_low": lds["interval"]["both"]["low"],
                "lds_high": lds["interval"]["both"]["high"],
                "lds_of_ekfac": lds["value"] / whole,
                "ndcg20": float(evaluate.ndcg(scores, reference, 20).mean()),
                "recall100": float(evaluate.recall_at(scores, relevant, 100).mean()),
                "seconds": row["seconds"],
            }
        )
    return out


def claims(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was to be shown of the one-bit store, from the rows."""
    whole = next(r for r in found if r["name"] == REFERENCE)
    bits = [r for r in found if r["method"] == "onebit" and '"1bit"' in r["options"]]
    small = [r for r in bits if r["bytes"] <= whole["bytes"] / 200]
    best = max(small, key=lambda r: r["lds"], default=None)
    out: dict[str, Any] = {"lds_of_uncompressed_ekfac": whole["lds"], "float32_bytes": whole["bytes"]}
    if best is not None:
        out["best_one_bit_row_of_at_most_1_200"] = {k: best[k] for k in ("name", "bytes", "lds", "lds_of_ekfac")}
    pairs = []
    for row in bits:
        rivals = [r for r in found if r["method"] == "logra" and r["bytes"] <= 16 * row["bytes"]]
        rival = max(rivals, key=lambda r: r["lds"], default=None)
        if rival is not None:
            pairs.append(
                {
                    "one_bit": row["name"],
                    "bytes": row["bytes"],
                    "lds": row["lds"],
                    "best_logra_of_at_most_16_times_the_bytes": rival["name"],
                    "logra_bytes": rival["bytes"],
                    "logra_lds": rival["lds"],
                    "wins": row["lds"] > rival["lds"],
                }
            )
    out["against_logra"] = pairs
    return out


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """LDS, NDCG@20 and recall@100 against bytes an example."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "store", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    def series(row: Mapping[str, Any]) -> str:
        options = json.loads(row["options"])
        words = [str(options[n]) for n in ("init", "rotation", "format") if n in options]
        return " ".join([row["method"], *words])

    whole = next(r for r in found if r["name"] == REFERENCE)
    names = list(dict.fromkeys(series(r) for r in found if r["name"] not in (REFERENCE, "grad_dot")))
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.6), sharex=True)
    colours = pyplot.get_cmap("tab20")
    for axis, column, label in zip(axes, ("lds", "ndcg20", "recall100"), ("LDS", "NDCG@20", "recall@100"), strict=True):
        for number, name in enumerate(names):
            own = sorted((r for r in found if series(r) == name), key=lambda r: r["bytes"])
            marker = "o" if "1bit" in name else "s"
            axis.plot(
                [r["bytes"] for r in own], [r[column] for r in own], marker + "-", ms=3.5, lw=1,
                color=colours(number % 20), label=name,
            )  # fmt: skip
        axis.axhline(whole[column], color="0.3", ls=":", lw=1)
        axis.axvline(whole["bytes"] / 200, color="0.7", ls="--", lw=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("bytes an example")
        axis.set_title(
            f"{label} (dotted: uncompressed EK-FAC, {whole['bytes']:,} bytes; dashed: 1/200 of them)", size=6.5
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=5, frameon=False, fontsize=7)
    figure.tight_layout(rect=(0, 0.06 + 0.035 * math.ceil(len(names) / 5), 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def report(bank: evaluate.Bank, folder: Path, out: Path) -> list[dict[str, Any]]:
    """Write table and plot from the rows that are there."""
    found = table(bank, folder)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "protocol": bank.protocol.describe(),
        "bank": bank.identity,
        "retrainings": bank.kinds(),
        "noise": evaluate.bank_noise(bank),
        "reported_queries": len(bank.protocol.reported),
        "claims": claims(found),
        "rows": found,
    }
    artifacts.atomic_write_json(out / "store_table.json", content)
    artifacts.atomic_write_bytes(out / "store_table.csv", evaluate.to_csv(found).encode())
    plot(found, out / "store_table.svg")
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, default=ROOT / "runs" / "board" / "bank-small")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "store_table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names begin so")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot")
    parser.add_argument("--list", action="store_true", help="only name the rows")
    options = parser.parse_args()
    if options.list:
        print("\n".join(rows()))
        return 0
    screen, failed = Screen(quiet=True), []
    with screen.session():
        bank = evaluate.Bank.open(options.bank)
        if not options.report:
            failed = run_rows(bank, options.work, [REFERENCE, *options.only])
        report(bank, options.work, options.out)
    for name in failed:
        print(f"row {name} failed; its message is above")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
