"""Model families, adapters and awkward modules: every traced layer against explicit gradients of plain autograd."""

from __future__ import annotations

import warnings

import core_oracle as oracle
import pytest
import torch
from torch import nn

import pyinf
from pyinf.capture import select_layers
from pyinf.errors import ModelError, ModuleSelectionError

TRAIN, QUERIES = oracle.data(5, 1), oracle.data(2, 2, low=6)
PER_BLOCK = {
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "gpt_neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "bert": "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense output.dense",  # noqa: E501
}
LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "bert": "bert.encoder.layer"}


def holds(model, names, found, loss=oracle.causal_loss, train=TRAIN, queries=QUERIES, tolerance=1e-4):
    G, V = oracle.gradients(model, train, names, loss), oracle.gradients(model, queries, names, loss)
    for name in names:
        wanted = oracle.dot([{name: v[name]} for v in V], [{name: g[name]} for g in G])
        assert oracle.error(found[name], wanted) < tolerance, name


@pytest.mark.parametrize("name", list(oracle.ZOO))
def test_family(name):
    model = oracle.make(name, torch.float32, scale=2.0)
    task, loss, train, queries = None, oracle.causal_loss, TRAIN, QUERIES
    if name == "bert":
        task, loss = pyinf.SequenceClassification(), oracle.class_loss
        train, queries = oracle.classified(5, 1), oracle.classified(2, 2)
    attributor = pyinf.Attributor(model, "grad_dot", task)
    names = attributor.selection.names
    blocks = BLOCKS.get(name, "model.layers")
    assert names == [f"{blocks}.{i}.{part}" for i in range(2) for part in PER_BLOCK.get(name, LLAMA).split()]
    found = attributor.score(queries, train, batch_size=3, per_module=True)
    holds(model, names, found.values, loss, train, queries)
    if name == "bert":  # and the whole of it, pooler and head included
        every = pyinf.Attributor(model, "grad_dot", task, modules="*")
        assert {"classifier", "bert.pooler.dense"} <= set(every.selection.names)
        holds(model, every.selection.names, every.score(queries, train, per_module=True).values, loss, train, queries)
        assert bool(torch.isfinite(pyinf.attribute(model, train, queries, task=task, modules="*").values).all())
    groups = attributor._run.groups.of_layer
    for i in range(2):
        group = {part: groups[f"{blocks}.{i}.{part}"] for part in PER_BLOCK.get(name, LLAMA).split()}
        shared = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] if name not in BLOCKS else []
        if name == "bert":
            shared = [("self.query", "self.key", "self.value")]
        for siblings in shared:
            assert len({g for part, g in group.items() if part.endswith(siblings)}) == 1
        assert len(set(group.values())) == len(group) - sum(len(s) - 1 for s in shared)


def test_the_covariance_of_a_shared_input_is_computed_once(monkeypatch):
    from pyinf.curvature import fit

    model = oracle.make("llama", torch.float32)
    calls = []
    real = fit.ops.accumulate_covariance
    monkeypatch.setattr(
        fit.ops, "accumulate_covariance", lambda C, x, *a, **k: calls.append(x.data_ptr()) or real(C, x, *a, **k)
    )
    attributor = pyinf.Attributor(model).fit(TRAIN, batch_size=5)
    assert len(calls) == 2 * (7 + 4)  # per block: seven layers, and four inputs (qkv, o, gate and up, down)
    assert len(attributor.factors.inputs) == 8


# -- selection ---------------------------------------------------------------------------------------------------------


