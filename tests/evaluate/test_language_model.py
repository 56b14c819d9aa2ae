"""The ready protocols: trained on the spot, the same on every run, and what the board makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import pyinf
from pyinf.cli.evaluate import bank_model, scorer
from pyinf.errors import ArtifactError, ConfigError, DataError
from pyinf.evaluate import (
    Bank,
    LanguageModelProtocol,
    bank_noise,
    compare_rows,
    evaluate_scores,
    full,
    half_subsets,
    read_rows,
    ready_protocol,
    run_row,
    tail_patch,
    time_row,
)
from pyinf.evaluate.language_model import fit_model, sequence_losses


def rows(tokens):
    return [{"input_ids": ids} for ids in tokens]


def test_training_learns_and_two_runs_of_one_subset_are_identical(quick):
    first, second = quick.entries("full", 0, None)
    assert first.model == second.model and first.model is not None
    assert np.array_equal(first.measured["loss"], second.measured["loss"])
    assert quick.repeats() == (1, 0.0)
    protocol = quick.protocol
    assert protocol.train_tokens.shape == (48, 24) and protocol.query_tokens.shape == (8, 24)
    trained = first.measured["loss"].mean() / 23
    assert trained < protocol.facts["base_loss_on_queries"] < np.log(384)
    noise = bank_noise(quick)["half"]
    assert noise["subsets"] == 6 and noise["largest_difference"] > 0


def test_another_process_gives_the_same_training(quick, tmp_path):
    """The same description elsewhere: data, base model and trained weights come out the same, in a worker as well."""
    other = Bank(tmp_path / "bank", ready_protocol("quick"))
    assert other.identity == quick.identity
    found = other.build(half_subsets(48, 2), workers=2)
    for a, b in zip(found, quick.entries("half", 0)[:2], strict=True):
        assert a.model == b.model and np.array_equal(a.measured["loss"], b.measured["loss"])


def test_a_copy_weighs_what_two_examples_weigh(quick):
    tokens = quick.protocol.train_tokens[:8]
    settings = {"seed": 0, "epochs": 1, "rate": 1e-3, "batch": 64, "weight_decay": 0.0, "beta2": 0.9}
    twice, doubled = quick.protocol.fresh(), quick.protocol.fresh()
    fit_model(twice, tokens, np.array([2, 1, 1, 1, 1, 1, 1, 0]), **settings)
    fit_model(doubled, torch.cat([tokens[:7], tokens[:1]]), np.ones(8), **settings)
    for a, b in zip(twice.parameters(), doubled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6)
    with pytest.raises(DataError, match="not negative and not all 0"):
        fit_model(twice, tokens, np.zeros(8), **settings)


def test_only_the_linear_layers_move_where_asked(quick):
    protocol = quick.protocol
    model, start = protocol.fresh(), protocol.fresh()
    settings = {"seed": 0, "epochs": 1, "rate": 1e-3, "batch": 64, "weight_decay": 0.0, "beta2": 0.9}
    fit_model(model, protocol.train_tokens, np.ones(48), parameters="linear", **settings)
    for (name, a), b in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b) != name.endswith("proj.weight"), name


def test_measurements(quick):
    protocol, model = quick.protocol, bank_model(quick)
    found = protocol.measure(model)
    ids = protocol.query_tokens[:1]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    log_p = logits[:-1].log_softmax(-1)
    assert found["loss"][0] == pytest.approx(-float(log_p.gather(1, ids[0, 1:, None]).sum()), rel=1e-6)
    target = int(ids[0, -1])
    others = torch.cat([logits[-2, :target], logits[-2, target + 1 :]])
    assert found["margin"][0] == pytest.approx(float(logits[-2, target] - others.max()), rel=1e-5, abs=1e-5)
    assert np.allclose(found["loss"], quick.entries("full", 0)[0].measured["loss"], rtol=1e-6)


def test_curvature_beats_the_dot_product_on_the_quick_bank(quick, tmp_path):
    """End to end: methods of the library on the bank's model; the true losses order them as theory does."""
    model = bank_model(quick)
    for name, dampings in (("grad_dot", [0.1]), ("ekfac", [0.01, 0.1, 1.0])):
        row = run_row(quick, name, scorer(model, name), tmp_path / name, dampings, qld_k=3 if name == "ekfac" else None)
        assert row["seconds"] > 0 and set(row["results"]) >= {"lds"}
    found = {r["name"]: r for r in read_rows(tmp_path, quick)}
    assert found["ekfac"]["lds"] > 0.2 and found["ekfac"]["damping"] in (0.01, 0.1, 1.0)
    assert found["grad_dot"]["damping"] is None and "qld_3" in found["ekfac"]
    assert found["ekfac"]["lds"] > found["grad_dot"]["lds"]
    over = compare_rows(tmp_path, quick, "grad_dot")
    assert list(over) == ["ekfac"] and compare_rows(tmp_path, quick, "grad_dot", names=[]) == {}
    assert over["ekfac"].value == pytest.approx(found["ekfac"]["lds"] - found["grad_dot"]["lds"])
    with pytest.raises(ArtifactError, match="no finished row 'magic'"):
        compare_rows(tmp_path, quick, "magic")
    # A finished row is read, not made again.
    again = run_row(quick, "ekfac", lambda *_: 1 / 0, tmp_path / "ekfac", [0.01, 0.1, 1.0], qld_k=3)
    assert again["results"]["lds"]["value"] == pytest.approx(found["ekfac"]["lds"])
    with pytest.raises(ArtifactError, match="different run"):
        run_row(quick, "ekfac", lambda *_: 1 / 0, tmp_path / "ekfac", [0.1])
    # Its time is measured again without touching its scores; other scores are refused.
    timed = time_row(quick, scorer(model, "ekfac"), tmp_path / "ekfac")
    assert read_rows(tmp_path, quick)[0]["seconds"] == timed["seconds"] != found["ekfac"]["seconds"]
    with pytest.raises(ArtifactError, match="came out differently"):
        time_row(quick, scorer(model, "grad_dot"), tmp_path / "ekfac")
    with pytest.raises(ArtifactError, match="no finished row"):
        time_row(quick, scorer(model, "kfac"), tmp_path / "kfac")
    scores = np.load(tmp_path / "ekfac" / "scores.npy")
    direct = pyinf.attribute(
        model,
        rows(quick.protocol.train_tokens),
        rows(quick.protocol.query_tokens),
        damping=found["ekfac"]["damping"],
    )
    assert np.allclose(scores, direct.values.numpy(), rtol=1e-3, atol=1e-3 * np.abs(scores).max())
    assert evaluate_scores(quick, direct.values, "direct").results["lds"]["value"] == pytest.approx(
        found["ekfac"]["lds"], abs=0.02
    )


