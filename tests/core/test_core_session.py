"""The pass itself: checkpointing, what is put back, non-finite values and precision."""

from __future__ import annotations

import core_oracle as oracle
import pytest
import torch
from test_core_zoo import _Net, holds
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pyinf
from pyinf.errors import NonFiniteError

TRAIN, QUERIES = oracle.data(5, 1), oracle.data(2, 2, low=6)


# -- checkpointing -----------------------------------------------------------------------------------------------------


class _Checkpointed(nn.Module):
    """A block that is recomputed in the backward, in eval mode too."""

    def __init__(self, inner: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


def _stack(reentrant: bool | None) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2)]
    return _Net(*[_Checkpointed(b, reentrant) for b in blocks], nn.Linear(8, 8)).double()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["ekfac", "grad_dot"])
def test_recomputed_blocks(reentrant, method):
    for modules in (None, "*.inner.*", "*"):
        kept = pyinf.attribute(_stack(None), TRAIN, QUERIES, method, modules=modules, fisher="empirical").values
        found = pyinf.attribute(_stack(reentrant), TRAIN, QUERIES, method, modules=modules, fisher="empirical").values
        assert oracle.error(found, kept) < 1e-8
    one = pyinf.Attributor(_stack(reentrant), "grad_dot")
    holds(_stack(None), one.selection.names, one.score(QUERIES, TRAIN, batch_size=2, per_module=True).values)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_checkpointing(name, reentrant):
    kept = pyinf.attribute(oracle.make(name), TRAIN, QUERIES).values
    model = oracle.make(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert oracle.error(pyinf.attribute(model, TRAIN, QUERIES).values, kept) < 1e-8
    assert model.training and model.is_gradient_checkpointing


# -- what is put back --------------------------------------------------------------------------------------------------


def _state(model: nn.Module):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        {n: (id(p), p.requires_grad, p.dtype, p.device, p.data_ptr(), id(p.grad)) for n, p in model.named_parameters()},
        {n: (m.training, [len(getattr(m, h)) for h in hooks], sorted(vars(m))) for n, m in model.named_modules()},
        {n: p.detach().clone() for n, p in model.named_parameters()},
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        torch.random.get_rng_state(),
        torch.is_grad_enabled(),
    )


def _same(one, two) -> bool:
    same = one[:2] == two[:2] and torch.equal(one[4], two[4]) and one[5] == two[5]
    for a, b in ((one[2], two[2]), (one[3], two[3])):
        same = same and all((a[n] is None) == (b[n] is None) and (a[n] is None or torch.equal(a[n], b[n])) for n in a)
    return same


def _lived_in(name: str) -> nn.Module:
    """A model in the middle of its owner's work: some parameters frozen, some submodules in train mode, grads present."""  # noqa: E501
    model = oracle.make(name, torch.float32)
    for number, parameter in enumerate(model.parameters()):
        if number % 3 == 0:
            parameter.requires_grad_(False)
        elif number % 3 == 1:
            parameter.grad = torch.randn_like(parameter)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_model_is_as_it_was(name):
    model = _lived_in(name)
    before = _state(model)
    attributor = pyinf.Attributor(model)
    attributor.fit(TRAIN).score(QUERIES, TRAIN)
    attributor.self_score(TRAIN)
    pyinf.attribute(model, TRAIN, QUERIES, "grad_cos")
    assert _same(before, _state(model))


@pytest.mark.parametrize("where", ["forward", "backward", "consumer", "interrupt"])
def test_the_model_is_as_it_was_after_an_exception(where, monkeypatch):
    model = _lived_in("llama")
    before = _state(model)
    attributor = pyinf.Attributor(model, dtype=torch.float64)
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt if where == "interrupt" else ZeroDivisionError("on purpose")

    with monkeypatch.context() as patch:
        if where == "consumer":
            from pyinf.curvature.fit import _Covariances

            real = _Covariances.consume
            patch.setattr(_Covariances, "consume", lambda self, *a: fail() or real(self, *a))
        elif where == "backward":
            from pyinf.capture.session import TracingSession

            real = TracingSession._arrived
            patch.setattr(TracingSession, "_arrived", lambda self, *a: fail() or real(self, *a))
        else:
            block = type(model.model.layers[1])
            real = block.forward
            patch.setattr(block, "forward", lambda self, *a, **k: fail() or real(self, *a, **k))
        with pytest.raises(KeyboardInterrupt if where == "interrupt" else ZeroDivisionError):
            attributor.fit(TRAIN, batch_size=1)
    assert _same(before, _state(model))
    attributor.fit(TRAIN)  # and it still works
    assert _same(before, _state(model))


