"""Build of pyinf's one extension module, ``pyinf._C``: pybind11 and ninja, no torch, and CUDA where there is an nvcc.

Environment variables:
    PYINF_CUDA            auto (default: build the CUDA half where an nvcc is found) | 0 | 1 (no nvcc is an error)
    PYINF_NVCC            path of the nvcc to use; else CUDA_HOME, CUDA_PATH, PATH, the pip wheels of nvcc are tried
    TORCH_CUDA_ARCH_LIST  as in PyTorch, "8.0;9.0a+PTX"; default 8.0;8.6;8.9;9.0a and PTX of the newest plain one
    MAX_JOBS              compilers at once (default: the number of cores)
    PYINF_DEBUG           1: -O0 -g, and -G for device code
    PYINF_BUILD_DIR       where object files are kept (default build/pyinf-<platform>)
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # the build backend does not put the project on the path

from build_extension import BuildExtension, BuildPy, SourceDistribution  # noqa: E402

KERNELS = ["pyinf.triton_kernels"] + [f"pyinf.triton_kernels.{name}" for name in find_packages("triton_kernels")]

setup(
    packages=find_packages(include=["pyinf", "pyinf.*"]) + KERNELS,
    package_dir={"pyinf": "pyinf", "pyinf.triton_kernels": "triton_kernels"},
    # The sources are found by build_extension.py; they are listed here for tools that ask.
    ext_modules=[Extension("pyinf._C", sources=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*.cpp")))],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy, "sdist": SourceDistribution},
    zip_safe=False,
)
