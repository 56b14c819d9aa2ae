"""Kronecker factors of every traced layer: eigenbases, corrected eigenvalues, and the inverse they give."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf import artifacts, ops
from pyinf.errors import ArtifactError, ConfigError, NonFiniteError

__all__ = [
    "FACTORS_FORMAT",
    "FACTORS_VERSION",
    "Factors",
    "InputFactor",
    "LayerFactor",
    "absolute_damping",
    "check_damping",
]

FACTORS_FORMAT = "pyinf.factors"
FACTORS_VERSION = 1


def check_damping(damping: float, mode: str) -> None:
    """Refuse what cannot work: damping ≤ 0 or not finite, or an unknown mode."""
    if mode not in ("relative", "absolute"):
        raise ConfigError(f"unknown damping_mode '{mode}'; use 'relative' (times the mean eigenvalue) or 'absolute'")
    if not isinstance(damping, (int, float)) or isinstance(damping, bool) or not 0 < damping < float("inf"):
        raise ConfigError(f"damping is {damping}; it must be a finite number > 0 (0.1 is the usual choice)")


def absolute_damping(eigenvalues: Tensor, damping: float, mode: str, name: str = "?") -> float:
    """``λ``: ``damping · mean(Λ)``, or ``damping`` itself.

    Raises:
        NonFiniteError: the mean is zero or not finite, so that a relative λ would be too.
    """
    check_damping(damping, mode)
    if mode == "absolute":
        return float(damping)
    mean = float(eigenvalues.mean(dtype=torch.float64))
    if not 0 < mean < float("inf"):
        raise NonFiniteError(
            f"the mean eigenvalue of layer '{name}' is {mean}: its gradients vanish or overflow; "
            "leave the layer out (modules=) or use damping_mode='absolute'"
        )
    return damping * mean


@dataclass
class InputFactor:
    """Factor of one layer input, ``A = E[a aᵀ] = U diag(d) Uᵀ`` over counted positions; shared by all layers that read
    it.
    """

    basis: Tensor | None
    eigenvalues: Tensor | None
    rows: int

    def matrix(self) -> Tensor | None:
        """``A``, rebuilt from its decomposition."""
        if self.basis is None or self.eigenvalues is None:
            return None
        return (self.basis * self.eigenvalues) @ self.basis.T


@dataclass
class LayerFactor:
    """A layer's output-gradient factor ``S = E[g gᵀ]`` and its eigenvalues ``Λ`` ``[d_out, d_in(+1)]`` (mean over
    sequences).
    """

    group: str
    basis: Tensor | None
    eigenvalues: Tensor | None
    corrected: Tensor
    rows: int
    bias: bool

    def matrix(self) -> Tensor | None:
        """``S``, rebuilt from its decomposition."""
        if self.basis is None or self.eigenvalues is None:
            return None
        return (self.basis * self.eigenvalues) @ self.basis.T


@dataclass
class Factors:
    """Everything :meth:`ihvp` needs, for all layers.

    ``inputs`` holds one :class:`InputFactor` per distinct layer input, ``layers`` one :class:`LayerFactor` per layer.
    With
    ``kind`` ``ekfac`` the eigenvalues are corrected (George et al. 2018), with ``kfac`` they are the outer product of
    the
    factors' own times the mean sequence length, with ``diagonal`` the bases are the identity.
    """

    kind: str
    inputs: dict[str, InputFactor]
    layers: dict[str, LayerFactor]
    sequences: int
    tokens: int
    meta: dict[str, Any] = field(default_factory=dict)

    def ihvp(
        self, vectors: Mapping[str, Tensor], damping: float = 0.1, damping_mode: str = "relative"
    ) -> dict[str, Tensor]:
        """Inverse-Hessian-vector products ``U_S[(U_Sᵀ V U_A) ⊘ (Λ + λ)]U_Aᵀ``, layer by layer.

        Args:
            vectors: layer name → ``[Q, d_out, d_in(+1)]`` (or one ``[d_out, d_in(+1)]``); with a bias the last column
                is its.
            damping: ``λ = damping · mean(Λ)`` per layer, or λ itself with ``damping_mode="absolute"``.

        Returns:
            The same names, shapes and dtypes.

        Raises:
            ConfigError: unknown layer, wrong shape, damping ≤ 0.

        Source: Grosse et al. 2023, arXiv 2308.03296.
        """
        out = {}
        for name, V in vectors.items():
            if name not in self.layers:
                raise ConfigError(
                    f"no factors for layer '{name}'; these have been fitted: {', '.join(list(self.layers)[:4])}, …"
                )
            layer = self.layers[name]
            if V.dim() not in (2, 3) or V.shape[-2:] != layer.corrected.shape:
                raise ConfigError(
                    f"'{name}' takes [Q, {', '.join(map(str, layer.corrected.shape))}], got {tuple(V.shape)}"
                )
            lam = absolute_damping(layer.corrected, damping, damping_mode, name)
            work = V.to(layer.corrected.dtype).reshape(-1, *layer.corrected.shape)
            X = ops.precondition(work, layer.basis, self.inputs[layer.group].basis, layer.corrected, lam)
            out[name] = X.reshape(V.shape).to(V.dtype)
        return out

    def dampings(self, damping: float, damping_mode: str) -> dict[str, float]:
        """λ of every layer."""
        return {n: absolute_damping(layer.corrected, damping, damping_mode, n) for n, layer in self.layers.items()}

    def to(self, device: torch.device) -> Factors:
        """Move every tensor to ``device`` (in place)."""
        for factor in self.inputs.values():
            factor.basis = None if factor.basis is None else factor.basis.to(device)
            factor.eigenvalues = None if factor.eigenvalues is None else factor.eigenvalues.to(device)
        for layer in self.layers.values():
            layer.basis = None if layer.basis is None else layer.basis.to(device)
            layer.eigenvalues = None if layer.eigenvalues is None else layer.eigenvalues.to(device)
            layer.corrected = layer.corrected.to(device)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [t for f in self.inputs.values() for t in (f.basis, f.eigenvalues)]
        tensors += [t for f in self.layers.values() for t in (f.basis, f.eigenvalues, f.corrected)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    # -- disk ----------------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write safetensors and a manifest; the manifest comes last, so a killed save never looks complete."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        files, inputs, layers = {}, {}, {}
        for number, (name, factor) in enumerate(self.inputs.items()):
            file = f"input-{number:04d}.safetensors"
            tensors = {"basis": factor.basis, "eigenvalues": factor.eigenvalues}
            files[file] = artifacts.save_tensors(path / file, _present(tensors), None)
            inputs[name] = {"file": file, "rows": factor.rows}
        for number, (name, layer) in enumerate(self.layers.items()):
            file = f"layer-{number:04d}.safetensors"
            tensors = {"basis": layer.basis, "eigenvalues": layer.eigenvalues, "corrected": layer.corrected}
            files[file] = artifacts.save_tensors(path / file, _present(tensors), None)
            layers[name] = {
                "file": file,
                "group": layer.group,
                "rows": layer.rows,
                "bias": layer.bias,
                "shape": list(layer.corrected.shape),
            }
        fields = {
            "kind": self.kind,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "inputs": inputs,
            "layers": layers,
            "meta": self.meta,
        }
        artifacts.write_manifest(path, FACTORS_FORMAT, FACTORS_VERSION, fields, files)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], device: torch.device | str = "cpu") -> Factors:
        """Read factors; every file is held to its checksum.

        Raises:
            ArtifactError: missing, damaged, truncated or of another format version; names the file.
        """
        path = Path(directory)
        manifest = artifacts.read_manifest(path, FACTORS_FORMAT, FACTORS_VERSION)
        files = manifest["files"]
        try:
            inputs = {}
            for name, entry in manifest["inputs"].items():
                file = artifacts.resolve_file(path, entry["file"])
                tensors = artifacts.load_tensors(file, files[entry["file"]])
                inputs[name] = InputFactor(tensors.get("basis"), tensors.get("eigenvalues"), int(entry["rows"]))
            layers = {}
            for name, entry in manifest["layers"].items():
                file = artifacts.resolve_file(path, entry["file"])
                tensors = artifacts.load_tensors(file, files[entry["file"]])
                if list(tensors["corrected"].shape) != entry["shape"] or entry["group"] not in inputs:
                    raise ArtifactError(
                        f"{file}: shape or input group does not match the manifest; fit the factors again"
                    )
                layers[name] = LayerFactor(
                    entry["group"],
                    tensors.get("basis"),
                    tensors.get("eigenvalues"),
                    tensors["corrected"],
                    int(entry["rows"]),
                    bool(entry["bias"]),
                )
            factors = cls(
                str(manifest["kind"]),
                inputs,
                layers,
                int(manifest["sequences"]),
                int(manifest["tokens"]),
                dict(manifest["meta"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(
                f"{path}: the manifest lacks or garbles a field ({error}); fit the factors again"
            ) from None
        return factors.to(torch.device(device))


def _present(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if v is not None}
