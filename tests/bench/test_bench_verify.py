"""Verification passes right kernels and finds each way in which one can be wrong."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyinf.bench import OPS, Case, Shape, cases, check, verified_ops, verify_all
from pyinf.bench.cases import Inputs, backends, call
from pyinf.bench.shapes import MODELS, ODD
from pyinf.bench.verify import poisoned
from pyinf.ops import registry, torch_backend
from pyinf.ops.schemas import SCHEMAS

CPU = torch.device("cpu")
SMALL = [s for s in ODD if s.label in ("small", "odd", "no tokens", "no sequences")]


@pytest.fixture
def backend():
    """Registers a function as the "cuda" backend of an op, for one test."""
    before = {op: list(entries) for op, entries in registry._implementations.items()}

    def put(op, function, check=None):
        registry.register(op, "cuda", function, check)

    yield put
    registry._implementations.clear()
    registry._implementations.update(before)


def only(op, **options):
    return cases([op], ["cuda"], options.pop("dtypes", ["float32"]), SMALL, **options)


def test_every_op_of_the_schemas_has_a_case():
    assert OPS.keys() == SCHEMAS.keys()
    assert all(set(spec.timed) <= set(spec.variants) for spec in OPS.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_the_backends_of_this_machine_pass(op, dtype):
    outcomes = verify_all(CPU, cases([op], ["torch", "cpu"], [dtype], SMALL))
    assert [str(o) for o in outcomes if o.state == "WRONG"] == []
    assert verified_ops(outcomes)[op, "torch"] == "verified"
    layouts = {o.case.layout for o in outcomes if o.state == "ok"}
    assert layouts == {"contiguous", "padded", "transposed", "device offsets"}


def test_kernels_are_taken_from_the_registry(backend):
    before = [c for c in cases(["gradient_norm"], ["cuda"])]
    backend("gradient_norm", torch_backend.gradient_norm)
    after = [c for c in cases(["gradient_norm"], ["cuda"])]
    assert before == [] and len(after) == 3 * (len(ODD) + 3)  # tf32 settings are Triton's alone


def _late(g, a, offsets):
    out = torch_backend.gradient_norm(g, a, offsets)
    return out * (1 + 1e-4)


def _unwritten(g, a, offsets):
    out = torch.empty(offsets.shape[0] - 1)
    right = torch_backend.gradient_norm(g, a, offsets)
    out[:1] = right[:1]
    return out


def _last_token_lost(g, a, offsets):
    keep = torch.ones(g.shape[0], dtype=torch.bool)
    keep[offsets[1:][offsets[1:] > offsets[:-1]] - 1] = False
    return torch_backend.gradient_norm(g * keep[:, None], a, offsets)


_calls = iter(range(10**9))


def _other_every_time(g, a, offsets):
    return torch_backend.gradient_norm(g, a, offsets) * (1 + 2e-7 * (next(_calls) % 2))


def _writes_its_input(g, a, offsets):
    out = torch_backend.gradient_norm(g, a, offsets)
    g.mul_(1.5)
    return out


def _raises(g, a, offsets):
    raise RuntimeError("launch failed")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_late, "allowed"),
        (_unwritten, "allowed"),
        (_last_token_lost, "allowed"),
        (_other_every_time, "other bits"),
        (_writes_its_input, "input was changed"),
        (_raises, "launch failed"),
    ],
)
def test_a_wrong_kernel_is_found(backend, function, reason):
    backend("gradient_norm", function)
    outcomes = verify_all(CPU, only("gradient_norm"))
    wrong = [o for o in outcomes if o.state == "WRONG"]
    assert wrong and reason in wrong[0].reason
    assert "verified" != verified_ops(outcomes)["gradient_norm", "cuda"] and "wrong" in str(verified_ops(outcomes))


def test_writing_beside_the_output_is_found(backend):
    def beside(Lam, g, a, offsets):
        torch_backend.accumulate_squared_gradients(Lam, g, a, offsets)
        full = Lam.as_strided((Lam.shape[0] - 1, Lam.stride(0)), Lam.stride())
        full[:, Lam.shape[1] :] = 0

    backend("accumulate_squared_gradients", beside)
    outcomes = verify_all(CPU, only("accumulate_squared_gradients"))
    assert {o.case.layout for o in outcomes if o.state == "WRONG"} == {"padded"}
    assert all("beside the output" in o.reason for o in outcomes if o.state == "WRONG")


def test_the_upper_triangle_of_a_covariance_is_nobodys(backend):
    def scribbles(C, x, bias, mask):
        torch_backend.accumulate_covariance(C, x, bias, mask)
        C.triu(1).fill_(0)
        C[0, 1:] = 7.0

    backend("accumulate_covariance", scribbles)
    assert {o.state for o in verify_all(CPU, only("accumulate_covariance"))} == {"ok"}


@pytest.mark.parametrize("fault", ["order", "twice", "index", "value"])
def test_a_wrong_scan_is_found(backend, fault):
    def scan(queries, rows, k, format, scale):
        values, indices = (t.clone() for t in torch_backend.scan_topk(queries, rows, k, format, scale))
        if indices.shape[1] > 2:
            if fault == "order":
                values, indices = values.flip(1), indices.flip(1)
            elif fault == "twice":
                indices[:, 1] = indices[:, 0]
            elif fault == "index":
                indices[:, 0] = (indices[:, 0] + 1) % rows.shape[0]
            else:
                values[:, 0] *= 1.01
        return values, indices

    backend("scan_topk", scan)
    assert any(o.state == "WRONG" for o in verify_all(CPU, only("scan_topk")))


@pytest.mark.parametrize("fault", ["factor", "energy", "rank"])
def test_a_wrong_sketch_is_found(backend, fault):
    def sketch(*args):
        L, R, energy = torch_backend.precondition_low_rank(*args)
        if fault == "factor":
            L = L * 1.05
        elif fault == "energy":
            energy = energy * 0.9
        elif L.shape[2]:
            L[:, :, -1] = 0
        return L, R, energy

    backend("precondition_low_rank", sketch)
    assert any(o.state == "WRONG" for o in verify_all(CPU, only("precondition_low_rank")))


def test_a_reason_is_no_failure_but_verifies_nothing(backend):
    backend("gradient_norm", torch_backend.gradient_norm, lambda *a: "only on Sundays")
    outcomes = verify_all(CPU, only("gradient_norm"))
    assert {o.state for o in outcomes} == {"not taken"}
    assert verified_ops(outcomes)["gradient_norm", "cuda"] == "takes no call here: only on Sundays"


def test_half_precision_may_round_between_products_but_not_in_one_sum(backend):
    """dense_scores chains products, so bf16 factors between them are what torch has too; a norm is one sum."""

    def rounded(scores, g, a, offsets, V, per_token):
        G = torch.stack([g[i:j].T @ a[i:j] for i, j in itertools.pairwise(offsets)])
        scores += torch.einsum("qoi,boi->qb", V, G).to(scores.dtype)

    backend("dense_scores", rounded)
    shape = Shape("one", 64, 32, (40, 50))
    assert check(Case("dense_scores", "cuda", shape, "bfloat16"), CPU).state == "ok"
    backend("gradient_norm", lambda g, a, o: torch_backend.gradient_norm(g, a, o).to(g.dtype).float())
    assert check(Case("gradient_norm", "cuda", shape, "bfloat16"), CPU).state == "WRONG"


def test_normal_projections_may_be_held_in_half_precision_but_signs_are_exact(backend):
    from pyinf.bench.formulations import rounded_projection

    backend("random_projection", rounded_projection)
    shape = Shape("one", 4, 8, (2,), flat=300)
    for variant, dtype in (("normal", "bfloat16"), ("normal", "float16"), ("rademacher", "bfloat16")):
        assert check(Case("random_projection", "cuda", shape, dtype, variant), CPU).state == "ok"
    backend("random_projection", lambda x, *rest: rounded_projection(x, *rest).to(x.dtype).float())
    assert check(Case("random_projection", "cuda", shape, "bfloat16", "rademacher"), CPU).state == "WRONG"


def test_uninitialised_memory_is_nan_while_a_kernel_runs():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.isnan(torch.empty(1000)).all() and torch.isnan(torch.randn(3).new_empty(7)).all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_inputs_are_drawn_again_the_same_and_never_zero():
    for spec in OPS.values():
        first, second = (spec.make(Inputs(torch.bfloat16, CPU, seed=3), SMALL[1], spec.variants[0]) for _ in range(2))
        for x, y in zip(first, second, strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y)
                assert not x.is_floating_point() or (x != 0).double().mean() > 0.9


@pytest.mark.parametrize("d", [40, 600])
def test_bases_are_orthogonal(d):
    basis = Inputs(torch.float64, CPU).basis(d)
    assert (basis.T @ basis - torch.eye(d)).abs().max() < (1e-5 if d <= 512 else 1e-12)
    assert (basis != 0).double().mean() > 0.99


def test_work_is_counted_as_the_docstrings_say():
    s = Shape("x", 8, 4, (3, 5), queries=2, rank=1)
    assert OPS["accumulate_squared_gradients"].flops(s, "") == 2 * 8 * 8 * 4
    assert OPS["accumulate_covariance"].flops(s, "") == 8 * 4 * 5
    assert OPS["precondition"].flops(s, "") == 4 * 2 * 8 * 4 * 12
    assert OPS["gradient_norm"].bytes(s, "", 2) == 2 * 8 * 12 + 4 * 2
    assert OPS["dense_scores"].flops(s, "per token") == 2 * 8 * 2 * 8 * 4
    full = Shape("y", 14336, 4096, (1024,) * 8, queries=1, rank=64, query_length=128)
    assert OPS["precondition_low_rank"].flops(full, "") < OPS["precondition"].flops(full, "") / 10


def test_models_have_the_layers_of_their_configurations():
    assert MODELS["llama-8b"]["up_proj"] == (14336, 4096) and MODELS["llama-1b"]["k_proj"] == (512, 2048)
    assert MODELS["gpt2"]["c_attn"] == (2304, 768)


def test_forcing_a_backend_leaves_no_trace():
    x = torch.randn(4, 3)
    call("gradient_norm", "reference", (x, x, torch.tensor([0, 4])))
    assert registry.current_backend() == "auto" and "torch" in backends("gradient_norm")
