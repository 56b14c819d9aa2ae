"""Fixtures of the data tests."""

from __future__ import annotations

import pytest
from tiny_tokenizers import CHATML, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(template=CHATML)
