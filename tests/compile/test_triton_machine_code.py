"""Every Triton kernel × configuration compiled ahead of time for sm_80 and sm_90, its machine code held to its claims.

The table also holds sm_86, which `python -m benchmarks.compile_table` compiles: here it would cost a third of the time.
"""

from __future__ import annotations

import pytest

from benchmarks import compile_table

CASES = list(compile_table.triton_cases(["sm_80", "sm_90"]))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.module}-{c.name}-{c.arch}")
def test_machine_code(case):
    line, wrong = compile_table.compile_case(case)
    assert wrong == []
    assert compile_table.differences(line, "triton", compile_table.triton_version()) == []


def test_the_table_holds_nothing_else():
    _, lines = compile_table.read_table("triton")
    have = {(case.module, case.name, case.launch.kernel.__name__, case.arch) for case in compile_table.triton_cases()}
    assert set(lines) - have == set()
