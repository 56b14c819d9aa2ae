"""The build_ext of pyinf: finds the compilers, writes a ninja file, links one extension. Used by setup.py and tests.

Nothing here imports torch. Device code is compiled file by file with nvcc and linked against the static CUDA runtime,
so the extension needs neither libcudart nor a driver to be imported.

    python tools/build_extension.py     brings the extension of this checkout up to date, for an editable install
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

__all__ = [
    "BuildError",
    "BuildExtension",
    "BuildPy",
    "SourceDistribution",
    "Toolchain",
    "find_nvcc",
    "gencode_flags",
    "git_hash",
    "make_toolchain",
    "parse_arch_list",
]

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a"
HASH_FILE = "GIT_HASH"
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    "avx512bf16": [
        *["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
        "-mavx512bf16",
    ],
}
GET_NVCC = (
    "install the CUDA toolkit and set CUDA_HOME, or "
    "`pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl` "
    "(one version of all five), or set PYINF_NVCC; PYINF_CUDA=0 builds without CUDA"
)


class BuildError(RuntimeError):
    """The build cannot go on; the message says what to do."""


def parse_arch_list(text: str | None) -> tuple[list[str], list[str]]:
    """``TORCH_CUDA_ARCH_LIST`` to (machine code, PTX) architectures: ``"8.0;9.0a+PTX"`` -> (["80", "90a"], ["90a"]).

    Without a list: the default one, with PTX of its newest plain architecture (PTX of an ``a`` architecture runs on no
    other card).
    """
    items = [item for item in re.split(r"[;,\s]+", (text or DEFAULT_ARCHS).strip()) if item]
    machine, ptx = [], []
    for item in items:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {item!r} is not an architecture; write it as 8.0, 9.0a or 8.9+PTX, "
                "separated by semicolons"
            )
        if int(match[1]) < 8:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {item}: the kernels of pyinf need 8.0 (Ampere) or newer")
        arch = match[1] + match[2] + match[3]
        if arch not in machine:
            machine.append(arch)
        if match[4] and arch not in ptx:
            ptx.append(arch)
    if not text or not text.strip():
        ptx = [max((a for a in machine if a.isdigit()), key=int)]
    return machine, ptx


def gencode_flags(machine: list[str], ptx: list[str]) -> list[str]:
    """nvcc's ``-gencode`` flags for machine code and PTX."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in machine]
    return flags + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx]


def find_nvcc() -> tuple[Path | None, str]:
    """The nvcc to use and how it was found, or ``(None, where it was looked for)``."""
    tried = []
    explicit = os.environ.get("PYINF_NVCC")
    if explicit:
        found = shutil.which(explicit)
        if not found:
            raise BuildError(f"PYINF_NVCC={explicit} is not an executable file; {GET_NVCC}")
        return Path(found), "PYINF_NVCC"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            candidate = Path(os.environ[name], "bin", "nvcc")
            if candidate.is_file():
                return candidate, name
            tried.append(f"{name} ({candidate})")
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path), "PATH"
    tried.append("PATH")
    for base in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        if base:
            for candidate in sorted(Path(base).glob("nvidia/*/bin/nvcc"), reverse=True):
                if os.access(candidate, os.X_OK):
                    return candidate, "pip wheel"
    tried.append("the pip wheels of nvcc")
    return None, ", ".join(tried)


