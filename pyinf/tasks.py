"""What the training loss is and what is measured on a query.

A loss is the **sum** over the positions that carry a label (and over the sequences of the batch), never a mean: a mean
would weight sequences by their length and break the batch-size independence of every score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyinf.errors import ConfigError, DataError, ModelError

__all__ = ["Batch", "CausalLM", "LogOdds", "SequenceClassification", "Task", "summed_cross_entropy"]

Batch = Mapping[str, Any]
IGNORE = -100

# Nodes whose backward never reads the values they produced, so the logits' memory may take their own gradient.
_VALUE_FREE_NODES = frozenset(
    {
        "UnsafeViewBackward0",
        "ViewBackward0",
        "MmBackward0",
        "AddmmBackward0",
        "LinearBackward0",
        "ToCopyBackward0",
        "_ReshapeAliasBackward0",
        "MkldnnLinearBackward0",
    }
)
_CHUNK_ELEMENTS = 1 << 19


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(z)[y] with the gradient formed in the forward, chunk by chunk, in the logits' own memory if
    allowed.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, overwrite: bool) -> Tensor:
        grad = logits.data if overwrite else logits.detach().clone()
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        rows = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
        for start in range(0, logits.shape[0], rows):
            z = grad[start : start + rows]
            y = labels[start : start + rows]
            counted = y != IGNORE
            work = z if z.dtype in (torch.float32, torch.float64) else z.float()
            target = y.clamp(min=0).unsqueeze(1)
            work.sub_(work.amax(dim=1, keepdim=True))
            picked = work.gather(1, target).squeeze(1)
            work.exp_()
            norm = work.sum(dim=1, keepdim=True)
            losses = norm.squeeze(1).log() - picked
            # torch.where, not a product: 0 · NaN would leak the losses of uncounted positions.
            total += torch.where(counted, losses, torch.zeros_like(losses)).sum(dtype=torch.float64)
            work.div_(norm)
            work.scatter_add_(1, target, torch.full_like(target, -1, dtype=work.dtype))
            work.masked_fill_(~counted.unsqueeze(1), 0)
            if work is not z:
                z.copy_(work)
        ctx.save_for_backward(grad)
        return total.to(torch.float32 if logits.dtype != torch.float64 else torch.float64)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        upstream = grads[0].to(grad.dtype)
        return grad.mul_(upstream) if upstream.item() != 1.0 else grad, None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor, overwrite: bool = False) -> Tensor:
    """Sum of token cross-entropies, ``Σ_t −log softmax(z_t)[y_t]`` over positions with ``y_t ≠ −100``.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]`` int64, −100 = ignored.
        overwrite: the caller reads the logits no more: their memory takes their gradient, unless autograd needs them.

    Returns:
        A scalar (fp32, or fp64 for fp64 logits); differentiable once.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    if not flat.requires_grad:
        return nn.functional.cross_entropy(flat.float(), labels.reshape(-1), ignore_index=IGNORE, reduction="sum")
    node, safe = logits.grad_fn, overwrite
    for _ in range(3):  # walk through views down to the product that made the logits
        if node is None:
            break
        if node.name() not in _VALUE_FREE_NODES:
            safe = False
            break
        if node.name() in ("MmBackward0", "AddmmBackward0", "LinearBackward0", "MkldnnLinearBackward0"):
            break
        node = node.next_functions[0][0] if node.next_functions else None
    else:
        safe = False
    safe = safe and not logits.is_leaf and flat.data_ptr() == logits.data_ptr()
    return _SummedCrossEntropy.apply(flat, labels.reshape(-1), safe)


def _uniforms(keys: list[int], length: int, seed: int, device: torch.device) -> Tensor:
    """One uniform per position, a function of (seed, key of the example, position): batches, order and padding do not
    matter.
    """
    generator = torch.Generator()
    rows = []
    for key in keys:
        generator.manual_seed((seed * 0x9E3779B1 + key * 0x85EBCA77 + 0x165667B1) % (1 << 63))
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(device)


