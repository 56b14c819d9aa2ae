"""Which layers are traced: discovery, selection by name or predicate, and what stays untraced and why."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from pyinf.errors import ModuleSelectionError

__all__ = ["Layer", "LayerSelection", "Modules", "select_layers"]

Modules = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

_BLOCK_INDEX = re.compile(r"(^|\.)\d+(\.|$)")
_ADAPTER = re.compile(r"(^|\.)lora_[AB](\.|$)")


@dataclass(frozen=True)
class Layer:
    """One traced weight ``[d_out, d_in]``: the modules that apply it (several when they share it) and its bias."""

    name: str
    modules: tuple[nn.Module, ...]
    d_in: int
    d_out: int
    bias: bool

    @property
    def columns(self) -> int:
        """``d_in``, plus one with a bias."""
        return self.d_in + int(self.bias)

    @property
    def numel(self) -> int:
        """Traced parameters of the layer."""
        return self.d_out * self.columns


@dataclass
class LayerSelection:
    """The traced layers and what the selection leaves out."""

    layers: list[Layer]
    total_parameters: int
    untraced: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [layer.name for layer in self.layers]

    @property
    def traced_parameters(self) -> int:
        """Parameters of the traced layers."""
        return sum(layer.numel for layer in self.layers)

    @property
    def share(self) -> float:
        """Traced share of all parameters of the model."""
        return self.traced_parameters / max(1, self.total_parameters)


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a supported layer, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None:
        return int(module.weight.shape[0]), int(module.nf)  # transformers.pytorch_utils.Conv1D: weight [d_in, d_out]
    return None


def _own_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _head_modules(model: nn.Module) -> set[int]:
    out = set()
    for getter in ("get_output_embeddings", "get_input_embeddings"):
        function = getattr(model, getter, None)
        if callable(function):
            try:
                module = function()
            except (NotImplementedError, AttributeError):
                module = None
            if module is not None:
                out.add(id(module))
    return out


def _matches(name: str, module: nn.Module, modules: Modules) -> bool:
    if callable(modules):
        return bool(modules(name, module))
    patterns = [modules] if isinstance(modules, str) else list(modules or ())
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def select_layers(model: nn.Module, modules: Modules = None) -> LayerSelection:
    """Find the layers to trace.

    Args:
        model: any module; nothing of it is changed.
        modules: None (every supported layer inside the model's blocks, not the embedding, not the head; for a PEFT
            model
            its LoRA A and B matrices), a glob, a list of globs or exact names, or a predicate on (name, module).

    Returns:
        The layers in the model's order. Modules sharing one weight are one layer, named after the first of them.

    Raises:
        ModuleSelectionError: nothing matched (nearest names are shown), or an unsupported module was asked for by name.
    """
    named = dict(model.named_modules(remove_duplicate=True))
    supported = {name: module for name, module in named.items() if name and _linear_shape(module) is not None}
    if modules is None:
        chosen = _default_selection(model, supported)
    else:
        chosen = [name for name, module in supported.items() if _matches(name, module, modules)]
        _refuse_unsupported(named, supported, modules)
    if not chosen:
        raise ModuleSelectionError(_nothing_matched(supported, modules))
    groups: dict[int, list[str]] = {}
    for name in chosen:
        weight = getattr(supported[name], "weight", None)
        groups.setdefault(id(weight) if weight is not None else id(supported[name]), []).append(name)
    layers = []
    for names in groups.values():
        members = tuple(supported[name] for name in names)
        shape = _linear_shape(members[0])
        assert shape is not None
        biases = {id(m.bias) for m in members if getattr(m, "bias", None) is not None}
        shares_bias = len(biases) == 1 and all(getattr(m, "bias", None) is not None for m in members)
        layers.append(Layer(names[0], members, shape[0], shape[1], shares_bias))
    total = sum(p.numel() for p in model.parameters())
    selection = LayerSelection(layers, total, _untraced(model, named, chosen) if modules is None else {})
    _warn_untraced(selection)
    return selection


def _default_selection(model: nn.Module, supported: dict[str, nn.Module]) -> list[str]:
    adapters = [name for name in supported if _ADAPTER.search(name) and _active(model, name)]
    if adapters:
        return adapters
    heads = _head_modules(model)
    inside = [name for name, module in supported.items() if id(module) not in heads]
    blocks = [name for name in inside if _BLOCK_INDEX.search(name) and _in_module_list(model, name)]
    return blocks or inside


def _active(model: nn.Module, name: str) -> bool:
    """Whether an adapter ``….lora_A.<adapter>`` is one that the forward applies."""
    owner, _, adapter = name.rpartition(".")
    active = getattr(model.get_submodule(owner.rpartition(".")[0]), "active_adapters", None)
    return not isinstance(active, (list, tuple)) or adapter in active


def _in_module_list(model: nn.Module, name: str) -> bool:
    module: nn.Module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return True
        module = getattr(module, part)
    return False


def _refuse_unsupported(named: dict[str, nn.Module], supported: dict[str, nn.Module], modules: Modules) -> None:
    if callable(modules):
        return
    for pattern in [modules] if isinstance(modules, str) else list(modules or ()):
        module = named.get(pattern)
        if module is not None and pattern not in supported and _own_parameters(module) > 0:
            raise ModuleSelectionError(
                f"layer '{pattern}' is a {type(module).__name__}, which cannot be traced; "
                "supported: nn.Linear and its subclasses, transformers Conv1D, PEFT LoRA matrices"
            )


def _nothing_matched(supported: dict[str, nn.Module], modules: Modules) -> str:
    if not supported:
        return "the model has no layer that can be traced (nn.Linear, transformers Conv1D or PEFT LoRA)"
    wanted = "the predicate" if callable(modules) else repr(modules)
    pattern = (
        modules if isinstance(modules, str) else (next(iter(modules), "") if isinstance(modules, (list, tuple)) else "")
    )
    near = difflib.get_close_matches(str(pattern).replace("*", ""), supported, n=3, cutoff=0.2) or list(supported)[:3]
    return f"no layer matched {wanted}; nearest names: {', '.join(near)}"


def _untraced(model: nn.Module, named: dict[str, nn.Module], chosen: list[str]) -> dict[str, int]:
    """Parameters inside the blocks that the default selection leaves out, by kind of module (adapters: not counted)."""
    if any(_ADAPTER.search(name) for name in chosen):
        return {}
    traced, counts = set(chosen), {}
    for name, module in named.items():
        if name in traced or not name or not _in_module_list(model, name):
            continue
        own = _own_parameters(module)
        if own:
            kind = type(module).__name__
            counts[kind] = counts.get(kind, 0) + own
    return counts


def _warn_untraced(selection: LayerSelection) -> None:
    # Norms are a vanishing share of every model; only what matters is worth a warning.
    heavy = {k: n for k, n in selection.untraced.items() if n > 0.001 * selection.total_parameters}
    if heavy:
        share = 100 * sum(heavy.values()) / selection.total_parameters
        listed = ", ".join(
            f"{kind} ({100 * n / selection.total_parameters:.1f} %)" for kind, n in sorted(heavy.items())
        )
        warnings.warn(
            f"{share:.1f} % of the parameters stand in block layers that cannot be traced: {listed}; "
            "scores leave them out",
            stacklevel=3,
        )