def test_selection_by_name_glob_list_and_predicate():
    model = oracle.make("gpt2")
    q = "transformer.h.0.attn.c_attn"

    def names(modules):
        return select_layers(model, modules).names

    assert names(q) == [q] and names([q]) == [q]
    assert names("*.mlp.c_fc") == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    assert names(["*.1.mlp.c_proj", q]) == [q, "transformer.h.1.mlp.c_proj"]  # the model's order
    assert names(lambda name, module: "h.1.attn" in name) == [
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
    ]
    assert names("lm_head") == ["lm_head"]
    with pytest.raises(
        ModuleSelectionError, match=r"no layer matched 'transformer\.h\.0\.attn\.catn'; nearest names: .*c_attn"
    ):
        names("transformer.h.0.attn.catn")
    with pytest.raises(ModuleSelectionError, match="no layer matched the predicate"):
        names(lambda name, module: False)
    with pytest.raises(ModuleSelectionError, match=r"layer 'transformer\.wte' is a Embedding, which cannot be traced"):
        names([q, "transformer.wte"])
    with pytest.raises(ModuleSelectionError, match="layer 'transformer.h.0.ln_1' is a LayerNorm"):  # noqa: RUF043
        names("transformer.h.0.ln_1")
    with pytest.raises(ModuleSelectionError, match="no layer that can be traced"):
        select_layers(nn.Embedding(3, 4))
    with pytest.raises(ModuleSelectionError):
        names([])


def test_the_head_is_traced_when_asked_for():
    model = oracle.make("llama", torch.float32, scale=2.0)
    found = pyinf.Attributor(model, "grad_dot", modules=["lm_head", "*.1.mlp.down_proj"])
    holds(model, found.selection.names, found.score(QUERIES, TRAIN, per_module=True).values)


class _Net(nn.Module):
    """Embedding → blocks → head; ``forward`` of a plain module, with a ModuleList of blocks like any model."""

    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(oracle.VOCAB, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, oracle.VOCAB)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return type("Output", (), {"logits": self.head(x)})()


class _Routed(nn.Module):
    """A mixture whose experts are one stacked parameter, as current MoE models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.Parameter(0.3 * torch.randn(3, 8, 8))

    def forward(self, x):
        return torch.einsum("bte,eij,btj->bti", self.gate(x).softmax(-1), self.experts, x)


def test_what_cannot_be_traced_is_listed_with_its_share():
    torch.manual_seed(0)
    model = _Net(_Routed(), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"\d+\.\d % of the parameters .* cannot be traced: _Routed \(\d+\.\d %\)"):
        selection = select_layers(model)
    assert selection.names == ["blocks.0.gate", "blocks.1"]
    assert selection.untraced == {"_Routed": 192} and 0 < selection.share < 1
    with pytest.raises(ModuleSelectionError, match="'blocks.0' is a _Routed"):  # noqa: RUF043
        select_layers(model, ["blocks.0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_layers(model, "*.gate")
    found = pyinf.Attributor(model, "grad_dot").score(QUERIES, TRAIN, per_module=True)
    holds(model, selection.names, found.values)


class _Dispatch(nn.Module):
    """Experts that see only the tokens routed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        out = torch.zeros_like(x)
        chosen = x[..., 0] > 0
        for expert, where in zip(self.experts, (chosen, ~chosen), strict=True):
            out = out.masked_scatter(where.unsqueeze(-1), expert(x[where]))
        return out


def test_a_routed_expert_is_an_error_that_names_it():
    torch.manual_seed(0)
    model = _Net(_Dispatch(), nn.Linear(8, 8))
    with pytest.raises(ModelError, match=r"'blocks\.0\.experts\.\d' .* \(a routed expert\?\); leave it out"):
        pyinf.attribute(model, TRAIN, QUERIES, "grad_dot")
    found = pyinf.Attributor(model, "grad_dot", modules="blocks.1").score(QUERIES, TRAIN, per_module=True)
    holds(model, ["blocks.1"], found.values)


