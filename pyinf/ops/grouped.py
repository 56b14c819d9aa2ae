"""Many small layers in one launch: the accumulating ops over lists of layers.

A model of a hundred million parameters has layers so small that launching a kernel for each costs more than running it.
Layers of one shape therefore go to the card together, through the Triton kernels of triton_kernels/grouped.py, once
those are verified on that card ("<op>_group" in verified.py) or where the backend "triton" is forced. Layers that read
one input are scored together in the same way. Everywhere else the lists are walked one layer at a time, each by
whichever backend serves it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from pyinf.errors import ConfigError
from pyinf.ops import registry, triton_backend
from pyinf.ops.api import need_accumulator
from pyinf.ops.verified import is_verified

__all__ = [
    "SMALL",
    "accumulate_covariance_group",
    "accumulate_squared_gradients_group",
    "is_small",
    "kernel_serves",
    "low_rank_scores_group",
    "shares_inputs",
]

SMALL = 1 << 22
"""Elements of an accumulator up to which a layer counts as small: above, one layer fills a card by itself."""


def is_small(accumulator: Tensor) -> bool:
    """Whether a layer with this accumulator is worth grouping: on a GPU, and of at most :data:`SMALL` elements."""
    return accumulator.is_cuda and accumulator.numel() <= SMALL


def _distinct(accumulators: Sequence[Tensor]) -> bool:
    """Whether no two layers add into one buffer: in one launch they would race."""
    return len({accumulator.data_ptr() for accumulator in accumulators}) == len(accumulators)


def kernel_serves(op: str, tensors: Sequence[Tensor]) -> bool:
    """Whether the grouped kernel takes these tensors of one layer: can run, and is verified or asked for by name."""
    if triton_backend.unavailable() or triton_backend.check_tensors(tensors[0], dtypes=(torch.float32,)):
        return False
    if triton_backend.check_tensors(*tensors[1:]) or any(x.dtype != tensors[1].dtype for x in tensors[2:]):
        return False
    if any(x.device != tensors[0].device or (x.numel() and x.stride(1) != 1) for x in tensors):
        return False
    if tensors[0].data_ptr() % 16:
        return False
    return _asked_for(op, tensors[0].device)


def accumulate_covariance_group(C: Sequence[Tensor], x: Sequence[Tensor], bias: Sequence[bool]) -> None:
    """``C_l += Σ_t x_lt x_ltᵀ`` for every layer l, in place; see :func:`pyinf.ops.accumulate_covariance`.

    C: one ``[d_l, d_l]`` (``[d_l+1, d_l+1]`` with a bias) a layer; x: one ``[N_l, d_l]`` a layer; lower triangles; sums
    over tokens. Raises ``ConfigError`` where the lists differ in length or shapes do not fit.
    """
    if not len(C) == len(x) == len(bias):
        raise ConfigError(f"one C, x and bias a layer; got {len(C)}, {len(x)} and {len(bias)}")
    together: dict[tuple, list[int]] = defaultdict(list)
    for layer, (accumulator, rows, has_bias) in enumerate(zip(C, x, bias, strict=True)):
        if rows.dim() != 2:
            raise ConfigError(f"x must be [N, d] for every layer; got {tuple(rows.shape)}")
        d = rows.shape[1] + bool(has_bias)
        need_accumulator("C", accumulator, (d, d), rows)
        aligned = accumulator.data_ptr() % 16 == 0
        key = (accumulator.shape, accumulator.stride(), aligned, rows.shape, rows.stride(), rows.dtype, has_bias)
        together[key].append(layer)
    for layers in together.values():
        first = layers[0]
        several = len(layers) > 1 and _distinct([C[i] for i in layers])
        several = several and not bias[first]  # the column of ones of a bias needs launches of its own
        if several and kernel_serves("accumulate_covariance", (C[first], x[first])):
            from pyinf.ops import triton_grouped

            triton_grouped.covariances([C[i] for i in layers], [x[i] for i in layers])
            continue
        for i in layers:
            torch.ops.pyinf.accumulate_covariance(C[i], x[i], bool(bias[i]), None)


def accumulate_squared_gradients_group(
    Lam: Sequence[Tensor], g: Sequence[Tensor], a: Sequence[Tensor], offsets: Tensor
) -> None:
    """``Λ_l += Σ_b (Σ_t g_lt a_ltᵀ)²`` for every layer l, in place; see
    :func:`pyinf.ops.accumulate_squared_gradients`.

    Lam: one ``[d_out_l, d_in_l]`` a layer; g ``[N, d_out_l]`` and a ``[N, d_in_l]``; one ``offsets [B+1]`` for all;
    sums over sequences. Raises ``ConfigError`` where the lists differ in length or shapes do not fit.
    """
    if not len(Lam) == len(g) == len(a):
        raise ConfigError(f"one Lam, g and a a layer; got {len(Lam)}, {len(g)} and {len(a)}")
    together: dict[tuple, list[int]] = defaultdict(list)
    for layer, (accumulator, left, right) in enumerate(zip(Lam, g, a, strict=True)):
        if left.dim() != 2 or right.dim() != 2 or left.shape[0] != right.shape[0]:
            raise ConfigError(f"g and a must be [N, d] with one N; got {tuple(left.shape)} and {tuple(right.shape)}")
        need_accumulator("Lam", accumulator, (left.shape[1], right.shape[1]), left, right)
        aligned = accumulator.data_ptr() % 16 == 0
        key = (accumulator.shape, accumulator.stride(), aligned, left.stride(), right.stride(), left.dtype)
        together[key].append(layer)
    for layers in together.values():
        first = layers[0]
        kept = (Lam[first], g[first], a[first])
        several = len(layers) > 1 and _distinct([Lam[i] for i in layers])
        if several and kernel_serves("accumulate_squared_gradients", kept):
            from pyinf.ops import triton_grouped

            triton_grouped.squared_gradients(
                [Lam[i] for i in layers], [g[i] for i in layers], [a[i] for i in layers], offsets
            )
            continue
        for i in layers:
            torch.ops.pyinf.accumulate_squared_gradients(Lam[i], g[i], a[i], offsets)


def _asked_for(op: str, device: torch.device) -> bool:
    """Whether the kernel of several layers is forced by name, or verified on this card where nothing is."""
    choice = registry.current_backend(op)
    if choice != "auto":
        return choice == "triton"
    return device.type == "cuda" and is_verified(f"{op}_group", torch.cuda.get_device_name(device), backend="triton")


def shares_inputs(x: Tensor) -> bool:
    """Whether it pays to hand over the layers that read the input x together: :func:`low_rank_scores_group` then has a
    kernel that reads it once (half precision only: float32 products take so long that the reads do not matter).
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or triton_backend.unavailable():
        return False
    if triton_backend.too_old_for("low_rank_scores") or triton_backend.check_tensors(x):
        return False
    return _asked_for("low_rank_scores", x.device)


