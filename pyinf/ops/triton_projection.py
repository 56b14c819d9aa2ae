"""``project_gradients``, ``random_projection`` and ``sparse_projection`` by Triton: matrices drawn on the fly."""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.ops.precision import float32_precision
from pyinf.ops.projection_options import empty_result, side_sizes, too_wide
from pyinf.ops.triton_backend import FLOATS, check_tensors, register_triton, run
from pyinf.ops.triton_gradients import check_layer, device_offsets, workspace_on

__all__ = ["project_gradients", "random_projection", "sparse_projection"]

_SIDE = 128
_BUCKETS, _NONZEROS = 1024, 8


def _precision(x: Tensor) -> str:
    return float32_precision() if x.dtype == torch.float32 else "ieee"


def _check_project(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    P_g: Tensor | None,
    P_a: Tensor | None,
    k_g: int,
    k_a: int,
    seed: int,
    distribution: str,
    epilogue: str,
) -> str | None:
    reason = check_layer((g, a)) or check_tensors(g, P_g, P_a, dtypes=FLOATS)
    return reason or too_wide("Triton", _SIDE, *side_sizes(P_g, P_a, k_g, k_a))


def project_gradients(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    P_g: Tensor | None,
    P_a: Tensor | None,
    k_g: int,
    k_a: int,
    seed: int,
    distribution: str,
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    """``P_gᵀ G_b P_a`` in one pass over g and a. P that is given is rounded to the dtype of g, as torch does on a GPU;
    the projected rows are not rounded.
    """
    from pyinf.triton_kernels.configs import family_of
    from pyinf.triton_kernels.project_gradients import project_launches

    device = g.device
    marks = device_offsets(offsets, g.shape[0], device)
    count = marks.numel() - 1
    k_g, k_a = side_sizes(P_g, P_a, k_g, k_a)
    out, scale = empty_result(count, k_g, k_a, epilogue, device)
    launches = project_launches(
        g, a, marks, P_g, P_a, k_g, k_a, seed, distribution, epilogue, out, scale if epilogue == "int8" else None,
        workspace_on(device), family_of(device), _precision(g),
    )  # fmt: skip
    run(launches, device)
    return out, scale


def _check_random(x: Tensor, k: int, seed: int, distribution: str) -> str | None:
    reason = check_tensors(x)
    if reason is None and max(x.shape[0], k) >= 1 << 31:
        reason = "the Triton kernel takes fewer than 2**31 rows and columns"
    return reason


def random_projection(x: Tensor, k: int, seed: int, distribution: str) -> Tensor:
    """``x P / √k`` with P drawn on the fly, the same for every tiling; on tensor cores with float32 sums."""
    from pyinf.triton_kernels.configs import family_of
    from pyinf.triton_kernels.random_projection import random_launches

    out = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    workspace = workspace_on(x.device)
    run(random_launches(x, k, seed, distribution, out, workspace, family_of(x.device), _precision(x)), x.device)
    return out


def _check_sparse(x: Tensor, k: int, seed: int, nnz: int = 1) -> str | None:
    reason = check_tensors(x)
    if reason is None and k > _BUCKETS:
        reason = (
            f"the Triton kernel multiplies by one-hot tiles, 2·B·D·k·nnz operations, and takes at most {_BUCKETS} "
            f"buckets; got {k}. The CUDA kernel scatters on chip"
        )
    if reason is None and nnz > _NONZEROS:
        reason = f"the Triton kernel takes at most {_NONZEROS} buckets a coordinate; got nnz={nnz}"
    return reason


def sparse_projection(x: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """Signed buckets as one-hot tiles on the tensor cores: no atomic addition, the same bits in every run."""
    from pyinf.triton_kernels.configs import family_of
    from pyinf.triton_kernels.sparse_projection import sparse_launches

    out = torch.empty(x.shape[0], k, dtype=torch.float32, device=x.device)
    workspace = workspace_on(x.device)
    run(sparse_launches(x, k, seed, nnz, out, workspace, family_of(x.device), _precision(x)), x.device)
    return out


register_triton("project_gradients", project_gradients, _check_project)
register_triton("random_projection", random_projection, _check_random)
register_triton("sparse_projection", sparse_projection, _check_sparse)