# -- modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grad_dot", "ekfac"])
def test_a_module_called_several_times(method):
    torch.manual_seed(0)
    block = nn.Linear(8, 8)
    model = _Net(nn.Sequential(nn.Tanh(), block, nn.Tanh(), block), nn.Linear(8, 8))
    attributor = pyinf.Attributor(model, method, fisher="empirical").fit(TRAIN)
    assert attributor.selection.names == ["blocks.0.1", "blocks.1"]
    moved = [oracle.padded(e, 0, 0) for e in TRAIN]
    found = attributor.score(QUERIES, moved, batch_size=3)
    wide = pyinf.Attributor(model, method, fisher="empirical").fit(TRAIN, 1).score(QUERIES, TRAIN, batch_size=1)
    assert oracle.error(found.values, wide.values) < 1e-4
    G = oracle.gradients(model, TRAIN, attributor.selection.names)
    if method == "grad_dot":
        holds(model, attributor.selection.names, attributor.score(QUERIES, TRAIN, per_module=True).values)
        assert oracle.error(attributor.self_score(TRAIN), oracle.dot(G, G).diagonal()) < 1e-4
    else:
        layer = attributor.factors.layers["blocks.0.1"]
        basis = attributor.factors.inputs[layer.group].basis
        wanted = torch.stack([(layer.basis.T @ g["blocks.0.1"] @ basis).square() for g in G]).mean(0)
        assert oracle.error(layer.corrected, wanted) < 1e-4
        assert layer.rows == 2 * sum(len(e["input_ids"]) for e in TRAIN)


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_shared_by_two_modules_is_one_layer(bias):
    torch.manual_seed(0)
    one, two = nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)
    two.weight = one.weight
    if bias:
        two.bias = one.bias
    model = _Net(nn.Sequential(one, nn.Tanh()), two)
    attributor = pyinf.Attributor(model, "grad_dot")
    assert attributor.selection.names == ["blocks.0.0"]
    holds(model, ["blocks.0.0"], attributor.score(QUERIES, TRAIN, per_module=True).values)
    pyinf.Attributor(model).fit(TRAIN)


def test_a_shared_weight_with_biases_of_their_own_traces_the_weight():
    torch.manual_seed(0)
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    model = _Net(nn.Sequential(one, nn.Tanh()), two)
    attributor = pyinf.Attributor(model, "grad_dot")
    assert [(layer.name, layer.bias) for layer in attributor.selection.layers] == [("blocks.0.0", False)]
    G, V = (oracle.gradients(model, x, ["blocks.0.0"]) for x in (TRAIN, QUERIES))
    cut = [[{"w": g["blocks.0.0"][:, :-1]} for g in part] for part in (V, G)]
    assert oracle.error(attributor.score(QUERIES, TRAIN).values, oracle.dot(*cut)) < 1e-4


