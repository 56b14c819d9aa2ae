"""One forward and one backward that hand every traced layer's inputs and output gradients to a consumer.

Parameters are frozen, so the pass never forms a weight gradient; the graph starts at the outputs of the first traced
layers, so nothing below them is differentiated. Everything of the user's model is put back on exit.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyinf.capture.layers import Layer, LayerSelection
from pyinf.data.batching import TokenBatch
from pyinf.errors import ModelError, NonFiniteError
from pyinf.tasks import Task

__all__ = ["CapturedBatch", "Consumer", "InputGroups", "Recorder", "TracingSession"]


class Consumer:
    """What is done with a layer's captured factors, as they appear during the backward.

    ``a`` ``[N, d_in]`` and ``g`` ``[N, d_out]`` hold counted positions, sequence after sequence; ``offsets`` ``[B+1]``.
    ``group`` names the input that layers share; ``first`` is true for the first layer of the group in this batch.
    ``rotated``
    says that the factors come in the layers' eigenbases, which only a replay of what :meth:`take_rotated` gave can.
    """

    rotated = False

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        raise NotImplementedError

    def finish_batch(self) -> None:
        """Called when the last layer of a batch was handed over: the place for what is done for all layers at once."""

    def take_rotated(self) -> CapturedBatch | None:
        """The batch just consumed in the layers' eigenbases, if this consumer made it and it is wanted later."""
        return None


@dataclass
class InputGroups:
    """Which layers read the very same input tensor (q, k, v; gate, up). Learnt from the first batch, held to
    afterwards.
    """

    of_layer: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return list(dict.fromkeys(self.of_layer.values()))

    def learn(self, layer_inputs: dict[str, tuple[int, bool]]) -> None:
        """``layer_inputs``: layer name → (input identity, has bias). A bias adds a column, so it separates groups."""
        leaders: dict[tuple[int, bool], str] = {}
        for name, key in layer_inputs.items():
            self.of_layer[name] = leaders.setdefault(key, name)


