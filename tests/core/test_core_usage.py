"""How users call it: collections, compiled models, data that change, scores on disk, and tasks of their own."""

from __future__ import annotations

import core_oracle as oracle
import pytest
import torch

import pyinf
from pyinf.errors import ModelError

TRAIN, QUERIES = oracle.data(5, 1), oracle.data(2, 2, low=6)


# -- how users call it -------------------------------------------------------------------------------------------------


def test_dropout_train_mode_and_cache_do_not_matter():
    import transformers as tf

    config = tf.GPT2Config(
        vocab_size=oracle.VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.5,
        attn_pdrop=0.5,
        embd_pdrop=0.5,
        use_cache=True,
    )
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(config)
    assert model.training
    one, two = (pyinf.attribute(model, TRAIN, QUERIES).values for _ in range(2))
    assert torch.equal(one, two) and model.training
    model.eval()
    assert torch.equal(pyinf.attribute(model, TRAIN, QUERIES).values, one)


def test_kinds_of_collections_give_the_same_scores():
    import datasets
    from transformers import BatchEncoding

    model = oracle.make("llama", torch.float32)
    plain = pyinf.attribute(model, TRAIN, QUERIES, "grad_dot").values

    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return len(TRAIN)

        def __getitem__(self, index):
            if not 0 <= index < len(TRAIN):
                raise IndexError(index)
            return {
                "input_ids": torch.tensor(TRAIN[index]["input_ids"], dtype=torch.int32),
                "text": "other fields stay",
            }

    table = datasets.Dataset.from_list([{**e, "label": i} for i, e in enumerate(TRAIN)])
    encodings = [BatchEncoding({**e, "attention_mask": [1] * len(e["input_ids"])}) for e in TRAIN]
    kinds = [tuple(TRAIN), Own(), table, table.with_format("torch"), table.with_format("numpy"), encodings]
    kinds.append([{"input_ids": torch.tensor([e["input_ids"]])} for e in TRAIN])  # [1, T], as tokenizers return them
    assert all(torch.equal(pyinf.attribute(model, k, QUERIES, "grad_dot").values, plain) for k in kinds)


def test_data_changed_between_calls_is_read_again():
    model = oracle.make("llama", torch.float32)
    train = [dict(e) for e in TRAIN]
    attributor = pyinf.Attributor(model, "grad_dot")
    before = attributor.score(QUERIES, train).values
    train[0] = TRAIN[1]
    train[2]["input_ids"] = TRAIN[1]["input_ids"]
    after = attributor.score(QUERIES, train).values
    assert torch.equal(after[:, 0], before[:, 1]) or oracle.error(after[:, 0], before[:, 1]) < 1e-5
    assert oracle.error(after[:, 2], before[:, 1]) < 1e-5


def test_queries_that_are_the_training_set():
    model = oracle.make("llama", torch.float64)
    attributor = pyinf.Attributor(model, fisher="empirical").fit(TRAIN)
    scores = attributor.score(TRAIN, TRAIN).values
    assert oracle.error(scores, scores.T) < 1e-8
    assert oracle.error(scores.diagonal(), attributor.self_score(TRAIN)) < 1e-8


def test_one_fit_serves_other_training_sets():
    model = oracle.make("llama", torch.float64)
    attributor = pyinf.Attributor(model, fisher="empirical", eigensolver="fp64").fit(TRAIN)
    other = oracle.data(4, 9)
    joint = attributor.score(QUERIES, [*TRAIN, *other]).values
    assert oracle.error(attributor.score(QUERIES, other).values, joint[:, 5:]) < 1e-8


@pytest.mark.parametrize("way", ["function", "method"])
def test_a_compiled_model(way):
    plain = pyinf.attribute(oracle.make("llama", torch.float32), TRAIN, QUERIES).values
    model = oracle.make("llama", torch.float32)
    if way == "function":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    attributor = pyinf.Attributor(model)
    assert attributor.selection.names[0] == "model.layers.0.self_attn.q_proj"
    assert oracle.error(attributor.fit(TRAIN).score(QUERIES, TRAIN).values, plain) < 1e-6


