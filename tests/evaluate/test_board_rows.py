"""The board compares like with like: equal budgets for refinement here and in bergson, options that methods take."""

from __future__ import annotations

import pytest

import pyinf
from benchmarks.board.rows import ITERATIONS, ROWS, TRAIN
from pyinf.evaluate import ready_protocol
from pyinf.methods.options import settle

ATTRIBUTOR = {"fisher", "damping_mode", "certify"}


@pytest.mark.parametrize("steps", ITERATIONS)
def test_refinement_has_one_budget_in_both_libraries(steps):
    own, other = ROWS[f"ekfac_cg_{steps}"], ROWS[f"bergson_ekfac_cg_{steps}"]
    assert own.dampings == other.dampings
    assert own.options["max_iterations"] == other.options["steps"] == steps
    # All training sequences in the curvature of both: no sample that the one could be luckier with than the other.
    assert other.options["documents"] == TRAIN == ready_protocol("small").train_size
    assert own.options.get("fit_batches") is None


def test_every_row_of_pyinf_has_options_that_its_method_takes():
    for name, row in ROWS.items():
        assert row.dampings == tuple(sorted(row.dampings)) and row.about()["method"] == row.method
        if row.library == "pyinf" and row.method != "bm25":
            method = pyinf.methods.get(row.method)
            given = {k: v for k, v in row.options.items() if k not in ATTRIBUTOR}
            settled = settle(name, method.options, {}, given)
            assert settled.items() >= given.items()
