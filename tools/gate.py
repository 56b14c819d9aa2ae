"""Holds machine code to account without a GPU: no spills, no local memory, shared memory within the card's limit, and
the instructions that a kernel claims to use.

CUDA: every ``csrc/*.cu`` is compiled for each architecture; lines ``// gate: kernel=<regex> key=value ...`` in the file
say what a kernel claims (``tensor_cores``: an instruction or ``none``; ``async_copies``: an instruction;
``dynamic_shared``: bytes its launcher asks for; ``local``: bytes of local memory allowed, 0 unless said). Every kernel
needs a ``dynamic_shared`` claim. Triton: ``compile_triton`` compiles ahead of time, with no driver, to the same report.

    python tools/gate.py [csrc/file.cu ...]     prints the table; exit status 1 when something is wrong
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import inspect as inspect_module
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_extension import ROOT, find_nvcc

__all__ = [
    "ARCHS",
    "Kernel",
    "check",
    "check_launch",
    "compile_cuda",
    "compile_launch",
    "compile_triton",
    "find_cuobjdump",
    "inspect",
    "read_claims",
]

ARCHS = ("80", "86", "89", "90a")
SHARED_LIMIT = {"80": 163 * 1024, "86": 99 * 1024, "89": 99 * 1024, "90": 227 * 1024, "90a": 227 * 1024}
TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "DMMA", "QGMMA", "BMMA")


@dataclasses.dataclass
class Kernel:
    """One kernel's machine code: what ptxas spent, and how often each instruction occurs."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    instructions: collections.Counter[str]


def find_cuobjdump() -> str | None:
    """cuobjdump: PYINF_CUOBJDUMP, PATH, or the one inside Triton's wheel."""
    found = shutil.which(os.environ.get("PYINF_CUOBJDUMP", "cuobjdump"))
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return None
    bundled = Path(next(iter(spec.submodule_search_locations)), "backends", "nvidia", "bin", "cuobjdump")
    return str(bundled) if bundled.is_file() else None


