"""The machine code of every kernel, without a GPU: registers, shared memory, spills and the instructions that matter.

    python -m benchmarks.compile_table [triton] [cuda] [--only covariance ...] [--jobs 2]

Triton: every case of ``aot_cases`` in every module of triton_kernels, compiled ahead of time for each architecture.
CUDA: every csrc/*.cu for each architecture. Writes benchmarks/results/compile/{triton,cuda}.csv; with ``--only`` the
rows of other modules (files) are kept as they are. Tests compile again and compare (tests/compile, tests/build).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import fcntl
import importlib
import io
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "compile"
TRITON_ARCHS = ("sm_80", "sm_86", "sm_90")
COLUMNS = (
    "module",
    "case",
    "kernel",
    "arch",
    "registers",
    "shared_bytes",
    "local_bytes",
    "spill_instructions",
    "tensor_core_instructions",
    "tensor_core_kinds",
    "async_copies",
)
_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


class Case(NamedTuple):
    """One kernel of one module as one launch of one configuration."""

    module: str
    name: str
    arch: str
    launch: Any
    claims: Mapping[str, str]


def modules() -> list[str]:
    """The kernel modules of triton_kernels: those that define ``aot_cases``."""
    import pyinf.triton_kernels as package

    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [name for name in names if "def aot_cases(" in Path(package.__path__[0], f"{name}.py").read_text()]


def triton_cases(archs: Sequence[str] = TRITON_ARCHS, only: Sequence[str] = ()) -> Iterator[Case]:
    """Every ahead-of-time case: what the gate compiles."""
    for name in modules():
        if only and name not in only:
            continue
        module = importlib.import_module(f"pyinf.triton_kernels.{name}")
        for arch in archs:
            seen = set()
            for case, launch, claims in module.aot_cases(arch):
                if case in seen:
                    raise ValueError(f"{name}: two cases are called {case} for {arch}")
                seen.add(case)
                yield Case(name, case, arch, launch, claims)


def row_of(module: str, case: str, arch: str, kernel: gate.Kernel, name: str) -> dict[str, str]:
    """One line of the table."""
    count = kernel.instructions
    kinds = [kind for kind in gate.TENSOR_CORE if count[kind]]
    return {
        "module": module,
        "case": case,
        "kernel": name,
        "arch": arch,
        "registers": str(kernel.registers),
        "shared_bytes": str(kernel.shared),
        "local_bytes": str(kernel.local + kernel.stack),
        "spill_instructions": str(count["LDL"] + count["STL"]),
        "tensor_core_instructions": str(sum(count[kind] for kind in kinds)),
        "tensor_core_kinds": "+".join(kinds) or "none",
        "async_copies": str(sum(count[name] for name in _COPIES)),
    }


def compile_case(case: Case) -> tuple[dict[str, str], list[str]]:
    """The case's line of the table, and what is wrong with its machine code."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        kernel, wrong = gate.check_launch(case.launch, case.arch.removeprefix("sm_"), cubin, case.claims)
    return row_of(case.module, case.name, case.arch, kernel, case.launch.kernel.__name__), wrong


def stable_name(mangled: str) -> str:
    """A kernel's name without what nvcc derives from the path of the file for an anonymous namespace."""
    while found := re.search(r"(\d+)_GLOBAL__N__[0-9a-f]{8}_", mangled):
        end = found.end(1) + int(found[1])
        mangled = mangled[: found.start()] + "12_GLOBAL__N_1" + mangled[end:]
    return mangled


def compile_source(source: Path, arch: str) -> list[tuple[dict[str, str], list[str]]]:
    """The same for every kernel of a CUDA file; shared memory without what the launcher asks for at run time."""
    with tempfile.TemporaryDirectory() as directory:
        results = gate.check_cuda(source, arch, Path(directory))
    return [(cuda_row(source, arch, kernel), wrong) for kernel, wrong in results]


def cuda_row(source: Path, arch: str, kernel: gate.Kernel) -> dict[str, str]:
    """The line of one kernel of a CUDA file."""
    return row_of(source.stem, "", f"sm_{arch}", kernel, stable_name(kernel.name))