def test_scores_save_load_and_table(tmp_path):
    model = oracle.make("llama", torch.float32)
    attributor = pyinf.Attributor(model).fit(TRAIN)
    for number, options in enumerate(({}, {"granularity": "token"}, {"per_module": True}, {"topk": 2})):
        scores = attributor.score(QUERIES, TRAIN, **options)
        scores.save(tmp_path / str(number))
        again = pyinf.Scores.load(tmp_path / str(number))
        assert again.meta["modules"] == attributor.selection.names and again.shape[:2] == (2, 5)
        if "topk" in options:
            assert torch.equal(again.topk(2)[1], scores.topk(2)[1])
            with pytest.raises(pyinf.errors.ConfigError, match="only the top scores were kept"):
                again.bottomk(1)
        else:
            assert torch.equal(again.total(), scores.total()) and torch.equal(again.bottomk(2)[0], scores.bottomk(2)[0])
        frame = scores.to_pandas()
        assert {"query", "train", "score"} <= set(frame.columns)
        if "topk" not in options:
            summed = frame.groupby(["query", "train"])["score"].sum().to_numpy().reshape(2, 5)
            assert oracle.error(torch.tensor(summed), scores.total()) < 1e-5
    file = tmp_path / "0" / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(pyinf.errors.ArtifactError, match="scores.safetensors"):  # noqa: RUF043
        pyinf.Scores.load(tmp_path / "0")


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_log_odds_of_two_continuations():
    """Continuations of other lengths than each other and than their neighbours in the batch."""
    model = oracle.make("llama", torch.float64)
    queries = []
    for mine, other in (([5, 6], [7, 8, 9, 10, 11]), ([5, 6, 7, 8, 9], [4, 3]), ([2, 9, 4], [9, 2, 4])):
        prompt = [3, 1, 4, 1]
        queries.append(
            {
                "input_ids": prompt + mine,
                "labels": [-100] * 4 + mine,
                "other_input_ids": prompt + other,
                "other_labels": [-100] * 4 + other,
                "other_attention_mask": [1] * (4 + len(other)),
            }
        )

    def measured(model, query):
        mine = oracle.causal_loss(model, query)
        return mine - oracle.causal_loss(
            model, {"input_ids": query["other_input_ids"], "labels": query["other_labels"]}
        )

    names = pyinf.Attributor(model).selection.names
    G, V = oracle.gradients(model, TRAIN, names), oracle.gradients(model, queries, names, measured)
    for batch_size in (1, 3):
        attributor = pyinf.Attributor(model, "grad_dot", pyinf.LogOdds())
        assert oracle.error(attributor.score(queries, TRAIN, batch_size=batch_size).values, oracle.dot(V, G)) < 1e-6
    fitted = pyinf.Attributor(model, task=pyinf.LogOdds(), fisher="empirical").fit(TRAIN)
    assert bool(torch.isfinite(fitted.score(queries, TRAIN).values).all())
    with pytest.raises(pyinf.errors.ConfigError, match="LogOdds needs other_input_ids and other_labels in every query"):
        fitted.score(QUERIES, TRAIN)
    with pytest.raises(pyinf.errors.DataError, match=r"queries\[1\] has the fields \[\]"):
        fitted.score([queries[0], QUERIES[0]], TRAIN)
    with pytest.raises(pyinf.errors.DataError, match=r"queries\[0\]\['other_input_ids'\] holds ids outside"):
        fitted.score([{**queries[0], "other_input_ids": [1, 99, 2]}], TRAIN)


class _Margin(pyinf.CausalLM):
    """A measurement of its own, with a field of its own: the logit of one answer less the mean logit, at the end."""

    fields = {"answer": 0}  # noqa: RUF012

    def measurement(self, model, batch):
        mask = batch.get("attention_mask")
        last = (
            torch.full((len(batch["input_ids"]),), batch["input_ids"].shape[1] - 1) if mask is None else mask.sum(1) - 1
        )
        logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
        final = logits[torch.arange(len(last)), last]
        return (final.gather(1, batch["answer"].unsqueeze(1)).squeeze(1) - final.mean(1)).sum()


