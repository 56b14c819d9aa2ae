from __future__ import annotations

import pytest

from tests import poison as poisoned_memory


@pytest.fixture
def poison(monkeypatch):
    poisoned_memory.install(monkeypatch)
