"""The board compares like with like: equal budgets for refinement here and in bergson, options that methods take."""

from __future__ import annotations

import pytest
import torch

import pyinf
from benchmarks.board.rows import DOCUMENTS, ITERATIONS, ROWS
from pyinf.evaluate import ready_protocol
from pyinf.methods.options import settle
from pyinf.plan import default_token_budget

ATTRIBUTOR = {"fisher", "damping_mode", "certify"}


@pytest.mark.parametrize("steps", ITERATIONS)
def test_refinement_has_one_budget_in_both_libraries(steps):
    own, other = ROWS[f"ekfac_cg_{steps}"], ROWS[f"bergson_ekfac_cg_{steps}"]
    assert own.dampings == other.dampings
    assert own.options["max_iterations"] == other.options["steps"] == steps
    # Batches are filled up to the token budget of the CPU; sequences of the protocol are of one length.
    length = ready_protocol("small").length
    per_batch = default_token_budget(torch.device("cpu")) // length
    assert own.options["fit_batches"] * per_batch == other.options["documents"] == DOCUMENTS


def test_every_row_of_pyinf_has_options_that_its_method_takes():
    for name, row in ROWS.items():
        assert row.dampings == tuple(sorted(row.dampings)) and row.about()["method"] == row.method
        if row.library == "pyinf" and row.method != "bm25":
            method = pyinf.methods.get(row.method)
            given = {k: v for k, v in row.options.items() if k not in ATTRIBUTOR}
            settled = settle(name, method.options, {}, given)
            assert settled.items() >= given.items()
