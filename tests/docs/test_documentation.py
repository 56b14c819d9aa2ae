from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
# Macros of the C++ sources carry the same prefix and are no environment variables.
READ = re.compile(r"""(?:environ|getenv)\w*(?:\.get)?[\[(]\s*["'](PYINF_[A-Z_]+)""")


def test_generated_parts_are_current():
    command = [sys.executable, str(ROOT / "tools" / "cli_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}; run: python tools/cli_docs.py"


def test_a_stale_block_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import cli_docs

    (tmp_path / "a.md").write_text("before\n<!-- generated: exit-codes -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(cli_docs, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli_docs.py", "--check"])
    assert cli_docs.main() == 1 and "a.md" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["cli_docs.py"])
    assert cli_docs.main() == 0
    text = (tmp_path / "a.md").read_text()
    assert (
        text.startswith("before\n") and text.endswith("after\n") and "`ArtifactError`" in text and "\nold\n" not in text
    )
    monkeypatch.setattr(sys, "argv", ["cli_docs.py", "--check"])
    assert cli_docs.main() == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_environment_variable_is_described():
    read = set()
    for folder in ("pyinf", "triton_kernels", "tools", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(READ.findall(path.read_text(encoding="utf-8")))
    described = set(re.findall(r"`(PYINF_[A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text()))
    assert {"PYINF_BACKEND", "PYINF_CUDA", "PYINF_EMOTION"} <= read
    assert read == described


def test_every_option_of_the_command_line_has_its_row(capsys):
    from pyinf.cli import app

    page = (ROOT / "docs" / "cli.md").read_text()
    for command in app.registered_commands:
        name = command.callback.__name__
        with pytest.raises(SystemExit):
            app([name, "--help"], standalone_mode=True)
        section = page.split(f"### pyinf {name}\n")[1].split("\n### ")[0]
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
        # help texts mention flags of their own; a narrow terminal may cut a flag, a page may not
        assert flags <= set(re.findall(r"--[a-z][a-z-]+", section)) | {f for f in flags if f.endswith("-")}, name


def test_every_operation_is_described():
    from pyinf.ops.schemas import SCHEMAS

    page = (ROOT / "docs" / "ops.md").read_text()
    assert all(f"### {name}\n" in page and f"`torch.ops.pyinf.{name}(" in page for name in SCHEMAS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, page.name, "exec")