def test_tail_patch_finds_the_query_itself_best(quick):
    """Trained on the query itself, the query gains more than from a random example; by hand for one."""
    model, protocol = bank_model(quick), quick.protocol
    queries = rows(protocol.query_tokens[:3])
    train = rows(torch.cat([protocol.query_tokens[:3], protocol.train_tokens[:5]]))
    own = np.eye(3, 8)
    other = np.roll(own, 4, axis=1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = tail_patch(model, train, queries, own, k=1, rate=0.05)
    assert found["value"].value > tail_patch(model, train, queries, other, k=1, rate=0.05)["value"].value
    assert found["value"].value > 0 and found["per_query"].shape == (3,)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    step = bank_model(quick)
    loss = pyinf.CausalLM().train_loss(
        step, {"input_ids": protocol.query_tokens[:1], "labels": protocol.query_tokens[:1]}
    )
    (loss / 23).backward()
    with torch.no_grad():
        for p in step.parameters():
            p -= 0.05 * p.grad
    gain = sequence_losses(model, protocol.query_tokens[:1]) - sequence_losses(step, protocol.query_tokens[:1])
    assert found["per_query"][0] == pytest.approx(float(gain), rel=1e-3)
    with pytest.raises(ConfigError, match="k is 9"):
        tail_patch(model, train, queries, own, k=9)
    with pytest.raises(DataError, match=r"must be \(3, 8\)"):
        tail_patch(model, train, queries, own[:2])


def test_damaged_or_other_base_is_named(quick, tmp_path):
    import shutil

    shutil.copytree(quick.directory / "base", tmp_path / "base")
    config = tmp_path / "base" / "model" / "config.json"
    config.write_text(config.read_text().replace("24", "25"))
    with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
        ready_protocol("quick").prepare(tmp_path / "base")
    with pytest.raises(ArtifactError, match=r"made with other settings.*length"):
        ready_protocol("quick", length=25).prepare(tmp_path / "base")


def test_texts_of_your_own(tmp_path):
    file = tmp_path / "text.jsonl"
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    rng = np.random.default_rng(0)
    file.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 60))}) + "\n" for _ in range(120)))
    settings = {"text_file": str(file), "layout": "blocks", "length": 16, "vocabulary": 300, "base_sequences": 64}
    bank = Bank(tmp_path / "bank", ready_protocol("quick", **settings))
    (entry,) = bank.build(full(48))
    assert entry.measured["loss"].shape == (8,) and np.isfinite(entry.loss)
    with pytest.raises(DataError, match="lower the sizes"):
        Bank(tmp_path / "b", ready_protocol("quick", **settings, train_size=10**6))
    file.write_text("{}\n")
    with pytest.raises(DataError, match=r"text.jsonl, line 1: expected an object with 'text'"):
        Bank(tmp_path / "c", ready_protocol("quick", **settings))


def test_settings_are_checked():
    assert ready_protocol("small", epochs=2).epochs == 2 and ready_protocol("small").describe()["name"] == "small"
    assert set(ready_protocol("small").tuning).isdisjoint(ready_protocol("small").reported)
    with pytest.raises(ConfigError, match="unknown protocol 'big'; ready ones: quick, small, gpu"):
        ready_protocol("big")
    with pytest.raises(ConfigError, match="no setting 'epoch'"):
        ready_protocol("small", epoch=3)
    with pytest.raises(ConfigError, match="some must be left to report"):
        LanguageModelProtocol(query_size=4, tuning_queries=4)
    with pytest.raises(ConfigError, match="use 'all' or 'linear'"):
        LanguageModelProtocol(parameters="some")
    with pytest.raises(ConfigError, match="not prepared"):
        _ = ready_protocol("quick").train_tokens
