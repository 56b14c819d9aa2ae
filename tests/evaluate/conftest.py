"""One bank of the quick protocol for all tests that train a language model."""

from __future__ import annotations

import pytest

from pyinf.evaluate import Bank, full, half_subsets, ready_protocol


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    bank = Bank(tmp_path_factory.mktemp("quick") / "bank", ready_protocol("quick"))
    n = bank.protocol.train_size
    bank.build(full(n, (0,), 2) + half_subsets(n, 12) + half_subsets(n, 6, seed=1), workers=1)
    return bank