def git_hash(root: Path = ROOT) -> str:
    """Commit of the checkout (with ``-dirty`` when tracked files differ), or what the sdist recorded, or "unknown"."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root.resolve():
            return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    recorded = root / HASH_FILE
    return recorded.read_text().strip() if recorded.is_file() else "unknown"


def _first_line(command: list[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[0]


@dataclasses.dataclass
class Toolchain:
    """Everything that decides what the compiler makes; a change of it starts the build afresh."""

    cxx: list[str]
    compiler: str
    python: str
    pybind11: str
    debug: bool
    openmp: bool
    cxx_flags: list[str]
    isa_levels: list[str]
    link_flags: list[str]
    nvcc: str | None = None
    nvcc_version: str | None = None
    nvcc_found: str = ""
    nvcc_flags: list[str] = dataclasses.field(default_factory=list)
    archs: list[str] = dataclasses.field(default_factory=list)
    ptx: list[str] = dataclasses.field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether the CUDA half is built."""
        return self.nvcc is not None

    def info(self) -> dict:
        """What ``build_config()`` reports."""
        return {
            "compiler": self.compiler,
            "cxx_flags": self.cxx_flags,
            "pybind11": self.pybind11,
            "openmp": self.openmp,
            "cpu_isa": self.isa_levels,
            "debug": self.debug,
            "cuda": self.cuda,
            "nvcc": self.nvcc_version,
            "cuda_archs": [f"sm_{a}" for a in self.archs] + [f"compute_{a}" for a in self.ptx],
            "nvcc_flags": self.nvcc_flags,
        }


def _accepts(cxx: list[str], flags: list[str], directory: Path) -> bool:
    """Whether the compiler compiles and links an empty program with these flags."""
    source = directory / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*cxx, *flags, str(source), "-o", str(directory / "probe.out")]
    return subprocess.run(command, capture_output=True).returncode == 0


def _cuda_library_dirs(nvcc: Path) -> list[str]:
    """Where nvcc links from, in its own words (it may be a wrapper script far from its toolkit)."""
    done = subprocess.run([str(nvcc), "--dryrun", "probe.o"], capture_output=True, text=True)
    found = re.findall(r'"?-L([^"\s]+)"?', next(iter(re.findall(r"LIBRARIES=(.*)", done.stderr)), ""))
    top = next(iter(re.findall(r"TOP=(.*)", done.stderr)), str(nvcc.resolve().parent.parent)).strip()
    candidates = [*found, f"{top}/lib64", f"{top}/lib"]
    return list(dict.fromkeys(str(Path(d).resolve()) for d in candidates if Path(d, "libcudart_static.a").is_file()))