def low_rank_scores_group(
    scores: Tensor,
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    a: Tensor,
    offsets: Tensor,
    per_token: bool = False,
) -> None:
    """``scores += Σ_l Σ_t Σ_r (g_lt·L_lqr)(R_lqr·a_t)`` over layers l that read one input a, in place.

    scores: ``[Q, B]``, or ``[Q, N]`` per token; layers: (g ``[N, d_out_l]``, L ``[Q, d_out_l, r]``, R ``[Q, r, d_in]``)
    each; a ``[N, d_in]``; ``offsets [B+1]``. Sums over tokens; see :func:`pyinf.ops.low_rank_scores`. Where
    :func:`shares_inputs` says so, layers of one rank are one launch with one read of a; elsewhere one after the other.
    Raises ``ConfigError`` where the shapes do not fit.
    """
    columns = a.shape[0] if per_token else offsets.numel() - 1
    for g, L, R in layers:
        fits = L.dim() == 3 and R.dim() == 3 and L.shape[0] == R.shape[0] and L.shape[2] == R.shape[1]
        fits = fits and (L.shape[1], R.shape[2]) == (g.shape[1], a.shape[1]) and g.shape[0] == a.shape[0]
        if not fits:
            sizes = ", ".join(str(tuple(x.shape)) for x in (g, a, L, R))
            raise ConfigError(f"g [N, d_out], a [N, d_in], L [Q, d_out, r] and R [Q, r, d_in] do not fit: got {sizes}")
        need_accumulator("scores", scores, (L.shape[0], columns), g, a)
    if len(layers) > 1 and shares_inputs(a):
        from pyinf.ops import triton_scores

        calls = [(scores, g, a, offsets, L, R, per_token) for g, L, R in layers]
        wins = registry.current_backend("low_rank_scores") != "auto" or all(
            triton_scores.prefers_low_rank(*call) for call in calls
        )
        if wins and not any(triton_scores.check_low_rank(*call) for call in calls):
            triton_scores.low_rank_scores_shared(scores, layers, a, offsets, per_token)
            return
    for g, L, R in layers:
        torch.ops.pyinf.low_rank_scores(scores, g, a, offsets, L, R, per_token)
