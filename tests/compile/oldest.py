"""Run by test_oldest_triton.py in a process that imports the oldest supported Triton: compiles one module's cases.

    python oldest.py MODULE ARCH      prints {"triton": version, "cases": count, "wrong": {case: [messages]}}

One half precision (bfloat16) and float32, every configuration: float16 takes the same path as bfloat16. This release
copies float32 operands of tf32 products through registers, so there no asynchronous copies are asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton

from benchmarks import compile_table


def main() -> None:
    module, arch = sys.argv[1:]
    wrong, count = {}, 0
    for case in compile_table.triton_cases([arch], [module]):
        if case.name.startswith("float16"):
            continue
        count += 1
        if "tf32" in case.name:
            case = case._replace(claims={key: value for key, value in case.claims.items() if key != "async_copies"})
        try:
            _, messages = compile_table.compile_case(case)
        except Exception as error:
            messages = [f"{type(error).__name__}: {error}"[:2000]]
        if messages:
            wrong[case.name] = messages
    print(json.dumps({"triton": triton.__version__, "cases": count, "wrong": wrong}))


main()
