"""Everything wrong with the data or the options is said in one or two lines, naming the thing, before any long work."""

from __future__ import annotations

import core_oracle as oracle
import pytest
import torch

import pyinf
from pyinf.data.batching import make_batches, prepare
from pyinf.errors import BackendUnavailableError, ConfigError, DataError, PyinfError

GOOD = {"input_ids": [1, 2, 3]}


@pytest.fixture(scope="module")
def model():
    return oracle.make("llama", torch.float32)


DATA = [
    ([], "train is empty; give at least one sequence"),
    (iter([GOOD]), "train is a list_iterator; give a sized, indexable collection (a list of dicts, a Dataset)"),
    (7, "train is a int; give a sized, indexable collection (a list of dicts, a Dataset)"),
    ({"input_ids": [[1, 2]]}, "train is a dict of columns; give one mapping a sequence, for instance Dataset.from_dict(...)"),  # noqa: E501
    ([GOOD, "text"], "train[1] is a str; every example must be a mapping with 'input_ids'"),
    ([GOOD, {"text": "x", "id": 3}], "train[1] has no field 'input_ids' (found: id, text); tokenise the data first"),
    ([GOOD, {}], "train[1] has no field 'input_ids' (found: nothing); tokenise the data first"),
    ([GOOD, {"input_ids": []}], "train[1]['input_ids'] has shape (0,); it must be a non-empty list of token ids"),
    ([GOOD, {"input_ids": [[1, 2], [3, 4]]}], "train[1]['input_ids'] has shape (2, 2); it must be a non-empty list of token ids"),  # noqa: E501
    ([GOOD, {"input_ids": 5}], "train[1]['input_ids'] has shape (); it must be a non-empty list of token ids"),
    ([GOOD, {"input_ids": None}], "train[1]['input_ids'] is not a sequence of integers"),
    ([GOOD, {"input_ids": ["a", "b"]}], "train[1]['input_ids'] is not a sequence of integers"),
    ([GOOD, {"input_ids": [[1, 2], [3]]}], "train[1]['input_ids'] is not a sequence of integers"),
    ([GOOD, {"input_ids": [1.0, 2.5]}], "train[1]['input_ids'] holds torch.float32; token ids and labels must be integers"),  # noqa: E501
    ([GOOD, {"input_ids": [1, oracle.VOCAB]}],
     "train[1] holds token id 41, outside the model's vocabulary of 41; tokenise with the model's own tokenizer"),
    ([GOOD, {"input_ids": [1, -2]}],
     "train[1] holds token id -2, outside the model's vocabulary of 41; tokenise with the model's own tokenizer"),
    ([GOOD, {"input_ids": [1] * 33}],
     "train[1] has 33 tokens, the model takes at most 32; truncate it (max_length) or split it"),
    ([GOOD, {"input_ids": [1, 2], "attention_mask": [1]}], "train[1]: attention_mask has 1 entries, input_ids 2; they must match"),  # noqa: E501
    ([GOOD, {"input_ids": [1, 2, 3], "labels": [1, 2]}], "train[1]: labels has 2 entries, input_ids 3; they must match"),  # noqa: E501
    ([GOOD, {"input_ids": [1, 2], "labels": [1, 99]}],
     "train[1]['labels'] holds ids outside the vocabulary of 41; use −100 to ignore a position"),
    ([GOOD, {"input_ids": [1, 2], "labels": [1, -1]}],
     "train[1]['labels'] holds ids outside the vocabulary of 41; use −100 to ignore a position"),
    ([GOOD, {"input_ids": [1, 2], "labels": 1}], "train[1] has one label a sequence, train[0] has one label a token; all must agree"),  # noqa: E501
    ([GOOD, {"input_ids": [1, 2], "token_type_ids": [0, 1]}],
     "train[1] has the fields ['token_type_ids'], train[0] has []; all must agree"),
    ([{"input_ids": [1, 2], "token_type_ids": [0]}], "train[0]: token_type_ids has 1 entries, input_ids 2; they must match"),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize("data, message", DATA, ids=[m[:40] for _, m in DATA])
def test_data(model, data, message):
    with pytest.raises(DataError) as caught:
        pyinf.attribute(model, data, [GOOD])
    assert str(caught.value).startswith(message) and str(caught.value).count("\n") < 2
    if isinstance(data, list) and data:
        with pytest.raises(DataError, match=r"^queries"):
            pyinf.attribute(model, [GOOD], data, "grad_dot")


def test_padding_does_not_count_towards_the_models_positions(model):
    long = {"input_ids": [0] * 30 + [1] * 30, "attention_mask": [0] * 30 + [1] * 30}
    assert prepare([long], "train", model).lengths == [30]


OPTIONS = [
    ({"damping": 0}, "damping is 0; it must be a finite number > 0"),
    ({"damping": -0.1}, "damping is -0.1; it must be a finite number > 0"),
    ({"damping": float("nan")}, "damping is nan; it must be a finite number > 0"),
    ({"damping": float("inf")}, "damping is inf; it must be a finite number > 0"),
    ({"damping": "0.1"}, "damping is 0.1; it must be a finite number > 0"),
    ({"damping_mode": "percent"}, "unknown damping_mode 'percent'; use 'relative'"),
    ({"method": "efkac"}, "unknown method 'efkac'; did you mean ekfac or kfac?"),
    ({"method": "xyz"}, "unknown method 'xyz'; available: ekfac, kfac"),
    ({"fisher": "true"}, "unknown fisher 'true'; use 'sampled'"),
    ({"rank": 3}, "unknown option 'rank' for method 'ekfac'; available: approximation, query_rank, "),
    ({"eigensolver": "qr"}, "unknown eigensolver 'qr'; choose one of auto, fp32, fp64"),
    ({"query_rank": 0}, "query_rank is 0; give a rank ≥ 1, or a captured energy between 0 and 1"),
    ({"query_rank": 1.5}, "query_rank is 1.5; give a rank ≥ 1, or a captured energy between 0 and 1"),
    ({"query_rank": True}, "query_rank is True; give a rank"),
    ({"query_rank": "most"}, "query_rank is 'most'; give a rank such as 64, or a captured energy such as 0.99"),
    ({"cache": "tape"}, "unknown cache 'tape'; choose auto, memory, disk or none"),
    ({"memory_budget": "lots"}, "'lots' is not a size; write it as 2GiB, 500MB or a number of bytes"),
    ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ({"batch_size": 2.0}, "batch_size is 2.0; it must be at least 1"),
    ({"token_budget": 0}, "token_budget is 0; it must be at least 1"),
]


@pytest.mark.parametrize("options, message", OPTIONS, ids=[f"{k}={v}" for o, _ in OPTIONS for k, v in o.items()])
def test_options(model, options, message, monkeypatch):
    from pyinf.capture.session import TracingSession

    monkeypatch.setattr(TracingSession, "run", lambda *a, **k: pytest.fail("the model was run first"))
    with pytest.raises(ConfigError) as caught:
        pyinf.attribute(model, [GOOD], [GOOD], **options)
    assert str(caught.value).startswith(message) and str(caught.value).count("\n") < 2


def test_backends(model):
    with pytest.raises(PyinfError, match="nope"):
        pyinf.Attributor(model, backend="nope")
    if not torch.cuda.is_available():
        with pytest.raises((BackendUnavailableError, ConfigError), match="cuda"):
            pyinf.Attributor(model, backend="cuda").run([GOOD], [GOOD])
    base = pyinf.attribute(model, oracle.data(4), [GOOD]).values
    for backend in ("reference", "torch"):
        found = pyinf.Attributor(model, backend=backend).run(oracle.data(4), [GOOD]).values
        assert oracle.error(found, base) < 1e-4


def test_calls_out_of_order(model):
    attributor = pyinf.Attributor(model)
    for call in (lambda: attributor.score([GOOD], [GOOD]), lambda: attributor.self_score([GOOD])):
        with pytest.raises(ConfigError, match=r"method 'ekfac' needs factors; call fit\(train\) first"):
            call()
    attributor.fit(oracle.data(4))
    for options, message in (
        ({"granularity": "word"}, "unknown granularity 'word'"),
        ({"granularity": "token", "topk": 2}, "token scores are kept whole"),
        ({"topk": 0}, "topk is 0"),
        ({"topk": 2, "per_module": True}, "give topk ≥ 1 and no per_module"),
        ({"dampings": []}, "dampings is empty"),
        ({"dampings": [0.1, -1]}, "damping is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            attributor.score([GOOD], [GOOD], **options)
    with pytest.raises(ConfigError, match="a cosine does not split into modules"):
        pyinf.Attributor(model, "grad_cos").score([GOOD], [GOOD], per_module=True)
    with pytest.raises(ConfigError, match="no factors for layer 'x'"):
        attributor.factors.ihvp({"x": torch.zeros(1, 2, 2)})
    name = attributor.selection.names[0]
    with pytest.raises(ConfigError, match=r"takes \[Q, 16, 16\], got \(1, 2, 2\)"):
        attributor.factors.ihvp({name: torch.zeros(1, 2, 2)})
    with pytest.raises(ConfigError, match="damping is 0"):
        attributor.factors.ihvp({name: torch.zeros(1, 16, 16)}, damping=0)
    with pytest.raises(ConfigError, match="'bm25' runs no model"):
        pyinf.Attributor(model, "bm25").plan([GOOD], [GOOD])
    with pytest.raises(ConfigError, match="'bm25' has no self-influence"):
        pyinf.Attributor(model, "bm25").self_score([GOOD])
    with pytest.raises(pyinf.errors.ModelError, match="the model has no parameters"):
        pyinf.Attributor(torch.nn.ReLU())
    with pytest.raises(pyinf.errors.ModelError, match="a str is no model"):
        pyinf.Attributor("gpt2")


def test_the_listing_of_methods():
    listing = pyinf.methods()
    assert {"ekfac", "kfac", "diagonal", "grad_dot", "grad_cos", "bm25"} <= set(listing)
    assert all("needs" in line for line in listing.values())


def test_batches():
    lengths = [5, 1, 9, 9, 3, 2, 30]
    for batch_size in (None, 1, 2, 100):
        for budget in (None, 10, 18, 1000):
            batches = make_batches(lengths, None, batch_size, budget)
            assert sorted(i for b in batches for i in b) == list(range(7))
            for batch in batches:
                assert batch_size is None or len(batch) <= batch_size
                padded = max(lengths[i] for i in batch) * len(batch)
                assert budget is None or padded <= budget or len(batch) == 1
    assert make_batches(lengths, [], 2) == []
    assert make_batches(lengths, [1, 5], None, None) == [[5, 1]]
