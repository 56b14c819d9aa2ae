"""Are the values right? Any backend of any op against float64, on the device at hand.

A call passes when its error ``‖out − ref‖/‖ref‖`` is at most twice that of plain torch on the same inputs in the same
dtype, or under a small floor; when it is finite; when a second run gives the same bits; and when it wrote nothing
besides its outputs. Uninitialised memory is full of NaN while it runs. A reason why a backend does not take a call is
no failure, but an op of which no call was taken is not verified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyinf.bench import formulations
from pyinf.bench.cases import LAYOUTS, OPS, Inputs, backends, call, supports
from pyinf.bench.shapes import ODD, Shape
from pyinf.ops import precision, reference, unpack_signs

__all__ = [
    "DTYPES",
    "Case",
    "Outcome",
    "cases",
    "check",
    "copies",
    "errors",
    "exact_result",
    "poisoned",
    "result_of",
    "torch_tf32",
    "verified_ops",
    "verify_all",
]

DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "ieee"),
    "float32 tf32x3": (torch.float32, "tf32x3"),
    "float32 tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
}
"""What is verified: a dtype of inputs and, for float32, how the Triton kernels multiply them."""

FLOOR = 1e-6
LONG_SUMS = {"dense_scores": 5e-6, "low_rank_scores": 2e-5, "gradient_dot": 5e-6, "random_projection": 2e-6}
"""Floors where very many terms end in very few numbers: such an error is chance in any one run, torch's included."""
CEILING = {"float32": 3e-5, "float32 tf32x3": 3e-5, "float32 tf32": 5e-3, "float16": 5e-3, "bfloat16": 3e-2}
TF32_FLOOR = 1e-3
_WHOLE = 1 << 26  # elements of a random matrix that the reference may hold


@dataclasses.dataclass(frozen=True)
class Case:
    """One call that is judged: an op, a backend, and the inputs that it gets."""

    op: str
    backend: str
    shape: Shape
    dtype: str = "float32"
    variant: str = ""
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        parts = [self.op, self.backend, self.dtype, self.shape.label, self.variant, self.layout]
        return " / ".join(p for p in parts if p)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case: "ok", "WRONG" (with what is wrong), or "not taken" (with the backend's reason)."""

    case: Case
    state: str
    error: float = 0.0
    torch_error: float = 0.0
    allowed: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.state}: {self.case}"
        if self.state == "not taken":
            return f"{text}: {self.reason}"
        text += f": error {self.error:.1e}, plain torch {self.torch_error:.1e}"
        return f"{text}; {self.reason}" if self.reason else text


def cases(
    ops: Sequence[str] | None = None,
    of: Sequence[str] = ("triton", "cuda"),
    dtypes: Sequence[str] | None = None,
    shapes: Sequence[Shape] = ODD,
    layouts: Sequence[str] = LAYOUTS,
) -> Iterator[Case]:
    """Every case of the backends in ``of`` that are registered: all variants of all shapes, dense; other layouts and
    dtypes on the "odd" shape of ``shapes`` (their first where there is none)."""
    odd = next((s for s in shapes if s.label == "odd"), shapes[0])
    for op in ops if ops is not None else OPS:
        for backend in of:
            if backend not in backends(op):
                continue
            for dtype in dtypes if dtypes is not None else DTYPES:
                if dtype.startswith("float32 ") and backend != "triton":
                    continue  # the setting concerns Triton kernels alone
                for shape in shapes:
                    for variant in OPS[op].variants:
                        yield Case(op, backend, shape, dtype, variant)
                for layout in layouts:
                    if layout != "contiguous":
                        for variant in OPS[op].variants:
                            yield Case(op, backend, odd, dtype, variant, layout)


# ------------------------------------------------------------------------------------------ judging


