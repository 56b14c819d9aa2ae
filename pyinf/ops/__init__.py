"""The operations that influence functions are made of, each with one schema, a reference and several backends.

Every function is also registered as ``torch.ops.pyinf.<name>`` in the packed layout. ``use_backend`` and
``set_backend`` choose the implementation; ``describe()`` says what runs here, and why the rest does not.
"""

from __future__ import annotations

from pyinf.ops import (
    costs,
    cpu_backend,
    cuda_backend,
    grouped,
    philox,
    reference,
    schemas,
    torch_backend,
    triton_backend,
    verified,
)
from pyinf.ops.api import (
    accumulate_covariance,
    accumulate_squared_gradients,
    dense_scores,
    gradient_dot,
    gradient_norm,
    low_rank_scores,
    precondition,
    precondition_low_rank,
    symmetrize_,
)
from pyinf.ops.api_projection import (
    project_gradients,
    random_projection,
    scan_topk,
    select_coordinates,
    select_gradient_coordinates,
    sparse_projection,
    sparse_projection_factors,
)
from pyinf.ops.packing import Packed, pack
from pyinf.ops.precision import float32_precision, set_float32_precision
from pyinf.ops.quantise import pack_signs, quantise_int8, unpack_signs
from pyinf.ops.registry import BACKENDS, current_backend, describe, set_backend, use_backend

__all__ = [
    "BACKENDS",
    "Packed",
    "accumulate_covariance",
    "accumulate_squared_gradients",
    "costs",
    "cpu_backend",
    "cuda_backend",
    "current_backend",
    "dense_scores",
    "describe",
    "float32_precision",
    "gradient_dot",
    "gradient_norm",
    "grouped",
    "low_rank_scores",
    "pack",
    "pack_signs",
    "philox",
    "precondition",
    "precondition_low_rank",
    "project_gradients",
    "quantise_int8",
    "random_projection",
    "reference",
    "scan_topk",
    "schemas",
    "select_coordinates",
    "select_gradient_coordinates",
    "set_backend",
    "set_float32_precision",
    "sparse_projection",
    "sparse_projection_factors",
    "symmetrize_",
    "torch_backend",
    "triton_backend",
    "unpack_signs",
    "use_backend",
    "verified",
]
