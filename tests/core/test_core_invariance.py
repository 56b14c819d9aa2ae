"""Scores do not depend on batch size, order, padding or on what is kept between passes: 1e-5 relative in fp32."""

from __future__ import annotations

import core_oracle as oracle
import pytest
import torch

import pyinf

TOLERANCE = 1e-5
TRAIN, QUERIES = oracle.data(8, 1), oracle.data(2, 2, low=6)


def scores(model, train=TRAIN, queries=QUERIES, batch_size=3, **options):
    options = {"method": "ekfac", "fisher": "empirical"} | options
    return pyinf.attribute(model, train, queries, batch_size=batch_size, **options)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    return oracle.make(request.param, torch.float32, scale=2.0)


@pytest.fixture(scope="module")
def base(model):
    return {fisher: scores(model, fisher=fisher).values for fisher in ("empirical", "sampled")}


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_batch_size_and_token_budget(model, base, fisher):
    for options in (
        {"batch_size": 1},
        {"batch_size": 8},
        {"batch_size": None, "token_budget": 20},
        {"batch_size": None},
    ):
        assert oracle.error(scores(model, fisher=fisher, **options).values, base[fisher]) < TOLERANCE


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_order(model, base, fisher):
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    found = scores(model, [TRAIN[i] for i in order], QUERIES[::-1], fisher=fisher).values
    assert oracle.error(found, base[fisher][:, order].flip(0)) < TOLERANCE


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_padding(model, base, fisher):
    for left, right in ((0, 4), (5, 0), (2, 3)):
        train = [oracle.padded(e, left if i % 2 else 0, right) for i, e in enumerate(TRAIN)]
        queries = [oracle.padded(e, left, right) for e in QUERIES]
        assert oracle.error(scores(model, train, queries, fisher=fisher).values, base[fisher]) < TOLERANCE


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_what_is_kept_between_passes(model, base, fisher, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    assert oracle.error(scores(model, fisher=fisher, cache=cache).values, base[fisher]) < TOLERANCE
    assert not list(tmp_path.iterdir())  # scratch files are gone


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_small_layers_added_together_at_the_end_of_a_batch(model, cache, monkeypatch):
    one_by_one = scores(model, cache=cache).values
    calls = []
    together = pyinf.ops.grouped.accumulate_squared_gradients_group
    monkeypatch.setattr(pyinf.ops.grouped, "is_small", lambda accumulator: True)
    monkeypatch.setattr(
        pyinf.ops.grouped,
        "accumulate_squared_gradients_group",
        lambda Lam, *rest: (calls.append(len(Lam)), together(Lam, *rest)),
    )
    assert torch.equal(scores(model, cache=cache).values, one_by_one)
    assert calls and min(calls) > 1


def test_a_cache_that_holds_only_some_batches(model, base, monkeypatch):
    from pyinf.methods import gradient

    real = gradient.CaptureCache
    kept = []

    class Small(real):
        def __init__(self, memory, disk=0, directory=None):
            super().__init__(30_000, 40_000, directory)

        def store(self, key, captured):
            kept.append(super().store(key, captured))
            return kept[-1]

    monkeypatch.setattr(gradient, "CaptureCache", Small)
    assert oracle.error(scores(model, batch_size=1).values, base["empirical"]) < TOLERANCE
    assert any(kept) and not all(kept)


def test_label_masks(model):
    """Unlabelled positions still count in A and S, and a response's loss equals the full loss less the prompt's."""
    train = [{**e, "labels": [-100, -100, *e["input_ids"][2:]]} for e in TRAIN]
    attributor = pyinf.Attributor(model, fisher="empirical").fit(train)
    wide = model.__class__(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    names = attributor.selection.names
    G, V = oracle.gradients(wide, train, names), oracle.gradients(wide, QUERIES, names)
    found = pyinf.attribute(model, train, QUERIES, "grad_dot").values
    assert oracle.error(found, oracle.dot(V, G)) < TOLERANCE
    assert attributor.factors.tokens == sum(len(e["input_ids"]) for e in train)
    moved = [oracle.padded(e, i % 3, i % 2) for i, e in enumerate(train)]
    assert oracle.error(scores(model, moved).values, attributor.score(QUERIES, train).values) < TOLERANCE


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "grad_dot", "grad_cos"])
def test_sequences_without_a_counted_label_score_zero_and_are_counted(method):
    model = oracle.make("llama", torch.float32)
    empty = [
        {"input_ids": [3, 4, 5], "labels": [-100] * 3},
        {"input_ids": [3, 4, 5], "labels": [7, -100, -100]},  # nothing stands before the first position to predict it
        {"input_ids": [6]},
        {"input_ids": [3, 4], "attention_mask": [0, 0]},
    ]
    train = [TRAIN[0], empty[0], TRAIN[1], empty[1], empty[2], TRAIN[2], empty[3]]
    queries = [QUERIES[0], empty[0], QUERIES[1]]
    attributor = pyinf.Attributor(model, method, fisher="empirical").fit(train)
    result = attributor.score(queries, train, batch_size=2)
    assert not result.values[1].any() and not result.values[:, [1, 3, 4, 6]].any()
    assert bool((result.values[[0, 2]][:, [0, 2, 5]] != 0).all())
    assert result.meta["train_without_labels"] == 4 and result.meta["queries_without_labels"] == 1
    top = attributor.score(queries, train, topk=7)
    assert bool((top.kept[0][1] == 0).all()) and torch.equal(top.kept[1].sort(1).values, torch.arange(7).expand(3, 7))
    assert oracle.error(top.kept[0], result.values.sort(1, descending=True).values) < TOLERANCE
    own = attributor.self_score(train)
    assert not own[[1, 3, 4, 6]].any() and bool((own[[0, 2, 5]] > 0).all())
    only = attributor.score([empty[0]], train)
    assert only.values.shape == (1, 7) and not only.values.any()
    assert not attributor.score([empty[0]], train, topk=2).kept[0].any()
    if method == "ekfac":  # a mean over all sequences, also those whose gradient is zero
        fewer = pyinf.Attributor(model, fisher="empirical").fit(train[:6])
        name = fewer.selection.names[0]
        assert attributor.factors.sequences == 7 and fewer.factors.sequences == 6
        a, b = attributor.factors.layers[name].corrected.mean(), fewer.factors.layers[name].corrected.mean()
        assert float(a) * 7 == pytest.approx(float(b) * 6, rel=1e-4)