def _draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw from softmax(logits) ``[..., V]`` with one uniform each ``[...]``."""
    flat, u = logits.detach().reshape(-1, logits.shape[-1]), uniforms.reshape(-1)
    out = torch.empty(flat.shape[0], dtype=torch.int64, device=flat.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, flat.shape[1]))
    for start in range(0, flat.shape[0], rows):
        cdf = torch.softmax(flat[start : start + rows].double(), dim=-1).cumsum(-1)
        point = (u[start : start + rows] * cdf[:, -1]).unsqueeze(1)
        out[start : start + rows] = torch.searchsorted(cdf, point).squeeze(1).clamp(max=flat.shape[1] - 1)
    return out.reshape(uniforms.shape)


class Task:
    """A training loss and a measurement. Subclass it, or use :class:`CausalLM` and friends.

    Both methods get the model and a batch of tensors (``input_ids``, ``labels``, possibly ``attention_mask``,
    ``index``:
    the example numbers, ``draw``: a key of each example's content for random draws) and return a differentiable scalar
    that is a **sum over the batch's sequences** in which no sequence depends on another.

    ``fields`` names further integer fields of the examples that the task reads, each with the value that pads it;
    ``shifted`` says whether the label of position t+1 is predicted at t, so that a label at the first position is none.
    """

    name = "task"
    seed = 0
    fields: Mapping[str, int] = {}
    shifted = False

    @property
    def measures_labels(self) -> bool:
        """Whether a query without labels measures nothing: so with the training loss, not with a measurement of its
        own.
        """
        return type(self).measurement is Task.measurement

    def train_loss(self, model: nn.Module, batch: Batch, sample: bool = False) -> Tensor:
        """Summed training loss. With ``sample`` the labels are drawn from the model's own predictions (true Fisher)."""
        raise ConfigError(f"{type(self).__name__} defines no train_loss; override train_loss(model, batch, sample)")

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[..., V]`` and targets ``[...]`` (−100: not counted) with the training loss for cross-entropy.

        Only where the loss is that: from it the exact curvature is known. Define it in the class that defines
        ``train_loss``.
        """
        raise ConfigError(f"{type(self).__name__} defines no predictions; override predictions(model, batch)")

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is attributed on a query; the training loss unless overridden (positive scores lower it)."""
        return self.train_loss(model, batch)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the task in manifests."""
        return {"task": type(self).__name__}


def _model_inputs(batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch["input_ids"]}
    for key in ("attention_mask", "position_ids", "token_type_ids", "pixel_values", "inputs_embeds"):
        if batch.get(key) is not None:
            inputs[key] = batch[key]
    return inputs


def _logits(model: nn.Module, batch: Batch, **extra: Any) -> Tensor:
    inputs = _model_inputs(batch)
    try:
        output = model(**inputs, **extra)
    except TypeError as error:
        if not extra or "unexpected keyword" not in str(error):
            raise
        output = model(**inputs)  # a plain nn.Module that knows no use_cache
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"{type(model).__name__} returned {type(logits).__name__} instead of logits; "
            "give a model with a language-modelling head, or a pyinf.Task of your own"
        )
    return logits


class CausalLM(Task):
    """Next-token prediction: loss of position t is the cross-entropy of ``labels[t+1]``; labels of −100 are ignored."""

    name = "causal-lm"
    shifted = True

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and next-token targets; see :meth:`Task.predictions`."""
        labels = batch["labels"]
        if labels.dim() != 2:
            raise DataError(
                "a language-modelling loss needs one label a token; use "
                "task=SequenceClassification() for one label a sequence"
            )
        logits = _logits(model, batch, use_cache=False)
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise ModelError(
                f"next-token prediction needs [batch, positions, vocabulary] logits for "
                f"{tuple(labels.shape)} tokens, the model "
                f"returned {tuple(logits.shape)}; load it with AutoModelForCausalLM or give the matching task"
            )
        targets = torch.full_like(labels, IGNORE)
        targets[:, :-1] = labels[:, 1:]
        if batch.get("attention_mask") is not None:  # what a masked position predicts does not count
            targets.masked_fill_(batch["attention_mask"] == 0, IGNORE)
        return logits, targets

    def train_loss(self, model: nn.Module, batch: Batch, sample: bool = False) -> Tensor:
        """Summed training loss; see :meth:`Task.train_loss`."""
        logits, targets = self.predictions(model, batch)
        if sample:
            draw = _draw(logits, _uniforms(batch["draw"].tolist(), targets.shape[1], self.seed, logits.device))
            targets = torch.where(targets != IGNORE, draw, targets)
        return summed_cross_entropy(logits, targets, overwrite=True)


class LogOdds(CausalLM):
    """Measures ``log p(other) − log p(labels)`` of two continuations of one prompt, a margin rather than a loss.

    A query carries ``labels`` and ``other_input_ids`` / ``other_labels`` (same padding rules). As with a loss, training
    examples with a positive score lower the measurement, that is, they favour ``labels`` over ``other_labels``.
    """

    name = "log-odds"
    fields: Mapping[str, int] = {"other_input_ids": 0, "other_labels": IGNORE, "other_attention_mask": 0}

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is attributed on a query; see :meth:`Task.measurement`."""
        if batch.get("other_input_ids") is None:
            raise ConfigError(
                "LogOdds needs other_input_ids and other_labels in every query; add the second continuation"
            )
        mine = self.train_loss(model, batch)
        ids, labels = batch["other_input_ids"], batch["other_labels"]
        mask = batch.get("other_attention_mask")
        other = {**batch, "input_ids": ids, "labels": labels, "attention_mask": mask}
        return mine - self.train_loss(model, other)


class SequenceClassification(Task):
    """Classification of a whole sequence: cross-entropy of ``labels`` ``[B]`` under the model's ``[B, classes]``
    logits.
    """

    name = "sequence-classification"

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and class labels; see :meth:`Task.predictions`."""
        if batch["labels"].dim() != 1:
            raise DataError(
                "sequence classification needs one integer label an example; give every example a 'labels' field"
            )
        logits = _logits(model, batch)
        if logits.dim() != 2:
            raise ModelError(
                f"sequence classification needs [batch, classes] logits, the model returned {tuple(logits.shape)}; "
                "load it with AutoModelForSequenceClassification"
            )
        labels = batch["labels"]
        odd = ((labels >= logits.shape[1]) | ((labels < 0) & (labels != IGNORE))).nonzero()
        if odd.numel():
            row = int(odd[0])
            raise DataError(
                f"example {int(batch['index'][row])} has label {int(labels[row])}, the model has "
                f"{logits.shape[1]} classes"
            )
        return logits, labels

    def train_loss(self, model: nn.Module, batch: Batch, sample: bool = False) -> Tensor:
        """Summed training loss; see :meth:`Task.train_loss`."""
        logits, labels = self.predictions(model, batch)
        if sample:
            draw = _draw(logits, _uniforms(batch["draw"].tolist(), 1, self.seed, logits.device).squeeze(1))
            labels = torch.where(labels != IGNORE, draw, labels)
        return summed_cross_entropy(logits, labels, overwrite=True)
