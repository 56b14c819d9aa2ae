"""Every Triton kernel × configuration × architecture compiled ahead of time, its machine code held to its claims."""

from __future__ import annotations

import pytest

from benchmarks import compile_table

CASES = list(compile_table.triton_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.module}-{c.name}-{c.arch}")
def test_machine_code(case):
    line, wrong = compile_table.compile_case(case)
    assert wrong == []
    assert compile_table.differences(line, "triton", compile_table.triton_version()) == []


def test_the_table_holds_nothing_else():
    _, lines = compile_table.read_table("triton")
    have = {(case.module, case.name, case.launch.kernel.__name__, case.arch) for case in CASES}
    assert set(lines) - have == set()
