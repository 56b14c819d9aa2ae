"""The check of the layers, checked."""

from __future__ import annotations

import check_layers
import pytest


def test_the_package_keeps_its_layers(root):
    assert check_layers.violations(root / "pyinf") == []


@pytest.mark.parametrize(
    "line",
    [
        "from pyinf.methods import gradient",
        "from pyinf import methods",
        "import pyinf.cli",
        "from ..attribute import Attributor",
        "def f():\n    from pyinf.study import tasks",
    ],
)
def test_an_upward_import_is_found(tmp_path, line):
    package = tmp_path / "pyinf" / "capture"
    package.mkdir(parents=True)
    (package / "hooks.py").write_text(line + "\n")
    [found] = check_layers.violations(tmp_path / "pyinf")
    assert "capture/hooks.py" in found and "is above it" in found


def test_downward_and_own_imports_pass(tmp_path):
    package = tmp_path / "pyinf" / "capture"
    package.mkdir(parents=True)
    (package / "hooks.py").write_text("from pyinf import ops\nfrom pyinf.capture import x\nfrom .y import z\n")
    assert check_layers.violations(tmp_path / "pyinf") == []


def test_neighbours_may_not_import_each_other(tmp_path):
    for own, other in (("curvature", "score"), ("score", "curvature")):
        (tmp_path / "pyinf" / own).mkdir(parents=True)
        (tmp_path / "pyinf" / own / "a.py").write_text(f"from pyinf import {other}\n")
    assert len(check_layers.violations(tmp_path / "pyinf")) == 1


def test_a_module_without_a_layer_is_found(tmp_path):
    (tmp_path / "pyinf").mkdir()
    (tmp_path / "pyinf" / "novel.py").touch()
    assert "no layer" in check_layers.violations(tmp_path / "pyinf")[0]