def test_holes_in_the_mask(model):
    """A masked position inside is neither read nor predicted from, whatever stands there and whatever is beside it."""
    holed = [
        {"input_ids": [4, 5, 9, 6, 7, 8], "attention_mask": [1, 1, 0, 1, 1, 1]},
        {"input_ids": [4, 5, 6, 9, 9, 8, 11], "attention_mask": [1, 1, 1, 0, 0, 1, 1]},
        *TRAIN[:3],
    ]
    other = [
        {**e, "input_ids": [i if m else 30 for i, m in zip(e["input_ids"], e["attention_mask"], strict=True)]}
        for e in holed[:2]
    ] + holed[2:]
    found = scores(model, holed, batch_size=5).values
    assert oracle.error(scores(model, other, batch_size=1).values, found) < TOLERANCE

    def loss(model, example):
        ids, mask = (
            torch.tensor([example["input_ids"]]),
            torch.tensor([example.get("attention_mask", [1] * len(example["input_ids"]))]),
        )
        labels = ids.masked_fill(mask == 0, -100)[0, 1:].masked_fill(mask[0, :-1] == 0, -100)
        return torch.nn.functional.cross_entropy(
            model(input_ids=ids, attention_mask=mask).logits[0, :-1], labels, ignore_index=-100, reduction="sum"
        )

    wide = model.__class__(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    names = pyinf.Attributor(model).selection.names
    G, V = oracle.gradients(wide, holed, names, loss), oracle.gradients(wide, QUERIES, names)
    assert oracle.error(scores(model, holed, method="grad_dot").values, oracle.dot(V, G)) < TOLERANCE
    token = pyinf.Attributor(model, "grad_dot").score(QUERIES, holed, granularity="token").values
    assert not token[:, 0, 2].any() and not token[:, 1, 3:5].any() and bool(token[:, 0, 3].all())


def test_query_blocks_when_memory_is_small(model, base):
    def attributor(**options):
        return pyinf.Attributor(model, fisher="empirical", **options)

    queries = [*QUERIES, *oracle.data(3, 5, low=6)]
    whole = attributor().run(TRAIN, queries, 4)
    plan = attributor().plan(TRAIN, queries, 4)
    assert plan.query_block == 5 and plan.score_passes == 1
    per_query = plan.memory["queries"] // 5
    need = sum(v for k, v in plan.memory.items() if k not in ("queries", "captured")) + (64 << 20)
    small = attributor(memory_budget=need + 2 * per_query)
    blocks = small.run(TRAIN, queries, 4)
    assert small._plan.query_block == 2 and small._plan.score_passes == 3
    assert any("2 at a time, 3 passes" in note for note in small._plan.notes)
    assert oracle.error(blocks.values, whole.values) < TOLERANCE
    top = small.score(queries, TRAIN, 4, topk=3)
    assert torch.equal(top.kept[1], whole.topk(3)[1])
    assert oracle.error(small.score(queries, TRAIN, 4, granularity="token").total(), whole.values) < TOLERANCE
    grid = small.score(queries, TRAIN, 4, dampings=[1.0, 0.1])
    assert small._plan.query_block == 1 and oracle.error(grid[0.1].values, whole.values) < TOLERANCE
    with pytest.raises(pyinf.errors.ResourceError, match="for one query at a time, the budget is"):
        attributor(memory_budget=need + per_query - 1).plan(TRAIN, queries, 4)
    with pytest.raises(pyinf.errors.ResourceError, match="lower the batch size or trace fewer layers"):
        attributor(memory_budget="1MiB").fit(TRAIN, 4)


def test_the_plan_says_what_is_kept_and_why(model):
    def notes(run=False, **options):
        attributor = pyinf.Attributor(model, **options)
        attributor._keep_captured = run
        plan = attributor.plan(TRAIN, QUERIES, 4)
        assert all(isinstance(label, str) and isinstance(value, str) for label, value in plan.rows())
        assert plan.to_dict()["notes"] == plan.notes
        return " ".join(plan.notes)

    assert "stays in memory: one model pass serves covariances and Λ" in notes()
    assert "one model pass serves covariances, Λ and scores" in notes(run=True, fisher="empirical")
    assert "stays in scratch files" in notes(cache="disk")
    assert "the model runs again for every stage (cache='none')" in notes(cache="none")
    assert notes(method="grad_dot") == ""
    passes = {
        m: pyinf.Attributor(model, m).plan(TRAIN, QUERIES, 4).fit_passes
        for m in ("ekfac", "kfac", "diagonal", "grad_dot")
    }
    assert passes == {"ekfac": 2, "kfac": 1, "diagonal": 1, "grad_dot": 0}


def test_one_model_pass_serves_all_stages(model, monkeypatch):
    from pyinf.capture.session import TracingSession

    calls = []
    real = TracingSession.run
    monkeypatch.setattr(
        TracingSession,
        "run",
        lambda self, batch, consumer, loss="train": calls.append(loss) or real(self, batch, consumer, loss),
    )
    scores(model, batch_size=4)
    assert calls == ["train"] * 2 + ["measurement"]
    calls.clear()
    scores(model, batch_size=4, fisher="sampled")
    assert calls == ["sampled"] * 2 + ["measurement"] + ["train"] * 2
    calls.clear()
    scores(model, batch_size=4, cache="none")
    assert calls == ["train"] * 4 + ["measurement"] + ["train"] * 2


# -- sampled labels ----------------------------------------------------------------------------------------------------


class _TinyLM(torch.nn.Module):
    """Embedding → linear → head over a vocabulary of five, so that every label can be enumerated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.layer, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 5)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.layer(2 * self.embed(input_ids))))


def test_sampled_labels_average_to_the_true_fisher():
    model = _TinyLM().double()
    train = [{"input_ids": [i % 5, (2 * i + 1) % 5, (3 * i) % 5]} for i in range(4)]
    weight = model.layer.weight
    exact, ggn = torch.zeros_like(weight), torch.zeros_like(weight)
    for example in train:
        ids = torch.tensor([example["input_ids"]])
        log_p = model(ids).log_softmax(-1)[0]
        for t in range(2):
            H = torch.diag(log_p[t].exp()) - torch.outer(log_p[t].exp(), log_p[t].exp())
            J = torch.stack([torch.autograd.grad(model(ids)[0, t, c], weight)[0] for c in range(5)])
            ggn += torch.einsum("cij,cd,dij->ij", J, H.detach(), J) / len(train)
            for y in range(5):
                (g,) = torch.autograd.grad(log_p[t, y], weight, retain_graph=True)
                exact += log_p[t, y].detach().exp() * g.square() / len(train)
    assert oracle.error(exact, ggn) < 1e-10  # Fisher = Gauss–Newton for a softmax
    draws = torch.stack(
        [
            pyinf.Attributor(model, "diagonal", seed=s, modules="layer")
            .fit(train)
            .factors.layers["layer"]
            .corrected[:, :-1]
            for s in range(160)
        ]
    )
    z = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert float(z.abs().max()) < 4.5 and float(z.square().mean()) < 3
    assert oracle.error(draws.mean(0), exact) < 0.1
    empirical = (
        pyinf.Attributor(model, "diagonal", fisher="empirical", modules="layer").fit(train).factors.layers["layer"]
    )
    assert oracle.error(empirical.corrected[:, :-1], exact) > 0.2  # the test can tell the two apart


def test_draws_depend_on_seed_and_content_only():
    model = oracle.make("llama", torch.float32)
    fits = {}
    for name, train, batch_size, seed in (
        ("base", TRAIN, 3, 0),
        ("again", TRAIN, 1, 0),
        ("seed", TRAIN, 3, 1),
        ("reversed", TRAIN[::-1], 3, 0),
        ("padded", [oracle.padded(e, 2, i) for i, e in enumerate(TRAIN)], 8, 0),
    ):
        fits[name] = pyinf.Attributor(model, "diagonal", seed=seed).fit(train, batch_size).factors.layers
    name = next(iter(fits["base"]))
    for other in ("again", "reversed", "padded"):
        assert oracle.error(fits[other][name].corrected, fits["base"][name].corrected) < TOLERANCE
    assert oracle.error(fits["seed"][name].corrected, fits["base"][name].corrected) > 0.05
    twins = pyinf.data.batching.prepare([TRAIN[0], TRAIN[0]], "train", model)
    assert twins.draw_keys[0] != twins.draw_keys[1]  # repeats draw labels of their own