def test_a_task_of_ones_own():
    model = oracle.make("llama", torch.float64)
    queries = [{"input_ids": [9], "answer": 3}, {"input_ids": [4, 5, 6], "answer": 7, "labels": [-100] * 3}]

    def measured(model, query):
        final = model(input_ids=torch.tensor([query["input_ids"]])).logits[0, -1]
        return final[query["answer"]] - final.mean()

    attributor = pyinf.Attributor(model, "grad_dot", _Margin())
    names = attributor.selection.names
    G, V = oracle.gradients(model, TRAIN, names), oracle.gradients(model, queries, names, measured)
    scores = attributor.score(queries, TRAIN)
    assert oracle.error(scores.values, oracle.dot(V, G)) < 1e-6 and bool((scores.values != 0).any(1).all())
    assert scores.meta["queries_without_labels"] == 0


def test_logits_may_be_used_twice():
    class Contrast(pyinf.CausalLM):
        def measurement(self, model, batch):
            logits = model(input_ids=batch["input_ids"]).logits
            labels = batch["labels"].roll(-1, 1)
            from pyinf.tasks import summed_cross_entropy as loss

            return loss(logits, labels) - 0.5 * loss(logits, (labels + 1) % oracle.VOCAB)

    def measured(model, query):
        ids = torch.tensor([query["input_ids"]])
        logits, labels = model(input_ids=ids).logits[0], ids[0].roll(-1)
        loss = torch.nn.functional.cross_entropy
        return loss(logits, labels, reduction="sum") - 0.5 * loss(logits, (labels + 1) % oracle.VOCAB, reduction="sum")

    model = oracle.make("gpt2")
    attributor = pyinf.Attributor(model, "grad_dot", Contrast())
    names = attributor.selection.names
    G, V = oracle.gradients(model, TRAIN, names), oracle.gradients(model, QUERIES, names, measured)
    assert oracle.error(attributor.score(QUERIES, TRAIN, batch_size=1).values, oracle.dot(V, G)) < 1e-8


def test_two_attributors_may_share_a_task():
    model, task = oracle.make("llama", torch.float32), pyinf.CausalLM()
    alone = pyinf.Attributor(model, task=task, seed=3).run(TRAIN, QUERIES).values
    one = pyinf.Attributor(model, task=task, seed=3)
    pyinf.Attributor(model, task=task, seed=4)
    assert torch.equal(one.run(TRAIN, QUERIES).values, alone)


class _NoLoss(pyinf.Task):
    pass


class _PerToken(pyinf.CausalLM):
    def train_loss(self, model, batch, sample=False):
        return model(input_ids=batch["input_ids"]).logits.sum(-1)


class _Constant(pyinf.CausalLM):
    def train_loss(self, model, batch, sample=False):
        return torch.zeros(())


@pytest.mark.parametrize(
    "task, error, message",
    [
        (_NoLoss(), pyinf.errors.ConfigError, "_NoLoss defines no train_loss"),
        (_PerToken(), ModelError, r"the task returned a loss of shape \(\d+, \d+\)"),
        (_Constant(), ModelError, "the loss does not depend on any traced layer"),
    ],
)
def test_tasks_that_cannot_work(task, error, message):
    with pytest.raises(error, match=message):
        pyinf.attribute(oracle.make("llama", torch.float32), TRAIN, QUERIES, task=task)


def test_models_and_tasks_that_do_not_match():
    bert, llama = oracle.make("bert", torch.float32), oracle.make("llama", torch.float32)
    with pytest.raises(ModelError, match=r"next-token prediction needs .* logits"):
        pyinf.attribute(bert, TRAIN, QUERIES)
    with pytest.raises(pyinf.errors.DataError, match="one label a token; use task=SequenceClassification"):
        pyinf.attribute(llama, oracle.classified(3), QUERIES)
    with pytest.raises(
        pyinf.errors.DataError, match="one integer label an example; give every example a 'labels' field"
    ):
        pyinf.attribute(bert, TRAIN, QUERIES, task=pyinf.SequenceClassification())
    bad = oracle.classified(3)
    bad[1]["labels"] = 3
    with pytest.raises(pyinf.errors.DataError, match="example 1 has label 3, the model has 3 classes"):
        pyinf.attribute(bert, bad, oracle.classified(2), task=pyinf.SequenceClassification())
    with pytest.raises(ModelError, match="returned .* instead of logits"):  # noqa: RUF043
        pyinf.attribute(llama.model, TRAIN, QUERIES)
