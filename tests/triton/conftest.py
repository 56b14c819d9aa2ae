"""Triton kernels on CPU tensors, in Triton's interpreter: a process of their own (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch

from tests import poison
from tests.triton.harness import N_THREADS


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Everything that the wrappers allocate uninitialised is full of NaN."""
    poison.install(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    torch.set_num_threads(N_THREADS)
