"""The parts of a run: what each does, what it needs, how much time it has, and the items of its worker processes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.journal import Item
from benchmarks.gpu.options import Options

__all__ = ["ASK_REGISTRY", "PARTS", "Part", "gpu_backends", "judged_pairs", "pairs"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part. ``shards(options)`` are run as processes, ``workers`` at a time; ``items(shard, options)`` is what one
    does. ``seconds`` is its share of the nine minutes, ``stretch`` how many times that it may take where earlier parts
    left some, ``limit`` the longest that one item may take."""

    name: str
    seconds: int
    what: str
    needs: str
    limit: int = 60
    workers: int = 1
    stretch: float = 1.0
    shards: Callable[[Options], list[str]] = lambda options: ["all"]
    items: Callable[[str, Options], Iterator[Item]] | None = None


def gpu_backends(options: Options) -> list[str]:
    """What is judged: the GPU backends; in a rehearsal on a CPU, what runs there."""
    from pyinf.ops.triton_backend import interpreted

    if options.gpu:
        return ["triton", "cuda"]
    return ["torch", "cpu", *(["triton"] if interpreted() else [])]


def pairs(options: Options) -> list[str]:
    """``op:backend`` of everything registered for those backends: the registry says, no list here."""
    from pyinf.bench.cases import OPS, backends

    return [f"{op}:{name}" for op in OPS for name in gpu_backends(options) if name in backends(op)]


def judged_pairs(options: Options) -> list[str]:
    """The same, and ``<op>_group:triton`` of the ops whose Triton kernel also takes many layers in one launch."""
    from pyinf.bench.grouped import GROUPED

    return [*pairs(options), *(f"{op}_group:triton" for op in GROUPED if "triton" in gpu_backends(options))]


ASK_REGISTRY = (pairs, judged_pairs)
"""Lists of shards that depend on which kernels are built."""


def _device(options: Options) -> Any:
    from pyinf.bench.timing import resolve_device

    return resolve_device(options.device)


# ------------------------------------------------------------------------------------------ environment


def _environment(shard: str, options: Options) -> Iterator[Item]:
    from pyinf.bench.machine import facts
    from pyinf.bench.timing import Clock, ceilings

    device = _device(options)
    yield "facts", lambda: facts(device)
    yield "backends", _backends
    yield "ceilings", lambda: ceilings(Clock(device), 128 if options.tiny else None, 0.02 if options.tiny else 0.5)
    # the spread of two readings says what a difference is worth
    yield (
        "ceilings again",
        lambda: ceilings(Clock(device), 128 if options.tiny else None, 0.02 if options.tiny else 0.5),
    )


def _backends() -> dict[str, dict[str, str]]:
    from pyinf.ops import registry

    return registry.describe()


# ------------------------------------------------------------------------------------------ correctness


def _correctness(shard: str, options: Options) -> Iterator[Item]:
    from pyinf.bench import ODD, cases, check

    op, backend = shard.split(":")
    device = _device(options)
    if op.endswith("_group"):
        yield from _correctness_group(op.removesuffix("_group"), options, device)
        return
    shapes = [s for s in ODD if s.label != "wide"][-4 if backend == "triton" else 0 :] if options.tiny else ODD
    if options.tiny and backend == "triton":  # the interpreter takes seconds where a GPU takes none
        shapes = [s for s in ODD if s.label in ("small", "no tokens", "no sequences")]
    dtypes = ["float32", "float16"] if options.tiny else None
    for case in cases([op], [backend], dtypes, shapes):

        def run(case: Any = case) -> dict[str, Any]:
            found = check(case, device)
            row = {"op": op, "backend": backend, "dtype": case.dtype, "shape": case.shape.label}
            row |= {"variant": case.variant, "layout": case.layout, "state": found.state, "error": found.error}
            return row | {"torch_error": found.torch_error, "allowed": found.allowed, "reason": found.reason}

        yield str(case), run


def _correctness_group(op: str, options: Options, device: Any) -> Iterator[Item]:
    from pyinf.bench.grouped import SHAPES, check_group
    from pyinf.bench.verify import DTYPES

    for dtype in ("float32", "float16") if options.tiny else DTYPES:
        for shape in ((40, 24),) if options.tiny else SHAPES:

            def run(dtype: str = dtype, shape: tuple[int, int] = shape) -> dict[str, Any]:
                found = check_group(op, dtype, shape, device)
                row = {"op": f"{op}_group", "backend": "triton", "dtype": dtype, "shape": f"{shape[0]}x{shape[1]}"}
                row |= {"variant": "", "layout": "contiguous", "state": found.state, "error": found.error}
                return row | {"torch_error": found.torch_error, "allowed": found.allowed, "reason": found.reason}

            yield f"{op}_group / triton / {dtype} / {shape[0]}x{shape[1]}", run


# ------------------------------------------------------------------------------------------ microbenchmarks


_FIRST = ("llama-8b.up_proj", "llama-1b.up_proj", "gpt2.c_fc", "llama-8b.q_proj", "llama-1b.q_proj", "gpt2.c_attn")


