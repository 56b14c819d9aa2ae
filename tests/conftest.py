"""Settings of every test run: threads, GPU tests, and the skip budget."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("skip_budget", "the most tests that may skip themselves in one run", default="0")


TRITON = Path(__file__).resolve().parent / "triton"


def pytest_configure(config: pytest.Config) -> None:
    # Triton decides when a kernel is decorated, so a process is for its interpreter or it is not: it is when nothing
    # but tests/triton was asked for. Workers of pytest-xdist inherit the variable.
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if asked and all(path == TRITON or TRITON in path.parents for path in asked):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path == TRITON and os.environ.get("TRITON_INTERPRET") != "1" else None


def pytest_report_header(config: pytest.Config) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton: kernels run in its interpreter"
    return "triton: kernels are compiled, not run; run tests/triton by itself for the interpreter"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted and not _gpu():
        config.hook.pytest_deselected(items=wanted)
        items[:] = [item for item in items if item not in wanted]


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(config, "workerinput") or reporter is None:
        return
    skipped = len(reporter.stats.get("skipped", []))
    budget = int(config.getini("skip_budget"))
    if skipped > budget:
        reporter.write_line("")
        reporter.write_line(
            f"{skipped} tests skipped themselves; the budget is {budget} (skip_budget in pyproject.toml)", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
