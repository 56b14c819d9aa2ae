"""Looks into a wheel: what is in it, what the extension links, and that it imports where there is no torch.

python tools/check_wheel.py dist/pyinf-*.whl
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["contents", "describe", "imports_without_torch", "links"]

EXPECTED = (
    *("pyinf/__init__.py", "pyinf/py.typed", "pyinf/cli/__init__.py", "pyinf/triton_kernels/__init__.py"),
    *("pyinf/report/page.html.j2", "pyinf/report/page.css", "pyinf/report/page.js"),
    *("pyinf/serve/search.html.j2", "pyinf/serve/docs.html.j2", "pyinf/serve/serve.css", "pyinf/serve/search.js"),
)
FOREIGN = re.compile(r"torch|c10|cudart|cublas|libcuda\.|libpython")


def contents(wheel: Path) -> list[str]:
    """What is wrong with the list of files, in words."""
    names = zipfile.ZipFile(wheel).namelist()
    wrong = []
    for name in EXPECTED:
        if name not in names:
            wrong.append(f"{name} is missing")
    extensions = [name for name in names if name.endswith((".so", ".pyd"))]
    if len(extensions) != 1 or not extensions[0].startswith("pyinf/_C."):
        wrong.append(f"one extension, pyinf/_C, is expected, not {extensions}")
    strangers = [n for n in names if not n.startswith("pyinf/") and ".dist-info/" not in n]
    if strangers:
        wrong.append(f"files outside the package: {strangers[:5]}")
    unwanted = [n for n in names if re.search(r"(^|/)(tests?|csrc|build|__pycache__)/|\.(cpp|cuh?|o|h)$", n)]
    if unwanted:
        wrong.append(f"files that do not belong in a wheel: {unwanted[:5]}")
    return wrong


def links(wheel: Path) -> list[str]:
    """The shared libraries that the extension names, by ldd."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".so")]
        path = archive.extract(name, folder)
        done = subprocess.run(["ldd", path], capture_output=True, text=True, check=True)
    if "not found" in done.stdout:
        raise RuntimeError(f"a library is missing:\n{done.stdout}")
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def imports_without_torch(wheel: Path) -> dict:
    """``pyinf._C.build_config()`` in a new environment that holds the wheel and nothing else, no driver needed.

    ``import pyinf`` itself needs torch, so the extension is loaded as a module of an empty package.
    """
    program = (
        "import sys, types, json, importlib.util, sysconfig, pathlib\n"
        "folder = pathlib.Path(sysconfig.get_path('purelib'), 'pyinf')\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "package = types.ModuleType('pyinf'); package.__path__ = [str(folder)]; sys.modules['pyinf'] = package\n"
        "import pyinf._C, pyinf.triton_kernels\n"
        "print(json.dumps(pyinf._C.build_config()))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False, symlinks=True)
        python = Path(folder, "bin", "python")
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"the extension does not import without torch:\n{done.stderr}")
    return json.loads(done.stdout)


def describe(wheel: Path) -> tuple[str, dict, list[str]]:
    """(one line about the wheel, its build_config, what is wrong with it)."""
    wrong = contents(wheel)
    linked = links(wheel)
    wrong += [f"the extension links {library}" for library in linked if FOREIGN.search(library)]
    config = imports_without_torch(wheel)
    half = f"CUDA {config['nvcc']} for {' '.join(config['cuda_archs'])}" if config["cuda"] else "no CUDA"
    line = f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {half}, links {' '.join(sorted(linked))}"
    return line, config, wrong


def main(arguments: Sequence[str]) -> int:
    """Checks the wheels; returns 1 when something is wrong."""
    if not arguments:
        raise SystemExit(__doc__)
    failed = False
    for wheel in map(Path, arguments):
        line, _, wrong = describe(wheel)
        print(line)
        print("\n".join(f"  WRONG {message}" for message in wrong) or "  ok")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
