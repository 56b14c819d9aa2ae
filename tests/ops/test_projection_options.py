"""Options of the projections are checked and resolved once, whatever the backend, through ``torch.ops`` too."""

from __future__ import annotations

import pytest
import torch

from pyinf.errors import ConfigError
from pyinf.ops import projection_options, use_backend
from tests.ops.cases import make_layer


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_unknown_options_are_refused_at_the_op(backend):
    x = make_layer([3, 4], 5, 6, torch.float32)
    P = torch.ones(5, 2), torch.ones(6, 3)
    call = torch.ops.pyinf.project_gradients
    with use_backend(backend):
        with pytest.raises(ConfigError, match="unknown distribution 'uniform'"):
            call(x.g, x.a, x.offsets, *P, 2, 3, 0, "uniform")  # nothing is drawn: refused all the same
        with pytest.raises(ConfigError, match="unknown epilogue 'int4'"):
            call(x.g, x.a, x.offsets, *P, 2, 3, 0, "rademacher", "int4")
        with pytest.raises(ConfigError, match="unknown distribution 'uniform'"):
            torch.ops.pyinf.random_projection(x.a, 4, 0, "uniform")


@pytest.mark.parametrize("epilogue", projection_options.EPILOGUES)
def test_sizes_come_from_the_matrices(epilogue):
    """Numbers of columns that do not fit given matrices are not used, by the op or its fake."""
    x = make_layer([3, 4], 5, 6, torch.float32)
    P_g = torch.ones(5, 3)
    values, scale = torch.ops.pyinf.project_gradients(x.g, x.a, x.offsets, P_g, None, 99, 7, 0, "normal", epilogue)
    empty, none = projection_options.empty_result(2, 3, 7, epilogue, x.g.device)
    assert values.shape == empty.shape and values.dtype == empty.dtype and scale.shape == none.shape
    meta = [t.to("meta") for t in (x.g, x.a, x.offsets, P_g)]
    faked, _ = torch.ops.pyinf.project_gradients(*meta, None, 99, 7, 0, "normal", epilogue)
    assert faked.shape == empty.shape and faked.dtype == empty.dtype


def test_a_kernel_says_what_it_does_not_serve():
    assert projection_options.too_wide("CUDA", 128, 128, 1) is None
    assert "CUDA kernel projects to at most 128 columns" in projection_options.too_wide("CUDA", 128, 1, 129)