def make_toolchain(directory: Path) -> Toolchain:
    """Finds the compilers and settles the flags from the environment."""
    import pybind11

    cxx = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(cxx[0]) is None:
        raise BuildError(f"no C++ compiler ({cxx[0]}): install one (apt-get install g++) or set CXX")
    debug = os.environ.get("PYINF_DEBUG", "0") not in ("", "0")
    openmp = _accepts(cxx, ["-fopenmp"], directory)
    x86 = platform.machine() in ("x86_64", "AMD64")
    levels = [level for level, flags in ISA_FLAGS.items() if x86 and _accepts(cxx, flags, directory)]
    # No -march=native: the wheel runs on any processor, and picks its instruction set when it runs.
    cxx_flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=fast"]
    cxx_flags += ["-O0", "-g"] if debug else ["-O3", "-DNDEBUG"]
    cxx_flags += ["-fopenmp"] if openmp else []
    cxx_flags += [f"-DPYINF_HAVE_{level.upper()}" for level in levels]
    cxx_flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    apple = sys.platform == "darwin"
    link_flags = ["-undefined", "dynamic_lookup", "-bundle"] if apple else ["-shared", "-Wl,--exclude-libs,ALL"]
    link_flags += [] if debug or apple else ["-s"]
    link_flags += ["-fopenmp"] if openmp else []
    link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
    tools = Toolchain(
        cxx=cxx,
        compiler=_first_line(cxx),
        python=sysconfig.get_config_var("EXT_SUFFIX"),
        pybind11=pybind11.__version__,
        debug=debug,
        openmp=openmp,
        cxx_flags=cxx_flags,
        isa_levels=levels,
        link_flags=link_flags,
    )
    wanted = os.environ.get("PYINF_CUDA", "auto").lower() or "auto"
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"PYINF_CUDA={wanted} is not one of auto, 0, 1")
    if wanted == "0":
        tools.nvcc_found = "PYINF_CUDA=0"
        return tools
    nvcc, tools.nvcc_found = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            raise BuildError(f"PYINF_CUDA=1, but there is no nvcc (looked in {tools.nvcc_found}): {GET_NVCC}")
        return tools
    library_dirs = _cuda_library_dirs(nvcc)
    if not library_dirs:
        reason = f"{nvcc} has no libcudart_static.a beside it: {GET_NVCC}"
        if wanted == "1":
            raise BuildError(reason)
        tools.nvcc_found = reason
        return tools
    version = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    tools.nvcc = str(nvcc)
    tools.nvcc_version = next(iter(re.findall(r"release [\d.]+, V([\d.]+)", version)), version.strip())
    tools.archs, tools.ptx = parse_arch_list(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    tools.nvcc_flags = ["-std=c++17", "-lineinfo", "-cudart=static", "--expt-relaxed-constexpr"]
    tools.nvcc_flags += ["-O0", "-g", "-G"] if debug else ["-O3", "-DNDEBUG"]
    tools.nvcc_flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=--warn-on-spills", f"-ccbin={cxx[0]}"]
    tools.nvcc_flags += gencode_flags(tools.archs, tools.ptx)
    tools.cxx_flags.append("-DPYINF_WITH_CUDA")
    tools.link_flags += [*(f"-L{d}" for d in library_dirs), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return tools


def _isa_of(source: Path) -> str | None:
    """``name.avx512.cpp`` -> ``avx512``: the instruction set that a file asks for."""
    suffixes = source.suffixes
    return suffixes[-2][1:] if len(suffixes) >= 2 else None


def _quote(path: Path | str) -> str:
    """A path in a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(arguments: list[str]) -> str:
    return " ".join(shlex.quote(a) for a in arguments).replace("$", "$$")


def write_ninja(tools: Toolchain, root: Path, directory: Path, target: Path) -> Path:
    """Writes build.ninja and the generated build_info.cpp; returns the path of the ninja file."""
    import pybind11

    info = {**tools.info(), "git_hash": git_hash(root)}
    text = json.dumps(info, ensure_ascii=True)
    generated = directory / "build_info.cpp"
    body = (
        '#include "pyinf/build_info.h"\n\nnamespace pyinf {\n'
        f'const char* build_info_json() {{ return R"json({text})json"; }}\n}}  // namespace pyinf\n'
    )
    if not generated.is_file() or generated.read_text() != body:
        generated.write_text(body)
    include = [f"-I{root / 'csrc' / 'include'}"]
    # Only bindings.cpp sees pybind11 and Python: in an isolated build their paths change every time.
    python_include = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    cxx = _shell([*tools.cxx, *tools.cxx_flags, *include])
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {cxx} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $in",
    ]
    if tools.cuda:
        nvcc = _shell([str(tools.nvcc), *tools.nvcc_flags, *include])
        lines += [
            f"rule nvcc\n  command = {nvcc} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = CUDA $in",
        ]
    lines += [
        f"rule link\n  command = {_shell(tools.cxx)} $in {_shell(tools.link_flags)} -o $out\n  description = link $out",
    ]
    sources = [root / "csrc" / "bindings.cpp", generated, *sorted((root / "csrc" / "cpu").glob("**/*.cpp"))]
    objects = []
    for source in sources:
        isa = _isa_of(source)
        if isa is not None and isa not in ISA_FLAGS:
            raise BuildError(f"{source}: no instruction set called {isa!r}; there are {', '.join(ISA_FLAGS)}")
        if isa is not None and isa not in tools.isa_levels:
            continue
        extra = python_include if source.name == "bindings.cpp" else ISA_FLAGS.get(isa or "", [])
        objects.append(directory / f"{source.name}.o")
        lines.append(f"build {_quote(objects[-1])}: cxx {_quote(source)}\n  extra = {_shell(extra)}")
    if tools.cuda:
        for source in sorted((root / "csrc").glob("*.cu")):
            objects.append(directory / f"{source.name}.o")
            lines.append(f"build {_quote(objects[-1])}: nvcc {_quote(source)}")
    if len(set(objects)) != len(objects):
        raise BuildError("two source files under csrc/ have the same name")
    lines.append(f"build {_quote(target)}: link {' '.join(_quote(o) for o in objects)}")
    lines.append(f"default {_quote(target)}")
    ninja_file = directory / "build.ninja"
    ninja_file.write_text("\n".join(lines) + "\n")
    return ninja_file


def apply_options(tools: Toolchain, directory: Path, say=print) -> None:
    """Empties the build directory when the options differ from those of its last build, and says which do."""
    record = directory / "params.json"
    new = dataclasses.asdict(tools)
    if record.is_file():
        try:
            old = json.loads(record.read_text())
        except ValueError:
            old = {}
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            say("pyinf: build options changed, so everything is compiled again:")
            for key in changed:
                say(f"  {key}: {old.get(key)!r} -> {new.get(key)!r}")
            for path in directory.iterdir():
                if path.suffix in (".o", ".d", ".so") or path.name.startswith(".ninja"):
                    path.unlink()
    record.write_text(json.dumps(new, indent=1))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Two builds in one directory take turns."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(directory / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _ninja() -> list[str]:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise BuildError("no ninja: `pip install ninja`, or build with isolation (plain `pip install .`)") from None
        return [found]
    return [str(Path(ninja.BIN_DIR, "ninja"))]


def build(target: Path, root: Path = ROOT, directory: Path | None = None) -> Toolchain:
    """Builds the extension module into ``target``."""
    default = root / "build" / f"pyinf-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    directory = Path(directory or os.environ.get("PYINF_BUILD_DIR") or default).resolve()
    with _locked(directory):
        tools = make_toolchain(directory)
        apply_options(tools, directory)
        how = f"nvcc {tools.nvcc_version} ({tools.nvcc_found})" if tools.cuda else f"no CUDA ({tools.nvcc_found})"
        print(f"pyinf: {tools.compiler}; {how}; {' '.join(tools.info()['cuda_archs'])}", flush=True)
        built = directory / "_C.so"
        ninja_file = write_ninja(tools, root, directory, built)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not jobs.isdigit() or int(jobs) < 1:
            raise BuildError(f"MAX_JOBS={jobs} is not a positive number")
        command = [*_ninja(), "-f", str(ninja_file), "-C", str(directory), "-j", jobs]
        if subprocess.run(command).returncode:
            raise BuildError("the compiler failed; its message stands above")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a running process keeps the file that it has mapped.
        temporary = target.with_name(target.name + f".{os.getpid()}.tmp")
        shutil.copyfile(built, temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    return tools


class BuildExtension(build_ext):
    """``build_ext`` that leaves the work to ninja."""

    def build_extension(self, ext) -> None:
        """Builds ``pyinf._C``."""
        try:
            build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except BuildError as error:
            raise SystemExit(f"pyinf: {error}") from None

    def copy_extensions_to_source(self) -> None:
        """In-place builds: replaces the file by renaming, since other processes may have it open."""
        build_py_command = self.get_finalized_command("build_py")
        for ext in self.extensions:
            in_place, built = self._get_inplace_equivalent(build_py_command, ext)
            temporary = f"{in_place}.{os.getpid()}.tmp"
            shutil.copyfile(built, temporary)
            os.chmod(temporary, 0o755)
            os.replace(temporary, in_place)


class BuildPy(build_py):
    """``build_py`` into an empty folder, so that a module deleted from the source never stays in a wheel."""

    def run(self) -> None:
        """Copies the Python files."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "pyinf"), ignore_errors=True)
        super().run()


class SourceDistribution(sdist):
    """``sdist`` that records the commit."""

    def make_release_tree(self, base_dir, files) -> None:
        """Copies the files and adds GIT_HASH."""
        super().make_release_tree(base_dir, files)
        Path(base_dir, HASH_FILE).write_text(git_hash() + "\n")


if __name__ == "__main__":
    try:
        build(ROOT / "pyinf" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    except BuildError as error:
        raise SystemExit(f"pyinf: {error}") from None
