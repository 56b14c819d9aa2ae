"""Layers of one shape in one launch, against the float64 reference of each layer on its own."""

from __future__ import annotations

import pytest
import torch

from pyinf import ops
from pyinf.bench.grouped import _run, verify_grouped
from pyinf.errors import ConfigError
from pyinf.ops import grouped, reference, triton_grouped

OFFSETS = torch.tensor([0, 5, 5, 40, 71])


def _layers(d_out: int, d_in: int, dtype: torch.dtype, count: int = 3, tokens: int = 71):
    generator = torch.Generator().manual_seed(d_out * 1000 + d_in)
    g = [torch.randn(tokens, d_out, generator=generator).to(dtype) for _ in range(count)]
    a = [torch.randn(tokens, d_in, generator=generator).to(dtype) for _ in range(count)]
    return g, a


def _error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(48, 32), (37, 65)])
def test_squared_gradients(sizes, dtype):
    g, a = _layers(*sizes, dtype)
    g.append(g[0][:, :])
    a.append(a[1])
    Lam = [torch.full(sizes, 0.5) for _ in g]
    with ops.use_backend("triton"):
        grouped.accumulate_squared_gradients_group(Lam, g, a, OFFSETS)
    for out, left, right in zip(Lam, g, a, strict=True):
        exact = torch.full(sizes, 0.5, dtype=torch.float64)
        reference.accumulate_squared_gradients(exact, left.double(), right.double(), OFFSETS)
        assert _error(out, exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("d", [48, 65])
def test_covariances(d, dtype):
    x, _ = _layers(d, 8, dtype)
    C = [torch.full((d, d), 0.25) for _ in x]
    with ops.use_backend("triton"):
        grouped.accumulate_covariance_group(C, x, [False] * len(x))
    for out, rows in zip(C, x, strict=True):
        exact = torch.full((d, d), 0.25, dtype=torch.float64)
        reference.accumulate_covariance(exact, rows.double())
        assert _error(out.tril(), exact.tril()) < 1e-6


def test_one_launch_serves_the_layers_of_one_shape(monkeypatch):
    launches = []
    monkeypatch.setattr(triton_grouped, "run", lambda made, device: launches.extend(made))
    g, a = _layers(16, 32, torch.float32, count=4)
    h, b = _layers(16, 48, torch.float32, count=2)
    Lam = [torch.zeros(16, 32) for _ in g] + [torch.zeros(16, 48) for _ in h]
    with ops.use_backend("triton"):
        grouped.accumulate_squared_gradients_group(Lam, g + h, a + b, OFFSETS)
    assert [launch.grid[2] for launch in launches] == [4, 2]


def test_layers_that_the_grouped_kernel_does_not_take_go_one_by_one():
    g, a = _layers(16, 32, torch.float32, count=2)
    with_bias = [torch.zeros(33, 33) for _ in a]
    odd = torch.zeros(16 * 32 + 1)[1:].view(16, 32)  # an address that is no multiple of 16
    with ops.use_backend("triton"):
        grouped.accumulate_covariance_group(with_bias, a, [True, True])
        grouped.accumulate_squared_gradients_group([odd, torch.zeros(16, 32)], g, a, OFFSETS)
    exact = torch.zeros(33, 33, dtype=torch.float64)
    reference.accumulate_covariance(exact, a[1].double(), bias=True)
    assert _error(with_bias[1].tril(), exact) < 1e-6
    exact = torch.zeros(16, 32, dtype=torch.float64)
    reference.accumulate_squared_gradients(exact, g[0].double(), a[0].double(), OFFSETS)
    assert _error(odd, exact) < 1e-6


def test_two_layers_that_share_an_accumulator_do_not_race():
    g, a = _layers(16, 32, torch.float32, count=2)
    Lam = torch.zeros(16, 32)
    with ops.use_backend("triton"):
        grouped.accumulate_squared_gradients_group([Lam, Lam], g, a, OFFSETS)
    exact = torch.zeros(16, 32, dtype=torch.float64)
    for left, right in zip(g, a, strict=True):
        reference.accumulate_squared_gradients(exact, left.double(), right.double(), OFFSETS)
    assert _error(Lam, exact) < 1e-6


def test_lists_that_do_not_fit_are_refused():
    g, a = _layers(16, 32, torch.float32, count=2)
    with pytest.raises(ConfigError, match="one Lam, g and a a layer"):
        grouped.accumulate_squared_gradients_group([torch.zeros(16, 32)], g, a, OFFSETS)
    with pytest.raises(ConfigError, match="shape"):
        grouped.accumulate_covariance_group([torch.zeros(3, 3)] * 2, a, [False, False])


@pytest.mark.parametrize("op", ["accumulate_covariance", "accumulate_squared_gradients"])
def test_verification_of_the_grouped_kernels(op):
    sizes = {"dtypes": (torch.float32, torch.float16), "shapes": ((40, 24),)}
    passed, lines = verify_grouped(op, torch.device("cpu"), **sizes)
    assert passed and len(lines) == 2 and all(line.startswith("ok") for line in lines)

    def off_by_a_little(*call):
        return [total * (1 + 1e-4) for total in _run(*call)]

    passed, lines = verify_grouped(op, torch.device("cpu"), run=off_by_a_little, **sizes)
    assert not passed and all(line.startswith("WRONG") for line in lines)

    def not_a_number(*call):
        return [total * float("nan") for total in _run(*call)]

    assert not verify_grouped(op, torch.device("cpu"), run=not_a_number, **sizes)[0]
