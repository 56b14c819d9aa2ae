"""Launches broken on purpose: the ahead-of-time gate, and the table of machine code, have to see it."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import compile_table
from pyinf.triton_kernels.configs import Config


def case_of(name: str, arch: str = "sm_80") -> compile_table.Case:
    return next(c for c in compile_table.triton_cases([arch], ["squared_gradients"]) if c.name == name)


def changed(case: compile_table.Case, arguments=None, constants=None, **options) -> compile_table.Case:
    launch = dataclasses.replace(
        case.launch,
        arguments={**case.launch.arguments, **(arguments or {})},
        constants={**case.launch.constants, **(constants or {})},
        **options,
    )
    return case._replace(launch=launch)


def test_row_lengths_that_16_does_not_divide():
    """What a launcher loses when it forgets to pad: no asynchronous copies."""
    case = changed(case_of("bfloat16-half"), {"g_row": 4097, "a_row": 14337})
    line, wrong = compile_table.compile_case(case)
    assert "claims asynchronous copies (LDGSTS), but has none" in wrong
    assert any("async_copies: 0 here" in d for d in differences(line))


def test_tiles_that_do_not_fit_registers():
    case = changed(case_of("bfloat16-half"), constants={"BM": 256, "BN": 256})
    _, wrong = compile_table.compile_case(case)
    assert any("it spills" in message for message in wrong) and any("local memory" in message for message in wrong)


def test_stages_that_do_not_fit_shared_memory():
    case = changed(case_of("bfloat16-half", "sm_86"), constants={"BK": 128}, num_stages=4)
    _, wrong = compile_table.compile_case(case)
    assert any("shared memory; sm_86 has" in message for message in wrong)


def test_no_tensor_cores():
    case = changed(case_of("float32-tf32"), constants={"PRECISION": "ieee"})
    _, wrong = compile_table.compile_case(case)
    assert any("claims tensor-core instructions HMMA, but has none" in message for message in wrong)


def differences(line):
    return compile_table.differences(line, "triton", compile_table.triton_version())


def test_the_table_is_compared_exactly_for_its_own_compiler(monkeypatch):
    version, lines = compile_table.read_table("triton")
    line = next(iter(lines.values()))
    assert compile_table.differences(line, "triton", version) == []
    off = {**line, "registers": str(int(line["registers"]) + 1)}
    [message] = compile_table.differences(off, "triton", version)
    assert message.startswith(f"registers: {off['registers']} here, {line['registers']} in the table")
    assert compile_table.differences(off, "triton", "triton 99.0") == []
    [message] = compile_table.differences({**line, "case": "new"}, "triton", "triton 99.0")
    assert "is not in benchmarks/results/compile/triton.csv" in message


def test_divisibility_of_what_is_launched():
    """16 is looked for in integers and in addresses; 1 and None become constants, as in Triton's own launcher."""
    special = case_of("bfloat16-half").launch.specialisation()
    assert {"g", "a", "Lam", "g_row", "a_row", "read_g", "d_in"} <= set(special.divisible_by_16)
    assert special.constants["partial"] is None and "sequences" in special.divisible_by_16
    special = changed(case_of("bfloat16-half"), {"g_row": 4098, "sequences": 1}).launch.specialisation()
    assert "g_row" not in special.divisible_by_16 and special.constants["sequences"] == 1


def test_names_of_cuda_kernels_do_not_depend_on_the_path():
    names = [f"_ZN5pyinf36_GLOBAL__N__{path}_4_n_cu_9960abc91tILi3EEEvPf" for path in ("b61c088a", "86142832")]
    assert {compile_table.stable_name(name) for name in names} == {"_ZN5pyinf12_GLOBAL__N_11tILi3EEEvPf"}
    assert compile_table.stable_name("_Z5plainPf") == "_Z5plainPf"


def test_names_of_configurations():
    assert Config({"BM": 64, "GROUP": 8}, 8, 2).name == "BM64_GROUP8_w8_s2"
    with pytest.raises(ValueError, match="two cases"):
        list(duplicated())


def duplicated():
    from pyinf.triton_kernels import squared_gradients

    original = squared_gradients.aot_cases
    squared_gradients.aot_cases = lambda arch: [*original(arch)] * 2
    try:
        yield from compile_table.triton_cases(["sm_80"], ["squared_gradients"])
    finally:
        squared_gradients.aot_cases = original
