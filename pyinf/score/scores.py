"""Scores: the result of an attribution, with its metadata and its place on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError

__all__ = ["SCORES_FORMAT", "SCORES_VERSION", "Scores"]

SCORES_FORMAT = "pyinf.scores"
SCORES_VERSION = 1


@dataclass
class Scores:
    """Influence of every training example on every query, ``τ(q, i) = Σ_layers ⟨H⁻¹∇f_q, G_i⟩``.

    Positive = a proponent: giving the example more weight lowers the query's loss.

    Attributes:
        values: float32 (float64 for a float64 model) ``[Q, N]``; ``[Q, N, T]`` per token of the training example (zero
            where it has none);
            ``{layer: [Q, N]}`` per module; None when only the top k were kept.
        certificate: None, or one mapping a query: how well its inverse was solved and how that was measured.
        meta: method, damping, seconds by stage, plan, counts, captured energy of low-rank queries.
        kept: ``(values, indices)`` ``[Q, k]`` of the largest scores when only those were kept, else None.
    """

    values: Tensor | dict[str, Tensor] | None
    certificate: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    kept: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(Q, N)`` or ``(Q, N, T)``."""
        if self.values is None:
            return int(self.meta["queries"]), int(self.meta["train"])
        first = next(iter(self.values.values())) if isinstance(self.values, Mapping) else self.values
        return tuple(first.shape)

    def total(self) -> Tensor:
        """``[Q, N]``: summed over modules and tokens.

        Raises:
            ConfigError: only the top k were kept.
        """
        if self.values is None:
            raise ConfigError("only the top scores were kept (topk=…); score again without topk for the whole matrix")
        values = sum(self.values.values()) if isinstance(self.values, Mapping) else self.values
        assert isinstance(values, Tensor)
        return values.sum(dim=2) if values.dim() == 3 else values

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` strongest proponents: ``(values, indices)``, each ``[Q, k]``, descending; ``k`` is cut to N."""
        return self._extreme(k, largest=True)

    def bottomk(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` strongest opponents: ``(values, indices)``, each ``[Q, k]``, ascending."""
        return self._extreme(k, largest=False)

    def _extreme(self, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        if k < 1:
            raise ConfigError(f"k is {k}; it must be at least 1")
        if self.values is None and largest and self.kept is not None and k <= self.kept[0].shape[1]:
            return self.kept[0][:, :k], self.kept[1][:, :k]
        total = self.total()
        found = torch.topk(total, min(k, total.shape[1]), dim=1, largest=largest)
        return found.values, found.indices

    def to_pandas(self) -> Any:
        """A long table: query, train, score (and module or token where they were kept apart). Needs pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise ConfigError("to_pandas needs pandas; install it with: pip install 'pyinf[data]'") from None
        if self.values is None:
            assert self.kept is not None
            values, indices = self.kept
            query = torch.arange(values.shape[0]).repeat_interleave(values.shape[1])
            return pd.DataFrame({"query": query, "train": indices.reshape(-1), "score": values.reshape(-1)})
        if isinstance(self.values, Mapping):
            frames = [Scores(v).to_pandas().assign(module=name) for name, v in self.values.items()]
            return pd.concat(frames, ignore_index=True)
        grid = torch.meshgrid(*[torch.arange(n) for n in self.values.shape], indexing="ij")
        columns = dict(zip(("query", "train", "token"), (g.reshape(-1).numpy() for g in grid), strict=False))
        return pd.DataFrame({**columns, "score": self.values.reshape(-1).numpy()})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``scores.safetensors`` and a manifest to ``directory``."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        if isinstance(self.values, Mapping):
            tensors = {f"module:{name}": value for name, value in self.values.items()}
        elif self.values is not None:
            tensors = {"values": self.values}
        if self.kept is not None:
            tensors |= {"top_values": self.kept[0], "top_indices": self.kept[1]}
        info = artifacts.save_tensors(path / "scores.safetensors", tensors, None)
        fields = {"certificate": self.certificate, "meta": self.meta}
        artifacts.write_manifest(path, SCORES_FORMAT, SCORES_VERSION, fields, {"scores.safetensors": info})

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: missing, damaged or of another format version; names the file.
        """
        path = Path(directory)
        manifest = artifacts.read_manifest(path, SCORES_FORMAT, SCORES_VERSION)
        info = manifest["files"].get("scores.safetensors")
        if info is None:
            raise ArtifactError(f"{path}: the manifest lists no scores.safetensors; score again")
        tensors = artifacts.load_tensors(path / "scores.safetensors", info)
        kept = (tensors.pop("top_values"), tensors.pop("top_indices")) if "top_values" in tensors else None
        values: Any = tensors.get("values")
        if values is None and tensors:
            values = {name.removeprefix("module:"): value for name, value in tensors.items()}
            order = [name for name in (manifest.get("meta") or {}).get("modules", ()) if name in values]
            values = {name: values[name] for name in [*order, *(n for n in values if n not in order)]}
        return cls(values, manifest.get("certificate"), manifest.get("meta") or {}, kept)