def test_dtype_is_for_the_time_of_the_call():
    model = oracle.make("llama", torch.float32)
    before = _state(model)
    scores = pyinf.Attributor(model, dtype=torch.float64).run(TRAIN, QUERIES)
    assert scores.values.dtype == torch.float64 and _same(before, _state(model))
    wide = oracle.make("llama", torch.float32).double()
    assert oracle.error(scores.values, pyinf.attribute(wide, TRAIN, QUERIES).values) < 1e-8
    with pytest.raises(pyinf.errors.ConfigError, match="cannot move the model"):
        pyinf.Attributor(model, device="cuda:77")
    assert _same(before, _state(model))


class _Products(TorchDispatchMode):
    """Shapes of all that products of matrices give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("mm", "matmul", "linear")) and isinstance(out, torch.Tensor):
            self.shapes.append(tuple(out.shape))
        return out


def test_no_weight_gradient_is_formed():
    from pyinf.capture import Consumer, TracingSession, select_layers
    from pyinf.data.batching import prepare

    class Nothing(Consumer):
        def consume(self, layer, group, first, a, g, offsets):
            assert not a.requires_grad and not g.requires_grad

    model = oracle.make("llama", torch.float32)
    weights = {s for p in model.parameters() if p.dim() == 2 for s in (tuple(p.shape), tuple(p.shape)[::-1])}
    batch = prepare([{"input_ids": list(range(1, 12))}] * 3, "train", model).batch([0, 1, 2], torch.device("cpu"))
    selection = select_layers(model)
    with TracingSession(model, selection, pyinf.CausalLM()) as session, _Products() as products:
        session.run(batch, Nothing())
    assert products.shapes and not weights & set(products.shapes)
    with _Products() as products:  # the check can see one
        oracle.causal_loss(model, TRAIN[0]).backward()
    assert weights & set(products.shapes)
    model.zero_grad()


def test_nothing_below_the_first_traced_layer_is_differentiated():
    model = oracle.make("llama", torch.float32)
    seen = []
    for number, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(
            lambda m, a, out, number=number: seen.append((number, out.requires_grad))
        )
    pyinf.attribute(model, TRAIN, QUERIES, "grad_dot", modules="model.layers.1.mlp.down_proj")
    assert seen and not any(requires for _, requires in seen)


# -- non-finite values -------------------------------------------------------------------------------------------------


def test_a_nan_weight_names_the_layer_and_the_example():
    model = oracle.make("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer 'model\.layers\.1\.mlp\.down_proj' is not finite for example \d"):
        pyinf.attribute(model, TRAIN, QUERIES)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_overflows_names_its_example(batch_size, value):
    model = oracle.make("llama", torch.float32)
    train = [{"input_ids": [i for i in e["input_ids"] if i != 40] + [3]} for e in TRAIN]
    train[3]["input_ids"][1] = 40
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = value
    for method in ("ekfac", "grad_dot"):
        with pytest.raises(NonFiniteError, match=r"input of layer 'model\.layers\.0\.self_attn\.q_proj' .* example 3"):
            pyinf.attribute(model, train, [{"input_ids": [5, 6, 7, 8]}], method, batch_size=batch_size)


class _Squash(nn.Module):
    """Hides an infinite activation from the loss, or lets a gradient overflow that the loss does not show."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.first(x)
        marked = (x[..., :1] > 50).float()
        if self.kind == "input":
            h = torch.where(marked.bool(), torch.full_like(h, float("inf")), h)
            return torch.tanh(self.second(h)).nan_to_num(0.0)
        return self.second(_Explode.apply(h, marked))


