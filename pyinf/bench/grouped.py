"""Verification and speed of the launches that serve several layers (pyinf/ops/grouped.py): many layers of one shape in
one kernel, or the layers that read one input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyinf.bench.measure import Row, share_of_ceiling
from pyinf.bench.timing import Clock
from pyinf.bench.verify import DTYPES, FLOOR, LONG_SUMS, TF32_FLOOR, multiplying, poisoned, torch_tf32
from pyinf.ops import grouped, reference, registry

__all__ = ["GROUPED", "PROVIDERS", "SHAPES", "GroupOutcome", "check_group", "measure_grouped", "verify_grouped"]

GROUPED = ("accumulate_covariance", "accumulate_squared_gradients", "low_rank_scores")
"""Ops with a kernel of several layers; their records are kept under "<op>_group"."""
SHAPES = ((768, 768), (131, 77))
"""(d_out, d_in) of the layers that are verified."""
PROVIDERS = ("torch", "triton", "triton grouped")
"""One layer after the other in plain torch, or by the Triton kernel of a layer; all layers in one launch."""

_OFFSETS = (0, 5, 5, 305, 306, 370, 881)
_LAYERS = 5
_QUERIES, _RANK = 4, 16


@dataclasses.dataclass(frozen=True)
class Layers:
    """Inputs of a call: g and a of every layer (one a for all of low_rank_scores), and factored queries for that."""

    op: str
    g: list[Tensor]
    a: list[Tensor]
    offsets: Tensor
    L: list[Tensor]
    R: list[Tensor]

    def totals(self) -> list[Tensor]:
        """What is added to, zero."""
        (d_out, d_in), device = (self.g[0].shape[1], self.a[0].shape[1]), self.a[0].device
        if self.op == "low_rank_scores":
            return [torch.zeros(_QUERIES, self.offsets.numel() - 1, device=device)]
        size = (d_out, d_in) if self.op == "accumulate_squared_gradients" else (d_in, d_in)
        return [torch.zeros(size, device=device) for _ in self.g]

    def add(self, totals: Sequence[Tensor]) -> None:
        """The call that may take all layers together."""
        if self.op == "low_rank_scores":
            layers = list(zip(self.g, self.L, self.R, strict=True))
            grouped.low_rank_scores_group(totals[0], layers, self.a[0], self.offsets)
        elif self.op == "accumulate_squared_gradients":
            grouped.accumulate_squared_gradients_group(totals, self.g, self.a, self.offsets)
        else:
            grouped.accumulate_covariance_group(totals, self.a, [False] * len(self.a))

    def add_one_by_one(self, totals: Sequence[Tensor]) -> None:
        """A call for each layer."""
        for i, g in enumerate(self.g):
            if self.op == "low_rank_scores":
                torch.ops.pyinf.low_rank_scores(totals[0], g, self.a[0], self.offsets, self.L[i], self.R[i])
            elif self.op == "accumulate_squared_gradients":
                torch.ops.pyinf.accumulate_squared_gradients(totals[i], g, self.a[i], self.offsets)
            else:
                torch.ops.pyinf.accumulate_covariance(totals[i], self.a[i], False, None)

    def exact(self) -> list[Tensor]:
        """The results in float64, on the CPU."""
        totals = [total.double().cpu() for total in self.totals()]
        a, offsets = [x.double().cpu() for x in self.a], self.offsets.cpu()
        for i, g in enumerate(x.double().cpu() for x in self.g):
            if self.op == "low_rank_scores":
                reference.low_rank_scores(
                    totals[0], g, a[0], offsets, self.L[i].double().cpu(), self.R[i].double().cpu()
                )
            elif self.op == "accumulate_squared_gradients":
                reference.accumulate_squared_gradients(totals[i], g, a[i], offsets)
            else:
                reference.accumulate_covariance(totals[i], a[i])
        return self.defined(totals)

    def defined(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Of a covariance the lower triangle is defined."""
        return [total.tril() if self.op == "accumulate_covariance" else total for total in totals]

    def taken(self) -> bool:
        """Whether the kernel of several layers serves this: where it does not, the layers are walked one by one, which
        proves nothing."""
        with registry.use_backend("triton", self.op):
            if self.op == "low_rank_scores":
                return grouped.shares_inputs(self.a[0])
            operands = (self.g[0], self.a[0]) if self.op == "accumulate_squared_gradients" else (self.a[0],)
            return grouped.kernel_serves(self.op, (self.totals()[0], *operands))


