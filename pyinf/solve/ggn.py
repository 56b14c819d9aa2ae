"""Products with the exact generalised Gauss–Newton matrix of the traced layers, batched over right-hand sides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from pyinf import progress
from pyinf.capture import Layer, LayerSelection
from pyinf.data.batching import PreparedExamples, TokenBatch
from pyinf.errors import ConfigError, ModelError
from pyinf.solve.layout import Layout
from pyinf.solve.operators import Operator
from pyinf.tasks import IGNORE, Task

__all__ = ["GGNOperator", "plain_attention"]

_CHUNK_BYTES = {"cpu": 1 << 29, "cuda": 4 << 30}


class _Inject(torch.autograd.Function):
    """``y + [a, 1] δᵀ`` at ``δ = 0``: the layer's output as a function of its weight.

    Its tangent is ``ẏ + [a, 1] δ̇ᵀ`` and its gradient ``(g, 0, gᵀ[a, 1])``; the products with ``δ = 0`` are not
    formed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, a: Tensor, delta: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, a, delta = inputs
        ctx.save_for_backward(a)
        ctx.save_for_forward(a)
        ctx.bias = delta.shape[-1] != a.shape[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, Tensor]:
        (a,), g = ctx.saved_tensors, grads[0]
        rows = g.reshape(-1, g.shape[-1])
        out = rows.T @ a.reshape(-1, a.shape[-1])
        if ctx.bias:
            out = torch.cat([out, rows.sum(dim=0).unsqueeze(1)], dim=1)
        return g, None, out

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (a,), (y, _, delta) = ctx.saved_tensors, tangents
        weight, bias = (delta[:, :-1], delta[:, -1]) if ctx.bias else (delta, None)
        out = nn.functional.linear(a, weight, bias)
        return out if y is None else y + out


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Run a ``transformers`` model with the "eager" attention, which can be differentiated forwards; put it back
    after.
    """
    owner = next((m for m in model.modules() if hasattr(m, "set_attn_implementation") and hasattr(m, "config")), None)
    before = getattr(getattr(owner, "config", None), "_attn_implementation", None)
    if owner is None or before in (None, "eager"):
        yield
        return
    progress.note(f"curvature products run with attention 'eager': '{before}' has no forward-mode derivative")
    owner.set_attn_implementation("eager")
    try:
        yield
    finally:
        owner.set_attn_implementation(before)


class GGNOperator(Operator):
    """``C = mean_i Σ_t J_itᵀ H_it J_it`` over all traced layers together, cross-layer blocks included.

    ``J_it`` is the Jacobian of the logits at position t of sequence i with respect to the traced weights, ``H_it =
    diag(p) − ppᵀ`` the Hessian of its cross-entropy, zero where the position carries no label. A product of a batch
    runs the model twice (once forwards with tangents, once for the pull-back) whatever the number of right-hand sides,
    each of which then costs about one tangent forward and one backward: ``8·D`` FLOPs a token.

    Use it as a context: inside, the model is frozen, in eval mode, hooked, and runs attention that has a forward-mode
    derivative. Everything is put back.

    Args:
        batches: example indices, batch by batch; the mean is over ``sequences`` (default: those in the batches).

    Raises:
        ConfigError: the task's loss is no cross-entropy that pyinf knows, or the model is not in float32 or float64.
        ModelError: the model uses an operation without a forward-mode derivative.

    Source: Schraudolph 2002 (Neural Computation 14).
    """

    def __init__(
        self,
        model: nn.Module,
        selection: LayerSelection,
        task: Task,
        data: PreparedExamples,
        batches: Sequence[Sequence[int]],
        sequences: int | None = None,
        chunk: int | None = None,
    ) -> None:
        check_ggn(model, task)
        self.model, self.selection, self.task, self.data = model, selection, task, data
        self.batches = [list(b) for b in batches]
        self.sequences = sequences if sequences is not None else sum(len(b) for b in self.batches)
        self.layout = Layout.of(selection.layers)
        self.size = self.layout.size
        self.chunk = chunk
        self.device = next(model.parameters()).device
        self._stack: contextlib.ExitStack | None = None
        self._slot: list[dict[str, Tensor]] = []  # the weights of the moment, seen by the hooks

    # -- context -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> GGNOperator:
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(_frozen(self.model))
            stack.enter_context(plain_attention(self.model))
            for layer in self.selection.layers:
                for module in layer.modules:
                    handle = module.register_forward_hook(self._hook(layer), with_kwargs=True)
                    stack.callback(handle.remove)
        except BaseException:
            stack.close()
            raise
        self._stack = stack
        return self

    def __exit__(self, *exc: object) -> None:
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def on(self, batches: Sequence[Sequence[int]], sequences: int | None = None) -> GGNOperator:
        """The same operator over other batches, for the time of this context."""
        other = object.__new__(GGNOperator)
        other.__dict__.update(self.__dict__)
        other.batches = [list(b) for b in batches]
        other.sequences = sequences if sequences is not None else sum(len(b) for b in other.batches)
        other.products = 0
        return other

    def _hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not self._slot:
                return None
            a = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            return _Inject.apply(output, a, self._slot[0][layer.name])

        return hook

    # -- products ------------------------------------------------------------------------------------------------------

    def apply(self, X: Tensor) -> Tensor:
        """``C X``."""
        if self._stack is None:
            raise ConfigError("a GGNOperator multiplies only inside its context: with GGNOperator(…) as C")
        out = torch.zeros_like(X)
        for indices in self.batches:
            self.add_batch(out, X, self.data.batch(indices, self.device))
        return out.div_(max(1, self.sequences))

    def add_batch(self, out: Tensor, X: Tensor, batch: TokenBatch) -> None:
        """``out += Σ_i Σ_t Jᵀ H J X`` over the sequences of one batch."""
        layout, like = self.layout, next(self.model.parameters())
        zeros = {n: like.new_zeros(s) for n, s in zip(layout.names, layout.shapes, strict=True)}
        step = self.chunk if self.chunk is not None else self._chunk(batch, X.shape[0])
        targets: list[Tensor] = []

        def logits(delta: dict[str, Tensor]) -> Tensor:
            self._slot[:] = [delta]
            try:
                z, y = self.task.predictions(self.model, batch.inputs)
            finally:
                self._slot.clear()
            targets[:] = [y]
            return z

        try:
            with torch.enable_grad():
                z, pull = vjp(logits, zeros)
            p = torch.softmax(z.detach(), dim=-1)
            counted = (targets[0] != IGNORE).unsqueeze(-1)
            for start in range(0, X.shape[0], step):
                block = layout.unpack(X[start : start + step].to(like.dtype))
                with torch.no_grad():
                    JX = vmap(lambda t: jvp(logits, (zeros,), (t,))[1])(block)
                    JX = torch.where(counted, p * (JX - (p * JX).sum(dim=-1, keepdim=True)), 0)
                (found,) = vmap(pull)(JX)
                out[start : start + step] += layout.pack(found).to(out.dtype)
        except NotImplementedError as error:
            raise ModelError(
                f"the model uses an operation without a forward-mode derivative ({str(error).splitlines()[0][:160]}); "
                "use curvature='fisher', or a direct method with certify=False"
            ) from error

    def _chunk(self, batch: TokenBatch, count: int) -> int:
        """Right-hand sides at a time: their tangents at every layer and at the logits fit a fixed share of memory."""
        size, longest = batch.shape
        vocabulary = int(getattr(getattr(self.model, "config", None), "vocab_size", 0) or 0)
        widths = sum(layer.d_in + 2 * layer.d_out for layer in self.selection.layers)
        element = next(self.model.parameters()).element_size()
        per_row = element * (size * longest * (4 * vocabulary + 3 * widths) + 2 * self.size)
        return max(1, min(count, _CHUNK_BYTES.get(self.device.type, 1 << 30) // max(1, per_row)))


def check_ggn(model: nn.Module, task: Task) -> None:
    """Refuse what has no exact generalised Gauss–Newton product here.

    Raises:
        ConfigError: see :class:`GGNOperator`.
    """
    owner = next((c for c in type(task).__mro__ if "train_loss" in vars(c)), Task)
    if "predictions" not in vars(owner):
        raise ConfigError(
            f"the loss of {type(task).__name__} is not known to be a cross-entropy of logits, so its Gauss–Newton "
            "matrix is unknown; define predictions(model, batch) beside train_loss, or use curvature='fisher'"
        )
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"curvature products need float32 or float64, the model is in {dtype}; pass dtype=torch.float32"
        )


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    requires = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    try:
        for parameter, _ in requires:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, mode in requires:
            parameter.requires_grad_(mode)
