"""Other weights of the same model: checkpoints of a training run, and what its optimiser remembered."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError

__all__ = ["TensorSource", "checkpoint_weights", "layer_matrices", "load_named_tensors", "source_identity"]

TensorSource = str | os.PathLike[str] | Callable[[], Mapping[str, Tensor]] | Mapping[str, Tensor]


def load_named_tensors(source: TensorSource, what: str = "checkpoint") -> Mapping[str, Tensor]:
    """Tensors by name from a safetensors file, a directory of such files, a mapping, or a callable that gives one.

    Nothing is unpickled: a ``.pt`` or ``.bin`` file is refused.

    Raises:
        ArtifactError: no such file, or a damaged one; names it.
        ConfigError: something else altogether.
    """
    if callable(source):
        source = source()
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise ConfigError(f"a {kind} is no {what}; give a safetensors file, a directory of them, or a callable")
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ArtifactError(f"{path} holds no {what}: there is no safetensors file; save one with safetensors.torch")
    if files[0].suffix != ".safetensors":
        raise ArtifactError(f"{path} is no safetensors file; pickles are never read: save the {what} as safetensors")
    out: dict[str, Tensor] = {}
    for file in files:
        out |= artifacts.load_tensors(file)
    return out


def source_identity(sources: Sequence[TensorSource] | None) -> list[str] | None:
    """A fingerprint of what each source holds now, whatever it is called: an unfinished run goes on with these only."""
    if sources is None:
        return None
    return [artifacts.fingerprint_tensors(load_named_tensors(source)) for source in sources]


def _aliases(model: nn.Module) -> dict[int, tuple[Tensor, list[str]]]:
    """Every parameter once, with all the names it goes by."""
    out: dict[int, tuple[Tensor, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        out.setdefault(id(parameter), (parameter, []))[1].append(name)
    return out


@contextlib.contextmanager
def checkpoint_weights(model: nn.Module, source: TensorSource) -> Iterator[None]:
    """The model with the weights of a checkpoint; its own are put back afterwards, also after an error.

    Every parameter must be there under one of its names, in its shape; it is cast to the model's dtype and moved to its
    device. Buffers that the checkpoint has are taken from it too.

    Raises:
        ArtifactError: a parameter is missing, unknown or of another shape.
    """
    tensors = load_named_tensors(source)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    known, kept = set(buffers), []
    wanted: list[tuple[Tensor, Tensor]] = []
    for parameter, names in _aliases(model).values():
        known.update(names)
        name = next((n for n in names if n in tensors), None)
        if name is None:
            raise ArtifactError(f"the checkpoint has no parameter '{names[0]}'; give checkpoints of this very model")
        wanted.append((parameter, _fitting(name, tensors[name], parameter)))
    wanted += [(b, _fitting(n, tensors[n], b)) for n, b in buffers.items() if n in tensors]
    odd = sorted(set(tensors) - known)
    if odd:
        raise ArtifactError(
            f"the checkpoint has a parameter '{odd[0]}' that the model lacks; give checkpoints of this very model"
        )
    try:
        for own, value in wanted:
            kept.append((own, own.data))
            own.data = value
        yield
    finally:
        for own, value in kept:
            own.data = value


def _fitting(name: str, value: Tensor, own: Tensor) -> Tensor:
    if value.shape != own.shape:
        raise ArtifactError(
            f"the checkpoint's '{name}' has shape {tuple(value.shape)}, the model's {tuple(own.shape)}; "
            "give checkpoints of this very model"
        )
    return value.to(device=own.device, dtype=own.dtype, copy=True)


def layer_matrices(
    model: nn.Module, layers: Sequence, tensors: Mapping[str, Tensor], what: str = "second moment"
) -> dict[str, Tensor]:
    """Per-parameter values (an optimiser's second moments) as ``{layer: [d_out, d_in(+1)]}`` of the traced layers.

    Args:
        layers: traced layers (``pyinf.capture.Layer``); with a bias the last column is its.
        tensors: parameter name → values in the parameter's own shape.

    Raises:
        ArtifactError: a traced parameter has no entry, or one of another shape, or one below zero.
    """
    names = {id(parameter): aliases for parameter, aliases in _aliases(model).values()}

    def find(parameter: Tensor) -> Tensor:
        name = next((n for n in names[id(parameter)] if n in tensors), None)
        if name is None:
            raise ArtifactError(
                f"there is no {what} of parameter '{names[id(parameter)][0]}'; give one for every traced layer"
            )
        value = _fitting(name, tensors[name], parameter).detach()
        value = value.double() if parameter.dtype == torch.float64 else value.float()
        if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise ArtifactError(f"the {what} of parameter '{name}' is negative or not finite")
        return value

    out = {}
    for layer in layers:
        module = layer.modules[0]
        matrix = find(module.weight)
        if matrix.shape != (layer.d_out, layer.d_in):
            matrix = matrix.T  # Conv1D keeps its weight as [d_in, d_out]
        elif type(module).__name__ == "Conv1D":
            matrix = matrix.T  # … also where it is square
        out[layer.name] = (
            torch.cat([matrix, find(module.bias).unsqueeze(1)], dim=1) if layer.bias else matrix.contiguous()
        )
    return out
