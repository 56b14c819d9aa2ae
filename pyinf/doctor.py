"""What runs on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyinf._version import __version__
from pyinf.errors import BackendUnavailableError, PyinfError

if TYPE_CHECKING:
    import torch

__all__ = ["Report", "doctor", "verify_kernels"]

_PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "tokenizers", "datasets", "peft")
_ISA = ("generic", "avx2", "avx512", "avx512bf16")


@dataclass(frozen=True)
class Report:
    """What :func:`doctor` found; ``str(report)`` is the text, the fields are for programs.

    ``ops`` maps each op to its backends, in the order in which "auto" asks them, and each backend to "available" or the
    reason why it is not. For a given call "auto" also looks at dtype, device and shape.
    """

    versions: dict[str, str]
    machine: dict[str, str]
    build: dict[str, Any] | None
    build_error: str | None
    devices: list[str]
    device_note: str
    ops: dict[str, dict[str, str]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"pyinf {__version__}", ""]
        lines += _block("versions", self.versions)
        lines += _block("machine", self.machine)
        if self.build is None:
            lines += _block("extension pyinf._C", {"not loaded": self.build_error or "unknown reason"})
        else:
            lines += _block("extension pyinf._C", _build_rows(self.build))
        gpus = {f"GPU {i}": name for i, name in enumerate(self.devices)} or {"none": self.device_note}
        lines += _block("GPU", gpus)
        have = {op: " ".join(b for b, s in row.items() if s == "available") for op, row in self.ops.items()}
        lines += _block("ops and the backends that serve them here", have)
        lines += ["backends"]
        for backend, served, reasons in _by_backend(self.ops):
            lines.append(f"  {backend}: {', '.join(served) if served else 'serves no op here'}")
            lines += [f"    not {', '.join(ops)}: {reason}" for reason, ops in reasons.items()]
        if self.checks:
            lines += ["", "checks", *(f"  {line}" for line in self.checks)]
        return "\n".join(lines)

    __repr__ = __str__


def _block(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [title, *(f"  {key:{width}}  {value}" for key, value in rows.items()), ""]


def _build_rows(build: dict[str, Any]) -> dict[str, str]:
    nvcc = f"nvcc {build['nvcc']}, {' '.join(build['cuda_archs'])}" if build["cuda"] else "not built"
    return {
        "git": build["git_hash"],
        "compiler": build["compiler"]
        + (", debug" if build["debug"] else "")
        + ("" if build["openmp"] else ", no OpenMP"),
        "CPU levels": f"generic {' '.join(build['cpu_isa'])}; this processor runs {_ISA[build['cpu_isa_here']]}",
        "CUDA": nvcc,
    }


def _by_backend(ops: dict[str, dict[str, str]]) -> list[tuple[str, list[str], dict[str, list[str]]]]:
    backends = list(dict.fromkeys(backend for row in ops.values() for backend in row))
    table = []
    for backend in backends:
        served = [op for op, row in ops.items() if row.get(backend) == "available"]
        reasons: dict[str, list[str]] = {}
        for op, row in ops.items():
            if backend in row and row[backend] != "available":
                reasons.setdefault(row[backend], []).append(op)
        table.append((backend, ["all ops"] if len(served) == len(ops) else served, reasons))
    return table


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> tuple[list[str], str]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return [], "no GPU that torch can use" if built else "no GPU: this torch was built for the CPU only"
    names = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        names.append(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return names, ""


def doctor(verify: bool = False) -> Report:
    """Look at what runs on this machine: versions, the compiled extension, GPUs, and every op's backends with reasons.

    ``verify=True`` also runs every CUDA and Triton kernel on every GPU that torch sees and compares it with float64
    (pyinf/bench/verify.py); each that passes is remembered for that card and version, and "auto" takes it from then
    on. Raises :class:`~pyinf.errors.BackendUnavailableError` without a GPU or without a kernel for one, and
    ``PyinfError`` naming the kernels whose values are wrong: these stay off. Works without a driver and without the
    extension.
    """
    import torch

    from pyinf import ops

    build, build_error = None, None
    try:
        from pyinf import _C

        build = _C.build_config()
    except ImportError as error:
        build_error = f"{error}; `pip install .` in a checkout builds it"
    devices, note = _devices()
    machine = {
        "system": platform.platform(),
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "backend": ops.registry.current_backend(),
    }
    checks: list[str] = []
    table = ops.registry.describe()
    if verify:
        if not devices:
            raise BackendUnavailableError(
                f"nothing to verify: {note}; run `pyinf doctor --verify` on a machine with one"
            )
        backends = _gpu_backends(table)
        details = {"git": build["git_hash"] if build else "unknown", "torch": torch.__version__}
        details["triton"] = _versions()["triton"]
        wrong: list[str] = []
        for i in range(len(devices)):
            found, failed = verify_kernels(torch.device("cuda", i), backends, details)
            checks += found
            wrong += failed
        if wrong:
            raise PyinfError(
                "kernels that give wrong values here stay off; those that passed are remembered: " + "; ".join(wrong)
            )
        checks.append(f"remembered in {ops.verified.user_file()}")
    return Report(_versions(), machine, build, build_error, devices, note, table, checks)


def _gpu_backends(table: dict[str, dict[str, str]]) -> list[str]:
    """Backends of GPU kernels that have at least one op here. Raises when none has, with the reasons."""
    have = [b for b in ("cuda", "triton") if any(row.get(b) == "available" for row in table.values())]
    if not have:
        reasons = {b: next(iter(dict.fromkeys(row[b] for row in table.values()))) for b in ("cuda", "triton")}
        raise BackendUnavailableError(
            "nothing to verify: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )
    return have


def verify_kernels(
    device: torch.device, backends: Sequence[str], details: dict[str, Any], ops: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """Verify every op of ``backends`` on ``device``, one op and backend after the other.

    Each that passes is remembered at once for this card and version; what an earlier run remembered of one that fails
    is struck from the user's record. ``details`` goes into the record. Returns (a line for each op, backend and dtype;
    what is wrong). After an error that ends the CUDA context the rest cannot be checked here: it is named in what is
    wrong.
    """
    from pyinf import bench
    from pyinf.bench.grouped import GROUPED
    from pyinf.bench.machine import card_name
    from pyinf.ops import verified

    card = card_name(device)
    lines: list[str] = []
    wrong: list[str] = []
    pairs = dict.fromkeys((case.op, case.backend) for case in bench.cases(ops, backends))
    for op, backend in pairs:
        try:
            outcomes = bench.verify_all(device, bench.cases([op], [backend]))
        except Exception as error:
            verified.forget(op, card, backend)
            reason = (str(error).splitlines() or [""])[0]
            wrong.append(f"{op} {backend} broke {device} ({reason}); nothing after it was checked in this process")
            break
        state = bench.verified_ops(outcomes)[op, backend]
        summary = [_summary(outcomes, op, backend, dtype, device) for dtype in bench.DTYPES]
        lines += [line for line in summary if line]
        if state == "verified":
            verified.record(op, card, {**details, "cases": [line for line in summary if line]}, backend)
        elif state.startswith("takes no call"):
            lines.append(f"not verified: {device} {op} {backend} {state}")
        else:
            verified.forget(op, card, backend)
            wrong.append(f"{op} {backend}: {state}")
        if backend == "triton" and op in GROUPED and state == "verified":
            _verify_group(op, device, card, details, lines, wrong)
    return lines, wrong


def _verify_group(
    op: str, device: torch.device, card: str, details: dict[str, Any], lines: list[str], wrong: list[str]
) -> None:
    """The launch that serves many layers at once has a record of its own."""
    from pyinf.bench.grouped import verify_grouped
    from pyinf.ops import verified

    passed, found = verify_grouped(op, device)
    lines += found
    if passed:
        verified.record(f"{op}_group", card, {**details, "cases": found}, "triton")
    else:
        verified.forget(f"{op}_group", card, "triton")
        wrong += [line for line in found if line.startswith("WRONG")]


def _summary(outcomes: list[Any], op: str, backend: str, dtype: str, device: torch.device) -> str:
    own = [o for o in outcomes if o.case.dtype == dtype]
    done = [o for o in own if o.state != "not taken"]
    if not done:
        return ""
    wrong = sum(o.state == "WRONG" for o in done)
    worst = max(done, key=lambda o: o.error)
    text = f"{'WRONG' if wrong else 'ok'} {device} {op} {backend} {dtype}: {len(done) - wrong} of {len(done)} calls"
    return f"{text}, largest error {worst.error:.1e} where plain torch has {worst.torch_error:.1e}"