def cuda_sources() -> list[Path]:
    """The files of csrc with a kernel in them."""
    sources = ((path, path.read_text()) for path in sorted((ROOT / "csrc").glob("*.cu")))
    return [path for path, text in sources if "<<<" in text or "launch_kernel(" in text]


def triton_version() -> str:
    """What the Triton half of the table depends on."""
    import triton

    return f"triton {triton.__version__}"


def nvcc_version() -> str:
    """What the CUDA half of the table depends on."""
    nvcc, _ = gate.find_nvcc()
    if nvcc is None:
        return "no nvcc"
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + text.split(" V")[-1].split()[0]


def read_table(which: str) -> tuple[str, dict[tuple[str, str, str, str], dict[str, str]]]:
    """The committed table: the compiler's version, and the lines by (module, case, kernel, arch)."""
    path = RESULTS / f"{which}.csv"
    if not path.is_file():
        return "", {}
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    lines = csv.DictReader(io.StringIO(rest))
    return first.removeprefix("# "), {_key(line): line for line in lines}


def _key(line: Mapping[str, str]) -> tuple[str, str, str, str]:
    return line["module"], line["case"], line["kernel"], line["arch"]


def write_table(which: str, version: str, lines: Sequence[Mapping[str, str]]) -> Path:
    """Write the table, sorted, with the compiler's version in its first line."""
    out = io.StringIO()
    out.write(f"# {version}\n")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(lines, key=_key))
    path = RESULTS / f"{which}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(out.getvalue(), encoding="utf-8")
    return path


def differences(line: Mapping[str, str], which: str, version: str) -> list[str]:
    """How a fresh line differs from the committed one; only its presence counts where the compiler is another."""
    committed, lines = read_table(which)
    command = f"python -m benchmarks.compile_table {which} --only {line['module']}"
    old = lines.get(_key(line))
    if old is None:
        return [f"is not in benchmarks/results/compile/{which}.csv; run: {command}"]
    if committed != version:
        return []
    return [f"{c}: {line[c]} here, {old[c]} in the table; run: {command}" for c in COLUMNS if line[c] != old[c]]


def _triton_index(only: Sequence[str], index: int) -> tuple[dict[str, str], list[str]]:
    return compile_case(list(triton_cases(only=only))[index])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print what is wrong, write the tables; 1 when a kernel breaks its claims."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_table", description=__doc__)
    parser.add_argument("which", nargs="*", choices=["triton", "cuda", []], default=[])
    parser.add_argument("--only", nargs="+", default=[], metavar="MODULE")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    failed = False
    for which in chosen.which or ["triton", "cuda"]:
        version = triton_version() if which == "triton" else nvcc_version()
        if version == "no nvcc":
            print("no nvcc: cuda.csv is left as it is")
            continue
        with concurrent.futures.ProcessPoolExecutor(chosen.jobs) as pool:
            if which == "triton":
                count = len(list(triton_cases(only=chosen.only)))
                results = list(pool.map(_triton_index, [chosen.only] * count, range(count)))
            else:
                todo = [(s, a) for s in cuda_sources() for a in gate.ARCHS if not chosen.only or s.stem in chosen.only]
                parts = pool.map(compile_source, *zip(*todo, strict=True)) if todo else []
                results = [result for part in parts for result in part]
        for line, wrong in results:
            failed |= bool(wrong)
            for message in wrong:
                print(f"WRONG {line['module']} {line['case']} {line['kernel']} {line['arch']}: {message}")
        fresh = {_key(line): line for line, _ in results}
        lock = open(Path(tempfile.gettempdir(), f"pyinf_compile_table_{which}.lock"), "w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends: another may be writing its own lines
        committed, before = read_table(which)
        if chosen.only and committed == version:
            kept = {key: line for key, line in before.items() if key[0] not in chosen.only}
        else:
            kept = {}
            if chosen.only and before:
                raise SystemExit(f"{which}.csv was made with {committed}, this is {version}: run without --only")
        path = write_table(which, version, [*kept.values(), *fresh.values()])
        print(
            f"{path.relative_to(ROOT)}: {len(kept) + len(fresh)} lines, {len(fresh)} of them compiled now ({version})"
        )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
