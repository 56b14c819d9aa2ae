"""A tiny Llama with its tokenizer, and data files for it."""

from __future__ import annotations

import pytest
from cli_data import rows, write

from tests.tiny_model import save_llama


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    save_llama(home, [r["prompt"] + " " + r["response"] for r in rows(40)])
    return home


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "train.jsonl", rows(24)), write(tmp_path / "queries.jsonl", rows(5, 100))