Run = Callable[[Layers], list[Tensor]]


def _inputs(
    op: str, shape: tuple[int, int], layers: int, offsets: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Layers:
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = shape

    def draw(count: int, *size: int) -> list[Tensor]:
        return [torch.randn(*size, generator=generator).to(device, dtype) for _ in range(count)]

    scores = op == "low_rank_scores"
    g, a = draw(layers, offsets[-1], d_out), draw(1 if scores else layers, offsets[-1], d_in)
    factors = draw(layers, _QUERIES, d_out, _RANK), draw(layers, _QUERIES, _RANK, d_in)
    return Layers(op, g, a, torch.tensor(offsets), *(factors if scores else ([], [])))


@dataclasses.dataclass(frozen=True)
class GroupOutcome:
    """What came of one call on several layers: "ok", "WRONG" or "not taken", with the largest error over results."""

    op: str
    dtype: str
    shape: tuple[int, int]
    state: str
    error: float
    torch_error: float
    allowed: float
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.state}: {self.op}_group / triton / {self.dtype} / {_LAYERS} x {self.shape[0]}x{self.shape[1]}"
        if self.state == "not taken":
            return f"{text}: {self.reason}"
        text += f": error {self.error:.1e}, plain torch {self.torch_error:.1e}"
        return f"{text}; {self.reason}" if self.reason else text


