"""``pyinf bench``: the ops on this machine, provider by provider."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from pyinf.cli import _options as o
from pyinf.cli._terminal import Screen, guarded

_WHAT = "What is measured"


def _option(*names: str, help: str, panel: str = _WHAT) -> typer.models.OptionInfo:
    return typer.Option(*names, help=help, rich_help_panel=panel)


@guarded
def bench(
    op: Annotated[list[str] | None, _option("--op", help="An op; several times. Default: every op.")] = None,
    shape: Annotated[
        list[str] | None,
        _option("--shape", help="gpt2, llama-1b, llama-8b, 4096x14336, or d_out=512,d_in=256,length=128,…"),
    ] = None,
    dtype: Annotated[
        list[str] | None, _option("--dtype", help="bfloat16 (float32 on a CPU), float16, 'float32 tf32x3', …")
    ] = None,
    providers: Annotated[
        str, _option("--providers", help="Some of torch,triton,cuda,cpu,fast_jl,sjlt.")
    ] = "torch,triton,cuda,cpu",
    device: Annotated[str, _option("--device", help="auto, cpu, cuda, cuda:N.")] = "auto",
    seconds: Annotated[float, _option("--seconds", help="Time for each provider and shape.")] = 0.3,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for ops.csv and roofline.svg.", rich_help_panel="Output")
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Draw the roofline into --out.", rich_help_panel="Output")
    ] = True,
    quiet: o.Quiet = False,
    json_output: o.Json = False,
) -> None:
    """Measure the ops on this machine: time, rates, share of the ceiling, ratio to the best torch, error."""
    from pyinf import bench as benches
    from pyinf.bench.machine import card_name, facts
    from pyinf.bench.plot import roofline
    from pyinf.bench.timing import resolve_device

    names = benches.parse_providers(providers)
    where = resolve_device(device)
    shapes = [
        s for text in shape or ["llama-1b" if where.type == "cuda" else "768x768"] for s in benches.parse_shape(text)
    ]
    dtypes = dtype or ["bfloat16" if where.type == "cuda" else "float32"]
    wanted = list(benches.targets(op or list(benches.OPS), shapes, dtypes))
    screen = Screen(quiet, json_output)
    clock = benches.Clock(where)
    with screen.session():
        screen.say(f"{card_name(where)}: measuring what it reaches")
        ceilings = benches.ceilings(clock, None, min(seconds, 0.3), dtypes)
        screen.say("  ".join(_ceiling(name, value) for name, value in ceilings.items()))
        rows: list[benches.Row] = []
        for target in wanted:
            found = benches.measure(target, names, clock, ceilings, seconds)
            rows += found
            for line in lines(found):
                screen.result(line)
    files = []
    if out is not None:
        benches.write_csv(rows, out / "ops.csv")
        files.append(out / "ops.csv")
        if plot:
            picture = roofline([dataclasses.asdict(r) for r in rows], ceilings, out / "roofline.svg", card_name(where))
            files += [picture] if picture else []
        for file in files:
            screen.result(f"wrote {file}")
    if json_output:
        print(
            json.dumps({"machine": facts(where), "ceilings": ceilings, "rows": [dataclasses.asdict(r) for r in rows]})
        )
    if any("values are wrong" in r.note for r in rows):
        raise typer.Exit(1)


def _ceiling(name: str, value: float) -> str:
    return f"{name} {value / 1e9:.0f} GB/s" if name == "copy" else f"{name} {value / 1e12:.3g} TFLOP/s"


def lines(rows: list) -> list[str]:
    """A heading for one target, and a line for each provider."""
    first = rows[0]
    title = " · ".join(p for p in (first.op, first.variant, first.shape, first.dtype) if p)
    out = [f"{title}  ({first.sizes}; auto takes {first.auto})"]
    for r in rows:
        if r.median_ms is None:
            out.append(f"  {r.provider:8} {r.note}")
            continue
        spread = 50 * (r.high_ms - r.low_ms) / r.median_ms
        text = (
            f"  {r.provider:8} {r.median_ms:10.4f} ms ±{spread:4.1f} %  {r.tflops:8.3f} TFLOP/s {r.gb_per_s:8.1f} GB/s"
        )
        if r.percent_of_ceiling is not None:
            text += f"  {r.percent_of_ceiling:5.1f} % of {r.limit}"
        if r.ratio_to_torch is not None and r.provider != "torch":
            text += f"  {r.ratio_to_torch:5.2f}x torch"
        text += f"  error {r.error:.1e}" if r.error is not None else ""
        out.append(text + "".join(f"  ({t})" for t in (r.formulation, r.note) if t))
    return out
