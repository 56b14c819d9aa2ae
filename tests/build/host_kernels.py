"""The launchers and kernels of csrc/*.cu, compiled for the host over a small emulator of a block, on CPU tensors."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf.ops import reference

ROOT = Path(__file__).resolve().parents[2]
FILES = ("project_gradients", "random_projection", "reduce_splits", "scan_topk", "sparse_projection")
DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
_I64, _I32, _U64, _U32, _F32, _PTR = (
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_uint32,
    ctypes.c_float,
    ctypes.c_void_p,
)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "random_projection_workspace": (_I64, [_I64] * 3),
    "launch_random_projection": (
        _I32,
        [_PTR, _I64, _PTR, _I64, _I64, _I64, _I64, _U64, _U32, _I32, _I32, _PTR, _I64, _I32, _PTR],
    ),
    "sparse_projection_workspace": (_I64, [_I64] * 3),
    "launch_sparse_projection": (
        _I32,
        [_PTR, _I64, _PTR, _I64, _I64, _I64, _I64, _I64, _U64, _U32, _I32, _PTR, _I64, _I32, _PTR],
    ),
    "sparse_projection_factors_workspace": (_I64, [_I64] * 4),
    "launch_sparse_projection_factors": (
        _I32,
        [*[_PTR, _I64] * 3, _PTR, *[_I64] * 5, _U64, _U32, _I32, _PTR, _I64, _I32, _PTR],
    ),
    "scan_topk_workspace": (_I64, [*[_I64] * 4, _I32, _I32]),
    "launch_scan_topk": (
        _I32,
        [_PTR, _PTR, _PTR, _I64, _I64, _PTR, _I64, _PTR, *[_I64] * 5, _I32, _I32, _PTR, _I64, _I32, _PTR],
    ),
    "project_gradients_workspace": (_I64, [_I64] * 4),
    "launch_project_gradients": (
        _I32,
        [
            *(_PTR, _PTR, _PTR, _I64, _PTR, _I64, _PTR, _I64, _I64, _I64, _I64, _PTR, _I64, _PTR, _I64, _I64, _I64),
            *(_U64, _U32, _U32, _I32, _I32, _I32, _PTR, _I64, _I32, _PTR),
        ],
    ),
}


def compile_library(folder: Path, base: Path | None = None, broken: tuple[str, Path] | None = None) -> ctypes.CDLL:
    """All launchers in one shared library. ``broken``: a file, and other headers for it; the rest is of ``base``."""
    here = ROOT / "tests" / "build"
    objects = []
    processes = []
    for source in [here / "host_kernels.cpp", *(ROOT / "csrc" / f"{name}.cu" for name in FILES)]:
        include = ROOT / "csrc" / "include"
        if broken is not None and base is not None:
            if source.stem != broken[0]:
                objects.append(base / f"{source.stem}.o")
                continue
            include = broken[1]
        objects.append(folder / f"{source.stem}.o")
        command = [str(shutil.which("c++")), "-std=c++17", "-O0", "-w", "-fPIC", f"-I{here / 'host_cuda'}"]
        command += [f"-I{include}", "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        processes.append(subprocess.Popen(command))
    assert all(process.wait() == 0 for process in processes)
    objects.sort(key=lambda path: broken is None or path.stem != broken[0])  # its inline functions are to win
    output = folder / "kernels.so"
    subprocess.run([str(shutil.which("c++")), "-shared", *map(str, objects), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


def rows(x: Tensor) -> tuple[int, int]:
    """Address and row stride."""
    return x.data_ptr(), max(x.stride(0), x.shape[1])


class HostKernels:
    """Calls the launchers; every output and workspace starts as NaN."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.functions = {}
        for name, (result, arguments) in SIGNATURES.items():
            address = getattr(library, f"host_{name}")
            address.restype = _PTR
            self.functions[name] = ctypes.CFUNCTYPE(result, *arguments)(address())

    def call(self, name: str, *arguments: Any) -> int:
        """A launcher's return code, or the value of a size function."""
        return self.functions[name](*arguments)

    def backwards(self, on: bool) -> None:
        """Lets the last thread of a block run first."""
        self.library.host_backwards(int(on))

    def _launch(self, name: str, x: Tensor, *arguments: Any) -> None:
        assert self.call(name, *arguments, DTYPES[x.dtype], *self._space, 0, None) == 0

    def _reserve(self, name: str, *sizes: int) -> None:
        size = self.call(name, *sizes)
        self._kept = torch.full((size,), 0xFF, dtype=torch.uint8)
        self._space = (self._kept.data_ptr(), size)

    @staticmethod
    def _padded(rows: int, columns: int) -> Tensor:
        return torch.full((rows, columns + 3), float("nan"))

    @staticmethod
    def _inside(out: Tensor, columns: int) -> Tensor:
        assert out[:, columns:].isnan().all(), "wrote beyond the row"
        return out[:, :columns]

    def random_projection(self, x: Tensor, k: int, seed: int, distribution: str) -> Tensor:
        """As the op."""
        self._reserve("random_projection_workspace", *x.shape, k)
        out = self._padded(x.shape[0], k)
        kind = ("rademacher", "normal").index(distribution)
        self._launch("launch_random_projection", x, *rows(out), *rows(x), *x.shape, k, seed, 0, kind)
        return self._inside(out, k)

    def sparse_projection(self, x: Tensor, k: int, seed: int, nnz: int) -> Tensor:
        """As the op."""
        self._reserve("sparse_projection_workspace", *x.shape, k)
        out = self._padded(x.shape[0], k)
        self._launch("launch_sparse_projection", x, *rows(out), *rows(x), *x.shape, k, nnz, seed, 0)
        return self._inside(out, k)

    def sparse_projection_factors(self, g: Tensor, a: Tensor, offsets: Tensor, k: int, seed: int, nnz: int) -> Tensor:
        """As the op."""
        sizes = (offsets.numel() - 1, g.shape[1], a.shape[1], k)
        self._reserve("sparse_projection_factors_workspace", *sizes)
        out = self._padded(sizes[0], k)
        marks = (*rows(g), *rows(a), offsets.data_ptr())
        self._launch("launch_sparse_projection_factors", g, *rows(out), *marks, *sizes, nnz, seed, 0)
        return self._inside(out, k)

    def scan_topk(
        self, queries: Tensor, store: Tensor, k: int, kind: int, bits: int = 0, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As the op, with queries ``[parts, Q, d]``."""
        parts, count, d = queries.shape
        n = store.shape[0]
        self._reserve("scan_topk_workspace", count, n, d, k, kind, parts)
        values, indices = torch.full((count, k), float("nan")), torch.full((count, k), -1)
        code = self.call(
            "launch_scan_topk",
            values.data_ptr(),
            indices.data_ptr(),
            queries.data_ptr(),
            queries.stride(0),
            queries.stride(1),
            *rows(store),
            None if scale is None else scale.data_ptr(),
            *(count, n, d, bits, k, kind, parts),
            *self._space,
            0,
            None,
        )
        assert code == 0
        return values, indices

    def project_gradients(
        self,
        g: Tensor,
        a: Tensor,
        offsets: Tensor,
        P_g: Tensor | None,
        P_a: Tensor | None,
        k_g: int,
        k_a: int,
        seed: int = 0,
        distribution: str = "rademacher",
        epilogue: str = "float32",
    ) -> tuple[Tensor, Tensor]:
        """As the op."""
        count = offsets.numel() - 1
        self._reserve("project_gradients_workspace", g.shape[0], count, k_g, k_a)
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "sign": torch.uint8}
        shape = (count, -(-k_g * k_a // 8)) if epilogue == "sign" else (count, k_g, k_a)
        out = torch.empty(shape, dtype=dtypes[epilogue])
        if out.is_floating_point():
            out.fill_(float("nan"))
        scale = torch.full((count,), float("nan"))
        given = [value for P in (P_g, P_a) for value in ((None, 0) if P is None else rows(P))]
        self._launch(
            "launch_project_gradients",
            g,
            *(out.data_ptr(), scale.data_ptr(), *rows(g), *rows(a), offsets.data_ptr()),
            *(
                g.shape[0],
                count,
                g.shape[1],
                a.shape[1],
                *given,
                k_g,
                k_a,
                seed,
                reference.STREAM_G,
                reference.STREAM_A,
            ),
            *(("rademacher", "normal").index(distribution), list(dtypes).index(epilogue)),
        )
        return out, scale
