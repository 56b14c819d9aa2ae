"""Gauss–Newton products against dense matrices from explicit Jacobians, float64, to 1e-10."""

from __future__ import annotations

import pytest
import solve_oracle as oracle
import torch
import transformers as tf
from torch import nn

import pyinf
from pyinf.capture import select_layers
from pyinf.data.batching import make_batches, prepare
from pyinf.errors import ConfigError, ModelError
from pyinf.solve import GGNOperator

TOLERANCE = 1e-10


def product(model, examples, X, task=None, modules=None, batch_size=3, chunk=None):
    task = task or pyinf.CausalLM()
    selection = select_layers(model, modules)
    found = prepare(examples, "train", model, shifted=task.shifted)
    batches = make_batches(found.lengths, None, batch_size)
    with GGNOperator(model, selection, task, found, batches, chunk=chunk) as C:
        return C(X), C


def right_sides(model, count=3, modules=None, dtype=torch.float64):
    selection = select_layers(model, modules)
    size = sum(layer.numel for layer in selection.layers)
    return selection.names, torch.randn(count, size, dtype=dtype, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("chunk", [None, 2])
def test_products_equal_the_dense_matrix(chunk):
    model, examples = oracle.gpt2(), oracle.data(7, 1)
    examples[2]["labels"] = [-100, -100, *examples[2]["input_ids"][2:]]
    names, X = right_sides(model)
    assert X.shape[1] < 20_000
    found, C = product(model, examples, X, chunk=chunk)
    assert C.products == 3
    assert oracle.error(found, X @ oracle.ggn(model, names, examples)) < TOLERANCE


def test_float32_is_close():
    model, examples = oracle.gpt2(dtype=torch.float32), oracle.data(5, 1)
    names, X = right_sides(model, dtype=torch.float32)
    wanted = X.double() @ oracle.ggn(oracle.gpt2(), names, examples)
    assert oracle.error(product(model, examples, X)[0], wanted) < 1e-5


def test_padding_batches_and_labels_do_not_matter():
    model, examples = oracle.gpt2(), oracle.data(6, 2)
    padded = [
        {"input_ids": [5, 5, *e["input_ids"]], "attention_mask": [0, 0] + [1] * len(e["input_ids"])} for e in examples
    ]
    _, X = right_sides(model)
    wanted, _ = product(model, examples, X, batch_size=1)
    for other, size in ((examples, 6), (padded, 4)):
        assert oracle.error(product(model, other, X, batch_size=size)[0], wanted) < TOLERANCE


def test_sequences_without_labels_count_in_the_mean():
    model, examples = oracle.gpt2(), oracle.data(4, 2)
    silent = [*examples, {"input_ids": [3, 4, 5], "labels": [-100] * 3}]
    _, X = right_sides(model)
    assert oracle.error(product(model, silent, X)[0] * 5, product(model, examples, X)[0] * 4) < TOLERANCE


class _Shared(nn.Module):
    """An embedding, one linear layer applied twice, a second layer that shares its weight, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(oracle.VOCAB, 6), nn.Linear(6, oracle.VOCAB)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.blocks[1].weight, self.blocks[1].bias = self.blocks[0].weight, self.blocks[0].bias

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in (*self.blocks, self.blocks[0]):
            x = x + torch.tanh(block(x))
        return type("Output", (), {"logits": self.head(x)})()


def test_shared_weights_and_repeated_calls_are_one_layer():
    torch.manual_seed(0)
    model, examples = _Shared().double(), oracle.data(5, 3)
    names, X = right_sides(model)
    assert names == ["blocks.0"]
    assert oracle.error(product(model, examples, X)[0], X @ oracle.ggn(model, names, examples)) < TOLERANCE


def test_a_llama_through_its_own_attention():
    config = tf.LlamaConfig(
        vocab_size=oracle.VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).double().eval()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = [(p.requires_grad, m.training) for p, m in zip(model.parameters(), model.modules(), strict=False)]
    examples = oracle.data(5, 1)
    names, X = right_sides(model)
    found, _ = product(model, examples, X)
    assert model.config._attn_implementation == "sdpa" and not model._forward_hooks
    assert all(not m._forward_hooks for m in model.modules())
    assert before == [(p.requires_grad, m.training) for p, m in zip(model.parameters(), model.modules(), strict=False)]
    # its normalisation and softmax run in float32 whatever the model's dtype
    assert oracle.error(found, X @ oracle.ggn(model.eval(), names, examples)) < 1e-5


def test_classification():
    config = tf.BertConfig(
        vocab_size=oracle.VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(config).double().eval()
    examples = [{**e, "labels": i % 3} for i, e in enumerate(oracle.data(5, 1))]
    names, X = right_sides(model)
    found, _ = product(model, examples, X, task=pyinf.SequenceClassification())
    wanted = torch.zeros_like(X)
    w = oracle.weights(model, names)
    for example in examples:
        ids = torch.as_tensor(example["input_ids"])[None]

        def logits(w, ids=ids):
            return torch.func.functional_call(model, w, (), {"input_ids": ids}).logits[0]

        J = oracle.flatten(model, names, torch.func.jacrev(logits)(w))
        p = logits(w).softmax(-1)
        wanted += X @ J.T @ (torch.diag(p) - torch.outer(p, p)) @ J / len(examples)
    assert oracle.error(found, wanted.detach()) < TOLERANCE


def test_what_has_no_product_is_refused():
    class Other(pyinf.CausalLM):
        def train_loss(self, model, batch, sample=False):
            return 2 * super().train_loss(model, batch, sample)

    model, examples = oracle.gpt2(), oracle.data(3)
    _, X = right_sides(model)
    with pytest.raises(ConfigError, match="loss of Other is not known to be a cross-entropy"):
        product(model, examples, X, task=Other())
    with pytest.raises(ConfigError, match=r"the model is in torch\.bfloat16; pass dtype=torch\.float32"):
        product(oracle.gpt2(dtype=torch.bfloat16), examples, X)
    assert product(model, examples, X, task=pyinf.LogOdds())[0].shape == X.shape

    class NoTangent(nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    class Net(_Shared):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), NoTangent())])
            self.blocks.append(self.blocks[0])

        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            return type("Output", (), {"logits": self.head(self.blocks[0](x.unsqueeze(1)).squeeze(1))})()

    net = Net().double()
    _, X = right_sides(net)
    with pytest.raises(ModelError, match="without a forward-mode derivative"):
        product(net, examples, X)
    assert all(not m._forward_hooks for m in net.modules())