def bench_targets(options: Options) -> list[Any]:
    """Targets, those that the bars of the design speak of first; a time that ends early cuts the tail."""
    from pyinf.bench import MODELS, OPS, model_shapes, parse_shape, targets

    if options.tiny:
        text = "d_out=24,d_in=16,length=8,sequences=2,queries=3,rank=2,rows=64,width=32,k=4,sketch=8,query_length=4"
        return list(targets(list(OPS), parse_shape(text), ["float32"]))
    shapes = {s.label: s for model in MODELS for s in model_shapes(model)}
    first = [shapes[label] for label in _FIRST]
    rest = [s for label, s in shapes.items() if label not in _FIRST]
    by_shape = itertools.chain(
        *(targets(list(OPS), [s], ["bfloat16"]) for s in first),
        *(targets(list(OPS), [s], ["float32", "float32 tf32x3", "float16"]) for s in first[1:2]),
        *(targets(list(OPS), [s], ["bfloat16"]) for s in rest),
    )
    seen: set[tuple[str, ...]] = set()
    found = []
    from pyinf.bench.measure import sizes_of

    for t in by_shape:
        key = (t.op, t.variant, t.dtype, sizes_of(t.op, t.shape))
        if key not in seen:
            seen.add(key)
            found.append(t)
    return found


def _bench(shard: str, options: Options) -> Iterator[Item]:
    from pyinf.bench import Clock, measure
    from pyinf.bench.timing import ceilings

    device = _device(options)
    clock = Clock(device)
    known = ceilings(clock, 128 if options.tiny else None, 0.02 if options.tiny else 0.2)
    names = ["torch", "triton", "cuda", "fast_jl", "sjlt"] if options.gpu else ["torch", "cpu"]
    yield "ceilings", lambda: known
    yield from _bench_grouped(options, clock, known)
    for target in bench_targets(options):

        def run(target: Any = target) -> list[dict[str, Any]]:
            rows = measure(target, names, clock, known, 0.01 if options.tiny else 0.15)
            return [dataclasses.asdict(r) for r in rows if not r.note.startswith(f"cannot run: {r.provider} does ")]

        yield str(target), run


def _bench_grouped(options: Options, clock: Any, known: dict[str, float]) -> Iterator[Item]:
    """The layers of a small model (GPT-2's twelve of a kind, eight sequences of 512), one by one and in one launch; of
    scores the three layers of an attention block that read one input."""
    from pyinf.bench.grouped import GROUPED, PROVIDERS, measure_grouped

    names = [n for n in PROVIDERS if n.split()[0] in gpu_backends(options) or n == "torch"]
    shapes = ((24, 16),) if options.tiny else ((768, 768), (3072, 768))
    lengths, seconds = ((5, 3), 0.01) if options.tiny else ((512,) * 8, 0.15)
    for op in GROUPED:
        layers = 2 if options.tiny else 3 if op == "low_rank_scores" else 12
        for shape in shapes:

            def run(op: str = op, shape: tuple[int, int] = shape, layers: int = layers) -> list[dict[str, Any]]:
                dtype = "float32" if options.tiny else "bfloat16"
                rows = measure_grouped(op, shape, layers, lengths, dtype, clock, known, names, seconds)
                return [dataclasses.asdict(r) for r in rows]

            yield f"{op}_group {shape[0]}x{shape[1]}", run


# ------------------------------------------------------------------------------------------ the others


def _special(shard: str, options: Options) -> Iterator[Item]:
    from benchmarks.gpu import special

    return special.items(shard, options)


def _special_shards(options: Options) -> list[str]:
    from benchmarks.gpu import special

    return special.shards(options)


def _sanitizer(shard: str, options: Options) -> Iterator[Item]:
    from benchmarks.gpu import sanitizer

    return sanitizer.items(shard, options)


def _sanitizer_shards(options: Options) -> list[str]:
    from benchmarks.gpu import sanitizer

    return sanitizer.shards(options)


def _end_to_end(shard: str, options: Options) -> Iterator[Item]:
    from benchmarks.gpu import end_to_end

    return end_to_end.items(shard, options)


def _eigen(shard: str, options: Options) -> Iterator[Item]:
    from benchmarks.gpu import eigen

    return eigen.items(shard, options)


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            "build", 100, "compile pyinf._C for this card's architecture only", "nvcc, a C++ compiler, ninja, pybind11"
        ),
        Part(
            "environment",
            30,
            "versions, card, driver; copy rate; bf16, fp16, tf32 and fp32 matrix rates",
            "torch that sees the card",
            limit=30,
            items=_environment,
        ),
        Part(
            "correctness",
            100,
            "every op, backend, dtype, odd shape and layout against float64: error at most twice plain torch's, "
            "poisoned memory, twice the same bits, nothing beside the outputs written; grouped launches too",
            "triton; the extension for the CUDA kernels",
            limit=40,
            workers=12,
            stretch=1.8,
            shards=judged_pairs,
            items=_correctness,
        ),
        Part(
            "special",
            50,
            "a side stream, CUDA graph capture and replay, offsets past 2^31 elements",
            "32 GiB of GPU memory for the offsets",
            limit=30,
            workers=4,
            shards=_special_shards,
            items=_special,
        ),
        Part(
            "sanitizer",
            65,
            "compute-sanitizer memcheck, synccheck and racecheck on small shapes, with a planted error as control",
            "compute-sanitizer on the PATH (skipped, and said so, where it is not)",
            limit=60,
            workers=7,
            shards=_sanitizer_shards,
            items=_sanitizer,
        ),
        Part(
            "end_to_end",
            75,
            "fit and score on random Llamas of 160M and 1B parameters, stage by stage, torch against auto",
            "transformers",
            limit=45,
            shards=lambda options: ["160m", "1b"],
            items=_end_to_end,
        ),
        Part(
            "eigen",
            40,
            "eigensolvers: seconds and residuals by size; batched against one at a time",
            "nothing else",
            limit=25,
            items=_eigen,
        ),
        Part(
            "bench",
            50,
            "twelve small layers one by one and in one launch; every op on the layers of GPT-2, Llama-3.2-1B and "
            "Llama-3-8B by provider; takes what time is left",
            "nothing else; fast_jl and sjlt where installed",
            limit=40,
            items=_bench,
        ),
    )
}
"""In the order in which they run."""
