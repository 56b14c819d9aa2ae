"""Every op that Triton serves: what it mutates, what it refuses, and what doctor says of it."""

from __future__ import annotations

import pytest
import torch

from pyinf import ops
from pyinf.errors import BackendUnavailableError
from pyinf.ops import registry, use_backend
from tests.ops.test_schemas import ARGUMENTS

SERVED = sorted(op for op in ARGUMENTS if any(i.backend == "triton" for i in registry._implementations[op]))


def served(op):
    """The arguments of test_schemas that the Triton kernel takes (it may say that it does not take some)."""
    for arguments in ARGUMENTS[op]:
        full = getattr(torch.ops.pyinf, op).default._schema.arguments
        rest = [a.default_value for a in full[len(arguments) :]]
        entry = next(i for i in registry._implementations[op] if i.backend == "triton")
        if entry.check(*arguments, *rest) is None:
            yield arguments


# These two mutate nothing; the scan of test_schemas takes more than a minute in the interpreter.
MUTATION_CHECKED = [op for op in SERVED if op not in ("scan_topk", "sparse_projection")]


@pytest.mark.parametrize("op", MUTATION_CHECKED)
def test_opcheck(op):
    """What the kernel mutates is what the schema says (the fakes do not depend on the backend: tests/ops)."""
    arguments = next(served(op))
    with use_backend("triton", op):
        torch.library.opcheck(getattr(torch.ops.pyinf, op).default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("op", SERVED)
def test_float64_is_refused_with_a_reason(op):
    arguments = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in ARGUMENTS[op][0]]
    with use_backend("triton", op), pytest.raises(BackendUnavailableError, match="float64"):
        getattr(torch.ops.pyinf, op)(*arguments)


def test_doctor_sees_them():
    table = ops.describe()
    assert [op for op in table if table[op]["triton"] == "available"] == SERVED
