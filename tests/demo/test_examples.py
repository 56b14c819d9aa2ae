from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name, folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trace_an_answer(tmp_path):
    printed = _run("trace_an_answer.py", tmp_path, "out")
    assert "plum is blue" in printed.splitlines()[0]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_drop_in_ihvp(tmp_path):
    printed = _run("drop_in_ihvp.py", tmp_path)
    assert "strongest proponent: 7" in printed
    assert float(re.search(r"own scores: (\S+)", printed)[1]) < 1e-4