class _Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, marked):
        ctx.save_for_backward(marked)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (marked,) = ctx.saved_tensors
        return torch.where(marked.bool(), torch.full_like(grad, float("inf")), grad), None


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize(
    "kind, what",
    [
        ("input", "input of layer 'blocks.0.inner.second'"),
        ("gradient", "gradient at the output of layer 'blocks.0.inner.first'"),
    ],
)
def test_what_the_loss_does_not_show(kind, what, reentrant):
    torch.manual_seed(0)
    model = _Net(_Checkpointed(_Squash(kind), reentrant))
    with torch.no_grad():
        model.embed.weight[40, 0] = 100.0
    train = [{"input_ids": [i % 39 for i in e["input_ids"]]} for e in TRAIN]
    train[2]["input_ids"][1] = 40
    for method in ("ekfac", "grad_dot"):
        with pytest.raises(NonFiniteError) as caught:
            pyinf.attribute(model, train, [{"input_ids": [5, 6, 7]}], method, batch_size=5)
        assert what in str(caught.value) and "for example 2;" in str(caught.value)


def test_fp16_overflow_in_the_backward():
    model = oracle.make("gpt2", torch.float32).half()

    class Loud(pyinf.CausalLM):
        def train_loss(self, model, batch, sample=False):
            return super().train_loss(model, batch, sample).float() * 1e6

    with pytest.raises(
        NonFiniteError,
        match=r"gradient at the output of layer '.*c_\w+' is not finite for example \d; run the model in a wider dtype",
    ):
        pyinf.attribute(model, TRAIN, QUERIES, task=Loud())


def test_masked_positions_may_be_anything():
    """Logits that are NaN where nothing counts neither stop the run nor leak into a gradient."""
    from pyinf.tasks import summed_cross_entropy

    logits = torch.randn(3, 5, requires_grad=True)
    bad = logits.detach().clone()
    bad[1] = float("nan")
    bad.requires_grad_(True)
    labels = torch.tensor([2, -100, 4])
    value = summed_cross_entropy(bad * 1.0, labels)
    value.backward()
    torch.nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]], reduction="sum").backward()
    assert torch.allclose(bad.grad[[0, 2]], logits.grad[[0, 2]]) and not bad.grad[1].any()


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_accumulate_in_fp32(dtype):
    exact = oracle.make("llama", torch.float32, scale=2.0).to(dtype).double()
    model = oracle.make("llama", torch.float32, scale=2.0).to(dtype)
    train = oracle.data(12, 1)
    attributor = pyinf.Attributor(model, fisher="empirical").fit(train)
    for factor in attributor.factors.inputs.values():
        assert factor.basis.dtype == factor.eigenvalues.dtype == torch.float32
    for factor in attributor.factors.layers.values():
        assert factor.corrected.dtype == factor.basis.dtype == torch.float32
    found = attributor.score(QUERIES, train)
    assert found.values.dtype == torch.float32
    wanted = pyinf.attribute(exact, train, QUERIES, fisher="empirical").values
    both = torch.stack([found.values.flatten().double(), wanted.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.98
    # a running sum kept in half precision would stop growing: many equal rows
    name = attributor.selection.names[0]
    many = pyinf.Attributor(model, fisher="empirical", modules=name).fit([TRAIN[0]] * 300, batch_size=1).factors
    once = pyinf.Attributor(model, fisher="empirical", modules=name).fit([TRAIN[0]], batch_size=1).factors
    assert oracle.error(many.layers[name].matrix(), once.layers[name].matrix()) < 1e-3
    assert oracle.error(many.inputs[name].matrix(), once.inputs[name].matrix()) < 1e-3


def test_ambient_settings_change_nothing():
    model = oracle.make("llama", torch.float32)
    plain = pyinf.attribute(model, TRAIN, QUERIES).values
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with context:
            found = pyinf.attribute(model, TRAIN, QUERIES).values
            own = pyinf.Attributor(model).fit(TRAIN).self_score(TRAIN)
        assert oracle.error(found, plain) < 1e-6 and bool((own > 0).all())
    torch.set_default_dtype(torch.float64)
    try:
        assert oracle.error(pyinf.attribute(model, TRAIN, QUERIES).values, plain) < 1e-6
    finally:
        torch.set_default_dtype(torch.float32)