class _StartGraph(torch.autograd.Function):
    """Identity whose output requires grad although its input does not: where the graph begins."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, carrier: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None


@dataclass
class _Call:
    inputs: Tensor
    version: int


class TracingSession:
    """Context in which the model is frozen, in eval mode and hooked; :meth:`run` makes one traced pass over a batch.

    On exit, also after an exception, hooks are gone and ``requires_grad``, train/eval modes and ``.grad`` are as
    before.
    """

    def __init__(
        self, model: nn.Module, selection: LayerSelection, task: Task, groups: InputGroups | None = None
    ) -> None:
        self.model, self.selection, self.task = model, selection, task
        self.groups = groups if groups is not None else InputGroups()
        parameter = next(model.parameters(), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        self._handles: list[Any] = []
        self._saved_requires: list[tuple[nn.Parameter, bool]] = []
        self._saved_training: list[tuple[nn.Module, bool]] = []
        self._batch: TokenBatch | None = None
        self._consumer: Consumer | None = None
        self._calls: dict[str, list[_Call]] = {}
        self._pending: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        self._seen_groups: dict[str, int] = {}
        self._delivered: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._input_sums: dict[str, Tensor] = {}
        self._in_backward = False
        self._skipped_without_grad = False
        self._grad_from_embedding = False
        self._failure: Exception | None = None
        self._stance: Any = None

    def __enter__(self) -> TracingSession:
        self._saved_requires = [(p, p.requires_grad) for p in self.model.parameters()]
        self._saved_training = [(m, m.training) for m in self.model.modules()]
        try:
            if "torch._dynamo" in sys.modules:
                # Hooks that hand tensors out do not belong in a compiled graph. Without dynamo nothing is compiled, and
                # loading it for this costs seconds and a hundred megabytes.
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            for parameter, _ in self._saved_requires:
                parameter.requires_grad_(False)
            self.model.eval()
            for layer in self.selection.layers:
                for module in layer.modules:
                    hook = module.register_forward_hook(self._forward_hook(layer), with_kwargs=True)
                    self._handles.append(hook)
            embedding = self._embedding()
            if embedding is not None:
                self._handles.append(embedding.register_forward_hook(self._embedding_hook))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, training in self._saved_training:
            module.training = training
        for parameter, requires in self._saved_requires:
            parameter.requires_grad_(requires)
        self._saved_requires, self._saved_training = [], []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        self._calls.clear()
        self._pending.clear()

    def _embedding(self) -> nn.Module | None:
        getter = getattr(self.model, "get_input_embeddings", None)
        found = None
        if callable(getter):
            with contextlib.suppress(NotImplementedError, AttributeError):
                found = getter()
        return (
            found if found is not None else next((m for m in self.model.modules() if isinstance(m, nn.Embedding)), None)
        )

    def _embedding_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        # Reentrant checkpointing needs an input that carries grad; otherwise the graph starts later and costs less.
        if self._grad_from_embedding and isinstance(output, Tensor) and not output.requires_grad:
            return output.detach().requires_grad_(True)
        return None

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _forward_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._consumer is None:
                return None
            if not torch.is_grad_enabled():
                self._skipped_without_grad = True  # a reentrant checkpoint's first run; its recomputation is captured
                return None
            if self._in_backward and not self._skipped_without_grad:
                # Non-reentrant checkpointing recomputes what was captured already; the graph must come out the same.
                return None if output.requires_grad else self._start_graph(output)
            inputs = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            if not isinstance(inputs, Tensor) or not isinstance(output, Tensor):
                raise ModelError(f"layer '{layer.name}' was called without a tensor input; leave it out with modules=")
            inputs = inputs.detach()
            call = _Call(inputs, inputs._version)
            self._calls.setdefault(layer.name, []).append(call)
            replacement = None
            if not output.requires_grad:
                replacement = output = self._start_graph(output)
            output.register_hook(self._gradient_hook(layer, call))
            return replacement

        return hook

    def _start_graph(self, output: Tensor) -> Tensor:
        return _StartGraph.apply(output, torch.empty(0, device=output.device, requires_grad=True))

    def _gradient_hook(self, layer: Layer, call: _Call) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            if self._failure is not None:
                return
            try:
                self._arrived(layer, call, grad.detach())
            except Exception as error:  # raised again from run(): autograd would wrap it
                self._failure = error

        return hook

    def _arrived(self, layer: Layer, call: _Call, grad: Tensor) -> None:
        if call.inputs._version != call.version:
            raise ModelError(
                f"the input of layer '{layer.name}' was changed in place after the layer read it; it cannot be traced"
            )
        pending = self._pending.setdefault(layer.name, [])
        pending.append((call.inputs, grad))
        if len(pending) == len(self._calls[layer.name]) and not self._in_reentrant():
            self._deliver(layer)

    def _in_reentrant(self) -> bool:
        # Under reentrant checkpointing the number of calls is not known before the backward has ended.
        return self._skipped_without_grad

    def _deliver(self, layer: Layer) -> None:
        assert self._consumer is not None and self._batch is not None
        pending = self._pending.pop(layer.name)
        a, g, offsets = self._pack(layer, [p[0] for p in pending], [p[1] for p in pending])
        group = self.groups.of_layer[layer.name]
        pointer = pending[0][0].data_ptr()
        first = self._seen_groups.setdefault(group, pointer) == pointer and group not in self._delivered
        if self._seen_groups[group] != pointer:
            raise ModelError(
                f"layers '{group}' and '{layer.name}' shared one input in the first batch and no longer do; "
                "trace them in separate runs with modules="
            )
        self._delivered.add(group)
        # One read of g: any NaN or infinity survives a sum. Judged once a batch, so that a GPU is not stopped per
        # layer.
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        self._sums[layer.name] = g.sum(dtype=wide)
        if first:
            self._input_sums[layer.name] = a.sum(dtype=wide)
        self._consumer.consume(layer, group, first, a, g, offsets)

    # -- layout --------------------------------------------------------------------------------------------------------

    def _pack(self, layer: Layer, inputs: list[Tensor], grads: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Counted rows of every call, grouped by sequence."""
        several = len(inputs) > 1
        packed = [self._pack_call(layer, a, g, several) for a, g in zip(inputs, grads, strict=True)]
        if len(packed) == 1:
            return packed[0]
        total = sum((p[2] for p in packed[1:]), packed[0][2].clone())
        parts_a, parts_g = [], []
        for b in range(len(total) - 1):
            for a, g, offsets in packed:
                parts_a.append(a[offsets[b] : offsets[b + 1]])
                parts_g.append(g[offsets[b] : offsets[b + 1]])
        return torch.cat(parts_a), torch.cat(parts_g), total

    def _pack_call(self, layer: Layer, a: Tensor, g: Tensor, several: bool) -> tuple[Tensor, Tensor, Tensor]:
        batch = self._batch
        assert batch is not None
        size, longest = batch.shape
        flat_a, flat_g = a.reshape(-1, layer.d_in), g.reshape(-1, layer.d_out)
        if a.dim() >= 3 and a.shape[0] != size and a.shape[1] == size and flat_a.shape[0] == size * longest:
            raise ModelError(
                f"layer '{layer.name}' reads inputs of shape {tuple(a.shape)}, positions before "
                f"sequences; only batch-first layers "
                "can be traced: leave it out with modules="
            )
        if flat_a.shape[0] == size * longest:
            if batch.rows is None:
                return flat_a, flat_g, batch.offsets
            if several and bool(flat_g.abs().sum(dim=1).index_fill(0, batch.rows, 0).any()):
                # A second forward over other sequences (a margin between two continuations) has a mask of its own.
                return flat_a, flat_g, torch.arange(size + 1, dtype=torch.int64) * longest
            return flat_a.index_select(0, batch.rows), flat_g.index_select(0, batch.rows), batch.offsets
        if a.dim() >= 2 and a.shape[0] == size and flat_a.shape[0] % size == 0:
            # One row a sequence (a pooler or classifier), or a second forward of another length: every row counts, and
            # rows that carry no gradient add nothing.
            per = flat_a.shape[0] // size
            return flat_a, flat_g, torch.arange(size + 1, dtype=torch.int64) * per
        raise ModelError(
            f"layer '{layer.name}' was called with inputs of shape {tuple(a.shape)}, whose rows "
            f"cannot be assigned to the "
            f"{size} sequences of {longest} positions (a routed expert?); leave it out with modules="
        )

    # -- the pass ------------------------------------------------------------------------------------------------------

    def run(self, batch: TokenBatch, consumer: Consumer, loss: str = "train") -> float:
        """One forward and backward over ``batch``; returns the summed loss.

        Args:
            batch: from :meth:`PreparedExamples.batch`.
            consumer: receives every layer once.
            loss: ``"train"`` (the data's labels), ``"sampled"`` (labels drawn from the model) or ``"measurement"``.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            ModelError: a layer cannot be traced in this pass.
        """
        self._start(batch, consumer)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                value = self._loss(batch, loss)
                if self._skipped_without_grad and not self._grad_from_embedding:
                    self._grad_from_embedding = True  # reentrant checkpointing: start the graph at the embedding
                    self._start(batch, consumer)
                    value = self._loss(batch, loss)
                if not value.requires_grad:
                    raise ModelError("the loss does not depend on any traced layer; check modules= and the task")
                self._check_loss(value, batch)
                if not self.groups.of_layer:
                    self._learn_groups()
                self._in_backward = True
                value.backward()
            if self._failure is not None:
                raise self._failure
            for layer in self.selection.layers:
                if self._pending.get(layer.name):
                    self._deliver(layer)
            self._check_gradients(batch, loss)
            return float(value.detach())
        finally:
            self._stop()

    def _learn_groups(self) -> None:
        seen: dict[str, tuple[int, bool]] = {}
        identities: dict[tuple[Any, ...], int] = {}
        for layer in self.selection.layers:
            calls = self._calls.get(layer.name, [])
            # Under a reentrant checkpoint no call is seen before the backward: each layer then stands alone.
            key = tuple((c.inputs.data_ptr(), c.inputs.shape, c.inputs.stride(), c.inputs.dtype) for c in calls)
            seen[layer.name] = (identities.setdefault(key or (layer.name,), len(identities)), layer.bias)
        self.groups.learn(seen)

    def _start(self, batch: TokenBatch, consumer: Consumer) -> None:
        self._batch, self._consumer = batch, consumer
        self._calls.clear()
        self._pending.clear()
        self._seen_groups.clear()
        self._delivered.clear()
        self._sums.clear()
        self._input_sums.clear()
        self._skipped_without_grad = False
        self._in_backward = False
        self._failure = None

    def _stop(self) -> None:
        self._batch = self._consumer = None
        self._calls.clear()
        self._pending.clear()

    def _loss(self, batch: TokenBatch, loss: str) -> Tensor:
        if loss == "measurement":
            return self.task.measurement(self.model, batch.inputs)
        return self.task.train_loss(self.model, batch.inputs, sample=loss == "sampled")

    # -- non-finite values ---------------------------------------------------------------------------------------------

    def _check_loss(self, value: Tensor, batch: TokenBatch) -> None:
        if value.dim() != 0:
            raise ModelError(
                f"the task returned a loss of shape {tuple(value.shape)}; it must be one scalar, summed over the batch"
            )
        if bool(torch.isfinite(value)):
            return
        for name, calls in self._calls.items():
            for call in calls:
                example = _first_bad_row(call.inputs, batch)
                if example is not None:
                    raise NonFiniteError(
                        f"the input of layer '{name}' is not finite for example {example}; "
                        "check that example, or run the model in a wider dtype"
                    )
        raise NonFiniteError(
            f"the loss is {float(value)} although every traced input is finite (examples {batch.indices[0]} and "
            f"{len(batch.indices) - 1} others); the model overflows after its last traced layer: use a wider dtype"
        )

    def _check_gradients(self, batch: TokenBatch, loss: str) -> None:
        sums = [*self._sums.values(), *self._input_sums.values()]
        if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
            return
        inputs = [n for n, s in self._input_sums.items() if not bool(torch.isfinite(s))]
        grads = [n for n, s in self._sums.items() if not bool(torch.isfinite(s))]
        # The backward meets the layers last to first: the first bad gradient is the cause, as is the last bad input.
        finder = _NonFiniteFinder(inputs[-1] if inputs else grads[0], bool(inputs), batch)
        self._start(batch, finder)
        with torch.enable_grad():
            value = self._loss(batch, loss)
            self._in_backward = True
            value.backward()
        for layer in self.selection.layers:
            if self._pending.get(layer.name):
                self._deliver(layer)
        what = "input" if inputs else "gradient at the output"
        example = "" if finder.example is None else f" for example {finder.example}"
        raise NonFiniteError(
            f"the {what} of layer '{finder.name}' is not finite{example}; run the model in a wider dtype"
        )