def _double(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def copies(op: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments, with the accumulator copied (keeping its strides)."""
    if not OPS[op].accumulates:
        return tuple(args)
    first = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype, device=args[0].device)
    first.copy_(args[0])
    return first, *args[1:]


def exact_result(op: str, args: Sequence[Any]) -> list[Tensor]:
    """What the op should give, in float64, on the very values of ``args``.

    For ``precondition_low_rank`` the dense preconditioned gradients; for ``scan_topk`` all scores.
    """
    wide = _double(args)
    if op == "accumulate_covariance":
        C = wide[0].clone()
        reference.accumulate_covariance(C, *wide[1:])
        return [C.tril()]
    if OPS[op].accumulates:
        first = wide[0].clone()
        getattr(reference, op)(first, *wide[1:])
        return [first]
    if op == "precondition_low_rank":
        g, a, offsets, U_S, U_A, Lam, damping = wide[:7]
        return [reference.precondition(reference._gradients(g, a, offsets), U_S, U_A, Lam, damping)]
    if op == "scan_topk":
        queries, rows, _, format, scale = wide
        count = rows.shape[0]
        if format == "bfloat16":
            scores = queries @ rows.T
        elif format == "int8":
            scores = queries @ rows.double().T
        else:
            bits = queries.shape[1] * (8 if queries.dtype == torch.uint8 else 1)
            signs = unpack_signs(queries, bits) if queries.dtype == torch.uint8 else torch.where(queries < 0, -1.0, 1.0)
            scores = signs.double() @ unpack_signs(rows, bits, torch.float64).T
        return [(scores if scale is None else scores * scale).view(queries.shape[0], count)]
    if op == "project_gradients":
        return [reference.project_gradients(*wide[:-1], "float32")[0]]
    if op in ("random_projection", "sparse_projection") and args[0].shape[1] * args[1] > _WHOLE:
        return [call(op, "torch", wide)]
    if op == "sparse_projection_factors":
        g, a, offsets, *rest = wide
        return [call("sparse_projection", "torch", (reference._gradients(g, a, offsets).flatten(1), *rest))]
    made = getattr(reference, op)(*wide)
    return [made] if isinstance(made, Tensor) else list(made)


def result_of(op: str, run: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    """Run it on a copy of the accumulator; its outputs."""
    own = copies(op, args)
    made = run(*own)
    if OPS[op].accumulates:
        return [own[0].tril() if op == "accumulate_covariance" else own[0]]
    if op == "project_gradients":  # the scale is empty where there is none
        return list(made) if args[-1] == "int8" else [made[0]]
    return [made] if isinstance(made, Tensor) else list(made)


def _relative(out: Tensor, ref: Tensor) -> float:
    if out.shape != ref.shape:
        raise ValueError(f"the result is {tuple(out.shape)}, not {tuple(ref.shape)}")
    if out.numel() == 0:
        return 0.0
    norm, off = ref.norm(), (out.double() - ref).norm()
    value = float(off / norm) if norm > 0 else float(off)
    return value if value == value else float("inf")


def errors(op: str, outputs: Sequence[Tensor], exact: Sequence[Tensor], args: Sequence[Any]) -> float:
    """The largest error of the outputs; infinite where one is NaN or infinite, or breaks a promise of the op."""
    if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in outputs):
        return float("inf")
    if op == "precondition_low_rank":
        return _low_rank_error(outputs, exact[0])
    if op == "scan_topk":
        return _scan_error(outputs, exact[0], args)
    if op == "project_gradients" and args[-1] == "sign":
        size = exact[0].shape[1] * exact[0].shape[2]
        signs = unpack_signs(outputs[0], size, torch.float64).view(exact[0].shape)
        return _relative(signs * exact[0].abs(), exact[0])
    if op == "project_gradients" and args[-1] == "int8":
        if not outputs or outputs[0].numel() == 0:
            return 0.0
        values, scale = outputs
        return _relative(values.double() * scale.double()[:, None, None], exact[0])
    return max(_relative(out, ref) for out, ref in zip(outputs, exact, strict=True))


def _low_rank_error(outputs: Sequence[Tensor], dense: Tensor) -> float:
    """What is left of the dense answer, ``‖X − LR‖/‖X‖``; infinite where the energy reported is not what was kept, or
    where LR is no projection of X."""
    L, R, energy = (t.double() for t in outputs)
    worst = 0.0
    for q in range(dense.shape[0]):
        total = float(dense[q].square().sum())
        if total == 0:
            worst = max(worst, float(L[q].norm()) + float(R[q].norm()) + abs(float(energy[q]) - 1))
            continue
        kept = L[q] @ R[q]
        lost, inner = float((dense[q] - kept).square().sum()) / total, float((dense[q] * kept).sum()) / total
        # a projection of X has ⟨X, LR⟩ = ‖LR‖²; and its singular values are to be split evenly
        left, right = L[q].square().sum(0), R[q].square().sum(1)
        uneven = float((left - right).abs().max() / right.max().clamp_min(1e-300)) if right.numel() else 0.0
        off = max(abs(float(energy[q]) - (1 - lost)), abs(inner - float(kept.square().sum()) / total), uneven)
        if not off <= 2e-2:
            return float("inf")
        worst = max(worst, lost**0.5)
    return worst


def _scan_error(outputs: Sequence[Tensor], scores: Tensor, args: Sequence[Any]) -> float:
    """Values against the best scores, and against the scores at the indices given; 1-bit results must be exact."""
    values, indices = outputs
    k = min(args[2], scores.shape[1])
    if values.shape != (scores.shape[0], k) or indices.shape != values.shape or indices.dtype != torch.int64:
        return float("inf")
    if values.numel() == 0:
        return 0.0
    if int(indices.min()) < 0 or int(indices.max()) >= scores.shape[1]:
        return float("inf")
    ordered = indices.sort(dim=1).values
    if k > 1 and bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return float("inf")
    best, where = scores.sort(dim=1, descending=True, stable=True)
    if args[3] == "1bit":
        return 0.0 if torch.equal(values.double(), best[:, :k]) and torch.equal(indices, where[:, :k]) else float("inf")
    return max(_relative(values, best[:, :k]), _relative(values, scores.gather(1, indices)))


def allowed_error(case: Case, args: Sequence[Any], exact: Sequence[Tensor]) -> tuple[float, float]:
    """(error of plain torch on these inputs, error that a kernel may have).

    Plain torch is the registry's "torch" backend; where the op chains products and the inputs are half precision, also
    the line a user would write in that dtype.
    """
    spec, (dtype, mode) = OPS[case.op], DTYPES[case.dtype]
    with torch_tf32(mode == "tf32"):
        found = [errors(case.op, result_of(case.op, lambda *a: call(case.op, "torch", a), args), exact, args)]
        line = formulations.plain(case.op)
        drawn = case.op == "random_projection" and case.variant == "normal"
        if drawn:  # ±1 is exact in any dtype, normal numbers are not: whoever holds them in half precision rounds them
            line = formulations.rounded_projection
        if line is not None and (drawn or not spec.sums_in_one) and dtype in (torch.float16, torch.bfloat16):
            with contextlib.suppress(NotImplementedError):
                found.append(errors(case.op, result_of(case.op, line, args), exact, args))
    torch_error = max(e for e in found if e != float("inf")) if min(found) != float("inf") else float("inf")
    floor = LONG_SUMS.get(case.op, FLOOR)
    if mode == "tf32":
        floor = TF32_FLOOR
    if case.op == "precondition_low_rank":
        # judged by what is left of the dense answer, which plain torch leaves too
        return torch_error, torch_error * 1.02 + max(floor, 1e-3 if dtype != torch.float32 else 1e-4)
    if case.op == "project_gradients" and case.variant in ("int8", "sign", "bfloat16"):
        return torch_error, max(2 * torch_error, 1e-2)  # set by the format of the result
    return torch_error, min(max(2 * torch_error, floor), max(CEILING[case.dtype], floor))


@contextlib.contextmanager
def torch_tf32(on: bool) -> Iterator[None]:
    """While it lasts, torch multiplies float32 in tf32, or exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """While it lasts, memory that torch hands out uninitialised is full of NaN (or the largest integer)."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    # the public function imports torch's compiler, which takes seconds in every process
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


@contextlib.contextmanager
def multiplying(mode: str) -> Iterator[None]:
    """How Triton kernels multiply float32, for a while."""
    before = precision.set_float32_precision(mode)
    try:
        yield
    finally:
        precision.set_float32_precision(before)


def check(case: Case, device: torch.device, repeats: int = 2) -> Outcome:
    """Run one case and judge it. Exceptions of the backend pass through: a crash is not a wrong value."""
    dtype, mode = DTYPES[case.dtype]
    inputs = Inputs(dtype, device, case.layout, case.seed)
    args = OPS[case.op].make(inputs, case.shape, case.variant)
    reason = supports(case.op, case.backend, args)
    if reason is not None:
        return Outcome(case, "not taken", reason=reason)
    exact = exact_result(case.op, args)
    torch_error, allowed = allowed_error(case, args, exact)
    held = [(x, x.clone()) for x in args[OPS[case.op].accumulates :] if isinstance(x, Tensor)]
    kept = [gap.clone() for gap in inputs.guards]
    with multiplying(mode), poisoned():
        runs = [result_of(case.op, lambda *a: call(case.op, case.backend, a), args) for _ in range(repeats)]
        if inputs.guards:  # copies are dense between their rows: this run goes into the padded buffer itself
            call(case.op, case.backend, args)
    error = errors(case.op, runs[0], exact, args)
    wrong = []
    if not error <= allowed:
        wrong.append(f"allowed {allowed:.1e}")
    if any(not torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True)):
        wrong.append("a second run gave other bits")
    if any(not torch.equal(x, before) for x, before in held):
        wrong.append("an input was changed")
    if any(not torch.equal(gap, before) for gap, before in zip(inputs.guards, kept, strict=True)):
        wrong.append("memory beside the output was written")
    return Outcome(case, "WRONG" if wrong else "ok", error, torch_error, allowed, "; ".join(wrong))


# ------------------------------------------------------------------------------------------ everything


def verify_all(
    device: torch.device,
    chosen: Iterator[Case] | None = None,
    watch: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Check every case (all of :func:`cases` by default) on ``device``.

    A case whose backend raises counts as WRONG with the exception as its reason; after an error of the CUDA context
    itself nothing more can be run in this process, and the exception passes through.
    """
    found = []
    for case in chosen if chosen is not None else cases():
        try:
            outcome = check(case, device)
        except Exception as error:
            outcome = Outcome(case, "WRONG", float("inf"), reason=f"{type(error).__name__}: {_first_line(error)}")
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the context is gone
        found.append(outcome)
        if watch is not None:
            watch(outcome)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def verified_ops(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], str]:
    """For each (op, backend): "verified", or why it is not."""
    found: dict[tuple[str, str], str] = {}
    for key in dict.fromkeys((o.case.op, o.case.backend) for o in outcomes):
        own = [o for o in outcomes if (o.case.op, o.case.backend) == key]
        wrong = [o for o in own if o.state == "WRONG"]
        if wrong:
            found[key] = f"{len(wrong)} of {len(own)} calls are wrong; the first: {wrong[0]}"
        elif not any(o.state == "ok" for o in own):
            found[key] = f"takes no call here: {own[0].reason}"
        else:
            found[key] = "verified"
    return found