def _error(outs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error; infinite for NaN."""
    found = [float((out.double().cpu() - ref).norm() / ref.norm()) for out, ref in zip(outs, exact, strict=True)]
    return max(error if error == error else float("inf") for error in found)


def _floor(op: str, mode: str) -> float:
    return TF32_FLOOR if mode == "tf32" else LONG_SUMS.get(op, FLOOR)


def _run(layers: Layers) -> list[Tensor]:
    totals = layers.totals()
    layers.add(totals)
    return totals


def check_group(op: str, dtype: str, shape: tuple[int, int], device: torch.device, run: Run = _run) -> GroupOutcome:
    """The kernel of several layers of ``op``, on five of one shape ``(d_out, d_in)``, against float64.

    It passes where the largest error ``‖out − ref‖/‖ref‖`` is at most twice that of the same layers one by one in plain
    torch (or the floor of the op; 1e-3 in tf32), with the same bits twice; uninitialised memory is full of NaN.
    ``dtype``: a key of ``verify.DTYPES``. ``run`` makes the call.
    """
    kind, mode = DTYPES[dtype]
    layers = _inputs(op, shape, _LAYERS, _OFFSETS, kind, device)
    if not layers.taken():
        return GroupOutcome(op, dtype, shape, "not taken", 0.0, 0.0, 0.0, "no kernel takes these layers together")
    exact = layers.exact()
    with registry.use_backend("torch", op), torch_tf32(mode == "tf32"):
        plain = layers.totals()
        layers.add_one_by_one(plain)
    with registry.use_backend("triton", op), multiplying(mode), poisoned():
        twice = [layers.defined(run(layers)) for _ in range(2)]
    error, torch_error = _error(twice[0], exact), _error(layers.defined(plain), exact)
    allowed = max(2 * torch_error, _floor(op, mode))
    wrong = [] if error <= allowed else [f"allowed {allowed:.1e}"]
    if not all(torch.equal(x, y) for x, y in zip(*twice, strict=True)):
        wrong.append("a second run gave other bits")
    return GroupOutcome(op, dtype, shape, "WRONG" if wrong else "ok", error, torch_error, allowed, "; ".join(wrong))


def verify_grouped(
    op: str,
    device: torch.device,
    dtypes: Sequence[str] = tuple(DTYPES),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    run: Run = _run,
) -> tuple[bool, list[str]]:
    """:func:`check_group` on every dtype and shape: ``(passed, lines)``, one line each. It passes where no call is
    wrong and at least one was taken.
    """
    found = [check_group(op, dtype, shape, device, run) for dtype in dtypes for shape in shapes]
    states = {outcome.state for outcome in found}
    return "ok" in states and "WRONG" not in states, [str(outcome) for outcome in found]


def _work(op: str, shape: tuple[int, int], layers: int, rows: int, itemsize: int) -> tuple[float, float]:
    """(operations, bytes) of a call: the fewest that there are."""
    d_out, d_in = shape
    if op == "low_rank_scores":
        factors = layers * _QUERIES * _RANK * (d_out + d_in)
        read = rows * (layers * d_out + d_in) + factors
        return 2.0 * rows * layers * (d_out + d_in + 1) * _QUERIES * _RANK, float(itemsize * read)
    if op == "accumulate_squared_gradients":
        return 2.0 * layers * rows * d_out * d_in, float(layers * (rows * (d_out + d_in) * itemsize + 8 * d_out * d_in))
    return 1.0 * layers * rows * d_in * (d_in + 1), float(layers * (rows * d_in * itemsize + 4 * d_in * (d_in + 1)))


def measure_grouped(
    op: str,
    shape: tuple[int, int],
    layers: int,
    lengths: Sequence[int],
    dtype: str,
    clock: Clock,
    ceilings: dict[str, float],
    providers: Sequence[str] = PROVIDERS,
    seconds: float = 0.2,
) -> list[Row]:
    """Time of ``layers`` layers of one shape ``(d_out, d_in)`` by each provider; no speed where values are wrong.

    ``lengths``: tokens of each sequence. Operations: ``L·N·d_in(d_in + 1)`` (one triangle), ``2·L·N·d_out·d_in``, or
    ``2·L·N(d_in + d_out + 1)·Q·r`` for four queries of rank 16.
    """
    kind, mode = DTYPES[dtype]
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    inputs = _inputs(op, shape, layers, offsets, kind, clock.device)
    exact = inputs.exact()
    flops, moved = _work(op, shape, layers, offsets[-1], kind.itemsize)
    found, torch_time, allowed = [], None, None
    for provider in providers:
        together, backend = provider == "triton grouped", "torch" if provider == "torch" else "triton"
        add, note, timing, error = inputs.add if together else inputs.add_one_by_one, "", None, None
        with registry.use_backend(backend, op), multiplying(mode), torch_tf32(mode == "tf32"):
            if together and not inputs.taken():
                note = "cannot run: no kernel takes these layers together"
            else:
                totals = inputs.totals()
                add(totals)
                error = _error(inputs.defined(totals), exact)
                allowed = max(2 * error, _floor(op, mode)) if provider == "torch" else allowed
                if allowed is not None and not error <= allowed:
                    note = f"no speed: values are wrong (error {error:.1e}, allowed {allowed:.1e})"
                else:
                    timing = clock.measure([lambda add=add, totals=totals: add(totals)], seconds)
        torch_time = timing.median if provider == "torch" and timing else torch_time
        limit, share = share_of_ceiling(timing, flops, moved, dtype, ceilings)
        sizes = f"layers={layers} d_out={shape[0]} d_in={shape[1]} tokens={offsets[-1]} sequences={len(lengths)}"
        if op == "low_rank_scores":
            sizes += f" queries={_QUERIES} rank={_RANK}"
        found.append(
            Row(
                op=f"{op}_group",
                variant="",
                shape=f"{layers} layers of {shape[0]}x{shape[1]}",
                sizes=sizes,
                dtype=dtype,
                provider=provider,
                formulation="",
                auto="",
                median_ms=timing and timing.median * 1e3,
                low_ms=timing and timing.low * 1e3,
                high_ms=timing and timing.high * 1e3,
                runs=timing and timing.runs,
                tflops=timing and flops / timing.median / 1e12,
                gb_per_s=timing and moved / timing.median / 1e9,
                limit=limit,
                percent_of_ceiling=share,
                ratio_to_torch=torch_time / timing.median if timing and torch_time else None,
                error=error,
                allowed_error=allowed,
                flops=flops,
                bytes=moved,
                note=note,
            )
        )
    return found
