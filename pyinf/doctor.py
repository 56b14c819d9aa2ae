"""What runs on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from typing import Any

from pyinf._version import __version__
from pyinf.errors import BackendUnavailableError, PyinfError

__all__ = ["Report", "doctor"]

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

    ``verify=True`` also runs the CUDA kernels on every GPU that torch sees and compares them with float64; those that
    pass are remembered for that card and version, and "auto" takes them from then on. Raises
    :class:`~pyinf.errors.BackendUnavailableError` without a GPU, ``PyinfError`` where a value is wrong. Works without
    a driver and without the extension.
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
    if verify:
        if not devices:
            raise BackendUnavailableError(
                f"nothing to verify: {note}; run `pyinf doctor --verify` on a machine with one"
            )
        if build is None or not build["cuda"]:
            raise BackendUnavailableError(
                "nothing to verify: the extension has no CUDA kernels; rebuild with PYINF_CUDA=1 (it needs nvcc)"
            )
        checks = [line for i in range(len(devices)) for line in _verify_squared_gradients(i, build)]
    return Report(_versions(), machine, build, build_error, devices, note, ops.registry.describe(), checks)


def _verify_squared_gradients(device: int, build: dict[str, Any]) -> list[str]:
    """Run the CUDA kernel of ``accumulate_squared_gradients`` and compare it with float64; one line a case.

    It passes where its error ‖out − ref‖/‖ref‖ is at most twice that of plain torch on the same inputs (1e-6 where
    torch is better than half of that), twice over with the same bits; then it is remembered for this card and version.
    """
    import torch

    from pyinf.ops import reference, registry, torch_backend, verified

    op = "accumulate_squared_gradients"
    where = torch.device("cuda", device)
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 5, 5, 305, 306, 370, 881])
    lines = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for d_out, d_in in ((384, 256), (131, 77)):
            g = torch.randn(int(offsets[-1]), d_out, generator=generator).to(dtype)
            a = torch.randn(int(offsets[-1]), d_in, generator=generator).to(dtype)
            exact = torch.zeros(d_out, d_in, dtype=torch.float64)
            reference.accumulate_squared_gradients(exact, g.double(), a.double(), offsets)
            inputs = [t.to(where) for t in (g, a, offsets)]
            outputs = [torch.zeros(d_out, d_in, device=where) for _ in range(3)]
            torch_backend.accumulate_squared_gradients(outputs[0], *inputs)
            with registry.use_backend("cuda", op):
                for out in outputs[1:]:
                    registry.dispatch(op, out, *inputs)
            torch_error, error = (float((t.double().cpu() - exact).norm() / exact.norm()) for t in outputs[:2])
            good = error <= max(2 * torch_error, 1e-6) and torch.equal(*outputs[1:])
            lines.append(
                f"{'ok' if good else 'WRONG'} {where} {op} {dtype} {d_out}x{d_in}: "
                f"error {error:.1e}, torch {torch_error:.1e}"
            )
    wrong = [line for line in lines if line.startswith("WRONG")]
    if wrong:
        raise PyinfError("a kernel gives wrong values here, so it stays off: " + "; ".join(wrong))
    details = {"git": build["git_hash"], "torch": torch.__version__, "cases": lines}
    return [*lines, f"remembered in {verified.record(op, torch.cuda.get_device_name(where), details)}"]