class _Int8Linear(nn.Linear):
    """A quantised layer: int8 weight, a scale, a forward that is linear in the input."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=False)
        scale = source.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((source.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_a_quantised_subclass_is_traced():
    torch.manual_seed(0)
    model = _Net(nn.Sequential(nn.Tanh(), _Int8Linear(nn.Linear(8, 8))), nn.Linear(8, 8))
    twin = _Net(nn.Sequential(nn.Tanh(), nn.Linear(8, 8, bias=False)), nn.Linear(8, 8))
    state = model.state_dict()
    state["blocks.0.1.weight"] = state["blocks.0.1.weight"].float() * state.pop("blocks.0.1.scale")
    twin.load_state_dict(state)
    attributor = pyinf.Attributor(model, "grad_dot")
    assert attributor.selection.names == ["blocks.0.1", "blocks.1"]
    holds(twin, attributor.selection.names, attributor.score(QUERIES, TRAIN, per_module=True).values)
    pyinf.Attributor(model).fit(TRAIN)
    assert model.blocks[0][1].weight.dtype == torch.int8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora(name):
    peft = pytest.importorskip("peft")
    model = oracle.make(name, torch.float32, scale=2.0)
    targets = ["q_proj", "v_proj", "down_proj"] if name == "llama" else ["c_attn"]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.3, fan_in_fan_out=name == "gpt2")
    model = peft.get_peft_model(model, config)
    model.add_adapter("idle", config)
    torch.manual_seed(5)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.eval()
    attributor = pyinf.Attributor(model, "grad_dot")
    names = attributor.selection.names
    assert len(names) == 2 * 2 * len(targets) and all(n.endswith(("lora_A.default", "lora_B.default")) for n in names)
    model.requires_grad_(True)
    holds(model, names, attributor.score(QUERIES, TRAIN, per_module=True).values)
    model.train()
    fitted = pyinf.Attributor(model).fit(TRAIN)
    assert bool(torch.isfinite(fitted.score(QUERIES, TRAIN).values).all())
    if name == "llama":  # the A of q and v read one input
        groups = fitted.factors.layers
        stem = "base_model.model.model.layers.0.self_attn"
        assert groups[f"{stem}.q_proj.lora_A.default"].group == groups[f"{stem}.v_proj.lora_A.default"].group


def test_a_fresh_adapter_is_an_error_that_names_the_layer():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(oracle.make("llama", torch.float32), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    attributor = pyinf.Attributor(model).fit(TRAIN)  # B is zero, so no gradient reaches A
    with pytest.raises(
        pyinf.errors.NonFiniteError, match=r"layer 'base_model\..*lora_A\.default' is 0\.0: its gradients vanish"
    ):
        attributor.score(QUERIES, TRAIN)


def test_a_layer_that_is_never_called():
    torch.manual_seed(0)
    model = _Net(nn.Linear(8, 8))
    model.blocks[0].spare = nn.Linear(8, 8)
    with pytest.raises(ModelError, match=r"layer 'blocks\.0\.spare' was never called by the model"):
        pyinf.attribute(model, TRAIN, QUERIES)


class _Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.long = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.long(self.always(x)) if x.shape[1] > 8 else self.always(x)


def test_a_layer_that_only_some_batches_call():
    torch.manual_seed(0)
    model = _Net(_Sometimes())
    train = oracle.data(3, 1, 4, 7) + oracle.data(3, 2, 10, 14)
    for queries in (oracle.data(2, 3, 4, 7), oracle.data(2, 3, 10, 14)):
        attributor = pyinf.Attributor(model, "grad_dot")
        names = attributor.selection.names
        G, V = oracle.gradients(model, train, names), oracle.gradients(model, queries, names)
        assert oracle.error(attributor.score(queries, train, batch_size=1).values, oracle.dot(V, G)) < 1e-4


class _Transposed(nn.Module):
    """Positions before sequences, as recurrent modules have them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_sequence_first_layers_are_refused_not_mixed_up():
    model = _Net(_Transposed())
    with pytest.raises(
        ModelError, match=r"layer 'blocks\.0\.inner' reads inputs of shape .* positions before sequences"
    ):
        pyinf.attribute(model, TRAIN, QUERIES, "grad_dot", batch_size=3)


class _Odd(nn.Module):
    """Inputs and gradients that are views: transposed inputs, flattened calls, expanded gradients, keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.strided, self.flat, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x):
        x = self.strided(input=x.mT.contiguous().mT)
        x = self.flat(x.reshape(-1, x.shape[-1])).view_as(x)
        return self.wide(x)[..., :8] + self.wide(x).sum(-1, keepdim=True)


def test_views_and_flattened_calls():
    torch.manual_seed(0)
    model = _Net(_Odd())
    attributor = pyinf.Attributor(model, "grad_dot")
    holds(model, attributor.selection.names, attributor.score(QUERIES, TRAIN, batch_size=3, per_module=True).values)
    pyinf.Attributor(model).fit(TRAIN)


# -- changes in place --------------------------------------------------------------------------------------------------


class _InPlace(nn.Module):
    def __init__(self, change_input: bool) -> None:
        super().__init__()
        self.first, self.second, self.change_input = nn.Linear(8, 8), nn.Linear(8, 8), change_input

    def forward(self, x):
        h = self.first(x)
        if not self.change_input:
            return self.second(nn.functional.relu_(h))
        out = self.second(h)
        h.relu_()
        return out + h


def test_an_output_changed_in_place_is_fine_and_an_input_is_an_error():
    torch.manual_seed(0)
    model = _Net(_InPlace(False))
    attributor = pyinf.Attributor(model, "grad_dot")
    holds(model, attributor.selection.names, attributor.score(QUERIES, TRAIN, per_module=True).values)
    with pytest.raises(
        ModelError, match=r"input of layer 'blocks\.0\.second' was changed in place after the layer read it"
    ):
        pyinf.attribute(_Net(_InPlace(True)), TRAIN, QUERIES, "grad_dot")