def compile_cuda(source: Path, arch: str, output: Path, extra: Sequence[str] = ()) -> str:
    """Compiles a ``.cu`` file to a cubin; returns the compiler's messages, raises ``RuntimeError`` where it fails."""
    nvcc, where = find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"no nvcc (looked in {where})")
    command = [str(nvcc), "-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc/include'}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "--resource-usage", "-Xptxas=--warn-on-spills"]
    done = subprocess.run([*command, *extra, "-cubin", "-o", str(output), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
    return done.stdout + done.stderr


def inspect(cubin: Path) -> list[Kernel]:
    """Reads resource usage and instructions of every kernel in a cubin."""
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: pip install triton, or set PYINF_CUOBJDUMP")

    def dump(option: str) -> str:
        return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout

    kernels = {}
    for name, numbers in re.findall(r"Function (\S+):\s+(REG:.*)", dump("-res-usage")):
        value = {key: int(number) for key, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", numbers)}
        kernels[name] = Kernel(
            name, value["REG"], value["STACK"], value["LOCAL"], value["SHARED"], collections.Counter()
        )
    current = None
    for line in dump("-sass").splitlines():
        header = re.search(r"Function : (\S+)", line)
        if header:
            current = kernels.get(header[1])
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line)
        if instruction and current is not None:
            current.instructions[instruction[1]] += 1
    return list(kernels.values())


def read_claims(source: Path) -> list[tuple[str, dict[str, str]]]:
    """The ``// gate:`` lines of a file: (kernel regex, claims)."""
    claims = []
    for line in re.findall(r"^// gate: (.*)$", source.read_text(), flags=re.MULTILINE):
        fields = dict(item.split("=", 1) for item in line.split())
        claims.append((fields.pop("kernel"), fields))
    return claims


def check(kernel: Kernel, arch: str, claims: Mapping[str, str]) -> list[str]:
    """What is wrong with a kernel's machine code, in words; empty when nothing is."""
    wrong = []
    allowed = int(claims.get("local", 0))
    if kernel.stack > allowed or kernel.local > allowed:
        wrong.append(f"uses {kernel.stack} bytes of stack and {kernel.local} of local memory (allowed {allowed})")
    spills = kernel.instructions["LDL"] + kernel.instructions["STL"]
    if spills and not allowed:
        wrong.append(f"reads or writes local memory {spills} times (LDL, STL): it spills")
    if "dynamic_shared" not in claims:
        wrong.append("makes no dynamic_shared claim, so its shared memory cannot be checked")
    shared = kernel.shared + int(claims.get("dynamic_shared", 0))
    if shared > SHARED_LIMIT[arch]:
        wrong.append(f"needs {shared} bytes of shared memory; sm_{arch} has {SHARED_LIMIT[arch]}")
    if not sum(kernel.instructions.values()):
        wrong.append("has no readable instructions")
    used = [name for name in TENSOR_CORE if kernel.instructions[name]]
    wanted = claims.get("tensor_cores")
    if wanted == "none" and used:
        wrong.append(f"claims to use no tensor cores, but has {', '.join(used)}")
    elif wanted not in (None, "none") and not any(kernel.instructions[name] for name in wanted.split("|")):
        wrong.append(f"claims tensor-core instructions {wanted}, but has {', '.join(used) or 'none'}")
    copies = claims.get("async_copies")
    if copies and not any(kernel.instructions[name] for name in copies.split("|")):
        wrong.append(f"claims asynchronous copies ({copies}), but has none")
    return wrong


def check_cuda(source: Path, arch: str, directory: Path) -> list[tuple[Kernel, list[str]]]:
    """Compiles a file and checks every kernel in it against the file's claims."""
    cubin = directory / f"{source.stem}.sm_{arch}.cubin"
    compile_cuda(source, arch, cubin)
    claims = read_claims(source)
    results = []
    matched = set()
    for kernel in inspect(cubin):
        merged: dict[str, str] = {}
        for pattern, fields in claims:
            if re.search(pattern, kernel.name):
                merged.update(fields)
                matched.add(pattern)
        results.append((kernel, check(kernel, arch, merged)))
    for pattern, _ in claims:
        if pattern not in matched:
            raise RuntimeError(f"{source.name}: the claim for {pattern} matches no kernel")
    return results


def compile_triton(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    output: Path,
    *,
    divisible_by_16: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> dict[str, str]:
    """Compiles a ``@triton.jit`` function ahead of time, with no driver, and writes its cubin.

    ``signature`` maps every argument to its type ("*bf16", "i32", "constexpr"); ``divisible_by_16`` names the arguments
    that the launcher will specialise (pointers, row lengths): leave them out and another kernel is tested than the one
    that will run. Returns the claims that Triton itself makes (``dynamic_shared``), to pass on to ``check``.
    """
    # Its default changes between releases of Triton; the machine code under test must not.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    unknown = {*signature, *constants, *divisible_by_16} - set(names)
    if unknown or set(signature) | set(constants) != set(names):
        raise ValueError(f"{kernel.__name__} takes {names}; not its arguments, or left out: {sorted(unknown)}")
    source = _triton_source(kernel, signature, constants, [names.index(name) for name in divisible_by_16])
    target = GPUTarget("cuda", int(arch.rstrip("a")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    output.write_bytes(compiled.asm["cubin"])
    return {"dynamic_shared": str(compiled.metadata.shared)}


def _triton_source(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], divisible: Sequence[int]
) -> Any:
    """What ``triton.compile`` takes in this release: 3.2 has other names, and a class for the attributes."""
    from triton.compiler import ASTSource

    names = kernel.arg_names
    if "constexprs" in inspect_module.signature(ASTSource).parameters:
        full = {name: "constexpr" if name in constants else signature[name] for name in names}
        attrs = {(index,): [["tt.divisibility", 16]] for index in divisible}
        return ASTSource(fn=kernel, signature=full, constexprs=dict(constants), attrs=attrs)
    from triton.backends.compiler import AttrsDescriptor

    run_time = {name: signature[name] for name in names if name not in constants}
    descriptor = AttrsDescriptor.from_hints({index: 16 for index in divisible})
    return ASTSource(fn=kernel, signature=run_time, constants=dict(constants), attrs=descriptor)


def compile_launch(launch: Any, arch: str, output: Path) -> dict[str, str]:
    """``compile_triton`` for a ``Launch`` of pyinf.triton_kernels, with the attributes that the launcher will pass."""
    special = launch.specialisation()
    return compile_triton(
        launch.kernel,
        special.signature,
        special.constants,
        arch,
        output,
        divisible_by_16=special.divisible_by_16,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def check_launch(launch: Any, arch: str, output: Path, claims: Mapping[str, str]) -> tuple[Kernel, list[str]]:
    """Compiles a ``Launch`` ahead of time and checks its machine code: the kernel, and what is wrong with it.

    The kernel's ``shared`` is then all of its shared memory, also what the launcher asks for.
    """
    dynamic = compile_launch(launch, arch, output)
    [kernel] = inspect(output)
    wrong = check(kernel, arch, {**claims, **dynamic})
    kernel.shared += int(dynamic["dynamic_shared"])
    return kernel, wrong


def main(arguments: Sequence[str]) -> int:
    """Prints the table of all kernels; returns 1 when one breaks its claims."""
    sources = [Path(a) for a in arguments] or sorted((ROOT / "csrc").glob("*.cu"))
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        for source in sources:
            for arch in ARCHS:
                for kernel, wrong in check_cuda(source, arch, Path(directory)):
                    tensor = sum(kernel.instructions[name] for name in TENSOR_CORE)
                    print(
                        f"{'WRONG' if wrong else 'ok':5} sm_{arch:3} {kernel.registers:3} registers "
                        f"{kernel.local + kernel.stack:4} B local {tensor:4} tensor-core instructions {kernel.name}"
                    )
                    for message in wrong:
                        print(f"      {message}")
                    failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