def _first_bad_row(values: Tensor, batch: TokenBatch) -> int | None:
    """The example behind the first non-finite row, if any."""
    if values.dim() < 2 or bool(torch.isfinite(values).all()):
        return None
    bad = ~torch.isfinite(values.reshape(values.shape[0], -1)).all(dim=1)
    row = int(bad.nonzero()[0])
    size, longest = batch.shape
    position = row if values.shape[0] == size else row // longest
    return batch.indices[min(position, size - 1)]


class _NonFiniteFinder(Consumer):
    """Finds the example behind a layer's non-finite input or gradient."""

    def __init__(self, name: str, in_input: bool, batch: TokenBatch) -> None:
        self.name, self._in_input, self._batch = name, in_input, batch
        self.example: int | None = None

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        if layer.name != self.name:
            return
        bad = (~torch.isfinite(a if self._in_input else g)).any(dim=1).nonzero()
        if bad.numel():
            sequence = int(torch.searchsorted(offsets, int(bad[0]), right=True)) - 1
            self.example = self._batch.indices[sequence]


@dataclass
class CapturedBatch:
    """What one batch left in the traced layers: inputs by group, output gradients by layer."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, Tensor] = field(default_factory=dict)
    rotated: bool = False  # in the layers' eigenbases (a bias has become a column of the inputs), not as captured

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for part in (self.inputs, self.grads) for t in part.values())


class Recorder(Consumer):
    """A consumer that keeps everything and passes it on."""

    def __init__(self, then: Consumer | None = None) -> None:
        self.captured, self._then = CapturedBatch(), then

    def consume(self, layer: Layer, group: str, first: bool, a: Tensor, g: Tensor, offsets: Tensor) -> None:
        """Take one layer of one batch."""
        if first:
            self.captured.inputs[group] = a
        self.captured.grads[layer.name] = g
        self.captured.offsets[layer.name] = offsets
        if self._then is not None:
            self._then.consume(layer, group, first, a, g, offsets)
