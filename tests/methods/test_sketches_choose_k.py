"""The expected loss of a projection against the loss of drawn ones, in float64."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from sketch_oracle import examples, tiny

import pyinf
from pyinf.cli import store_plan
from pyinf.errors import ConfigError
from pyinf.store.choose_k import _Spectrum, choose_k, effective_dimension, expected, implicit_damping, smallest_k


def measured(Lam: torch.Tensor, lam: float, draw, trials: int = 12, pairs: int = 48) -> tuple[float, float]:
    """Correlation and relative error of projected scores, over drawn projections, queries and examples."""
    generator = torch.Generator().manual_seed(1)
    L = Lam.reshape(-1)
    parts = torch.zeros(4, dtype=torch.float64)
    for _ in range(trials):
        P = draw(generator)
        q, g = torch.randn(2, pairs, L.numel(), generator=generator, dtype=torch.float64) * L.sqrt()
        exact = (q / (L + lam)) @ g.T
        K = P.T @ (L[:, None] * P)
        K.diagonal().add_(lam)
        found = (q @ P) @ torch.linalg.solve(K, (g @ P).T)
        parts += torch.stack(
            [(exact * found).sum(), exact.square().sum(), found.square().sum(), (exact - found).square().sum()]
        )
    return float(parts[0] / (parts[1] * parts[2]).sqrt()), float((parts[3] / parts[1]).sqrt())


def signs(D: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return (2.0 * torch.randint(0, 2, (D, k), generator=generator) - 1).double() / k**0.5


POWER = torch.arange(1, 301).double() ** -1.2
FLAT = torch.linspace(1.0, 0.5, 300).double()


@pytest.mark.parametrize("Lam, damping", [(POWER, 0.1), (POWER, 3.0), (FLAT, 0.5)])
@pytest.mark.parametrize("k", [12, 50, 200])
def test_flat_projections_lose_what_is_expected(Lam, damping, k):
    lam = damping * float(Lam.mean())
    correlation, error = measured(Lam, lam, lambda generator: signs(300, k, generator))
    found = expected(Lam, lam, k)
    assert found.correlation == pytest.approx(correlation, abs=0.02)
    assert found.error == pytest.approx(error, abs=0.03)


def test_the_expectation_does_not_come_out_right_by_chance():
    # A tenfold damping is another problem altogether: the same comparison must fail there.
    lam = 0.1 * float(POWER.mean())
    correlation, _ = measured(POWER, lam, lambda generator: signs(300, 50, generator))
    assert abs(expected(POWER, 10 * lam, 50).correlation - correlation) > 0.04


@pytest.mark.parametrize("k_g, k_a", [(4, 4), (8, 12)])
def test_two_sided_projections_lie_between_the_estimate_and_a_flat_one(k_g, k_a):
    Lam = torch.outer(torch.arange(1, 17).double() ** -0.8, torch.arange(1, 21).double() ** -1.2)
    lam = 0.3 * float(Lam.mean())

    def draw(generator):
        return torch.kron(signs(16, k_g, generator), signs(20, k_a, generator))

    correlation, _ = measured(Lam, lam, draw)
    low, high = expected(Lam, lam, (k_g, k_a), "two_sided"), expected(Lam, lam, k_g * k_a)
    assert low.correlation - 0.02 < correlation < high.correlation + 0.02
    one_side = expected(Lam, lam, (k_g, 20), "two_sided")
    whole, _ = measured(Lam, lam, lambda generator: torch.kron(signs(16, k_g, generator), torch.eye(20).double()))
    assert one_side.correlation == pytest.approx(whole, abs=0.03)


def test_the_largest_eigenvalues_lose_exactly_the_rest():
    lam = 0.1 * float(POWER.mean())
    keep = torch.eye(300, dtype=torch.float64)[:, torch.randperm(300)]
    shuffled = keep.T @ POWER
    selected = shuffled.argsort(descending=True)[:40]
    correlation, error = measured(shuffled, lam, lambda _: torch.eye(300, dtype=torch.float64)[:, selected])
    found = expected(shuffled, lam, 40, "top")
    assert found.correlation == pytest.approx(correlation, abs=0.02)
    assert found.error == pytest.approx(error, abs=0.02)
    assert found.error**2 == pytest.approx(1 - found.correlation**2)


def test_the_implicit_damping_solves_its_equation():
    for lam, k in ((0.01, 5), (0.01, 100), (1.0, 5)):
        kappa = implicit_damping(POWER, lam, k)
        assert kappa * (1 - effective_dimension(POWER, kappa) / k) == pytest.approx(lam, rel=1e-9)
        assert kappa >= lam
    assert implicit_damping(POWER, 0.01, 10**9) == pytest.approx(0.01, rel=1e-5)


def test_binned_spectra_agree_with_whole_ones():
    Lam = torch.arange(1, 20_001).double() ** -1.5
    binned, whole = _Spectrum.of(Lam), _Spectrum(Lam, torch.ones_like(Lam))
    assert binned.values.numel() < 8193 and binned.sum(binned.values) == pytest.approx(float(Lam.sum()))
    assert implicit_damping(binned, 1e-4, 300) == pytest.approx(implicit_damping(whole, 1e-4, 300), rel=1e-4)


def test_the_smallest_k_reaches_its_target_and_hardly_less_does():
    lam = 0.1 * float(POWER.mean())
    for kind in ("flat", "top"):
        found = smallest_k(POWER, lam, 0.8, kind)
        assert found.correlation >= 0.8 > expected(POWER, lam, int(found.k * 0.95), kind).correlation
    assert smallest_k(POWER, lam, 0.8, "top").k < smallest_k(POWER, lam, 0.8, "flat").k
    assert smallest_k(FLAT, 0.1, 0.999) is None  # a flat spectrum: no projection reaches it


@pytest.mark.parametrize("kind", ["flat", "two_sided", "top"])
def test_a_plan_from_fitted_factors_has_a_line_a_layer(kind):
    attributor = pyinf.Attributor(tiny(torch.float32), fisher="empirical").fit(examples(10, 1))
    plan = choose_k(attributor.factors, targets=(0.5, 0.9), kind=kind)
    assert [choice.name for choice in plan.layers] == attributor.selection.names
    for choice in plan.layers:
        Lam = attributor.factors.layers[choice.name].corrected
        assert choice.damping == pytest.approx(0.1 * float(Lam.mean()), rel=1e-5)
        assert (
            choice.effective == pytest.approx(effective_dimension(Lam, choice.damping))
            and choice.effective < Lam.numel()
        )
        for target, found in choice.choices.items():
            assert found is None or found.correlation >= target
    table = plan.table()
    assert len(table) == 1 + len(plan.layers) + (kind != "two_sided") and table[1][0] == plan.layers[0].name
    assert 0 < plan.row_values(0.5) <= plan.row_values(0.9) <= attributor.selection.traced_parameters
    assert plan.to_dict()["layers"][0]["choices"].keys() == {"0.5", "0.9"}


def test_what_cannot_work_says_so():
    with pytest.raises(ConfigError, match="unknown kind"):
        expected(POWER, 0.1, 5, "sideways")
    with pytest.raises(ConfigError, match="at least 1"):
        expected(POWER, 0.1, 0)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        smallest_k(POWER, 0.1, 1.0)


def test_the_command_prints_the_plan_of_fitted_factors(tmp_path, capsys):
    attributor = pyinf.Attributor(tiny(torch.float32), fisher="empirical").fit(examples(10, 1))
    attributor.factors.save(tmp_path / "factors")
    plan = choose_k(attributor.factors, targets=(0.5,))
    app = typer.Typer()
    app.command()(store_plan.plan)
    app([str(tmp_path / "factors"), "--target", "0.5", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["row_values"] == {"0.5": plan.row_values(0.5)} and len(found["layers"]) == len(plan.layers)
    app([str(tmp_path / "factors"), "--target", "0.5"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "d_eff" in shown and "all, jointly" in shown and f"{plan.row_values(0.5):,} values a row" in shown
