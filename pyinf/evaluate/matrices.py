"""Any score matrix on disk, from any library, checked for shape and orientation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pyinf import artifacts
from pyinf.errors import ArtifactError, ConfigError, DataError

__all__ = ["LAYOUTS", "load_matrix", "oriented"]

LAYOUTS = ("auto", "queries_by_train", "train_by_queries")


def load_matrix(
    path: str | os.PathLike[str], queries: int, train: int, layout: str = "auto", key: str | None = None
) -> np.ndarray:
    """A score matrix ``[queries, train]``, float64.

    Args:
        path: ``.npy``, ``.safetensors``, the folder of :meth:`pyinf.Scores.save`, or the run folder that contains one
            as ``scores/``.
        queries, train: the sizes it must have.
        layout: how the file has it. ``"auto"`` reads queries × train and refuses the transpose by name.
        key: which tensor of a ``.safetensors`` file; not needed where it holds one matrix.

    Raises:
        ArtifactError: missing, damaged, or of a kind that is not read (pickled arrays never are).
        DataError: wrong shape, NaN, or only the top scores were kept.
        ConfigError: unknown layout; or a square matrix, whose orientation must be said.
    """
    place = Path(path)
    if not place.exists():
        raise ArtifactError(f"{place} is missing; give a .npy or .safetensors file or a folder of saved scores")
    if place.is_dir():
        array = _from_folder(place)
    elif place.suffix == ".npy":
        try:
            array = np.load(place, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ArtifactError(f"{place} is no array that can be read without unpickling: {error}") from None
    elif place.suffix == ".safetensors":
        array = _from_safetensors(place, key)
    else:
        raise ArtifactError(f"{place}: files of kind '{place.suffix}' are not read; save the matrix as .npy")
    return oriented(array, queries, train, layout, str(place))


def _from_folder(place: Path) -> np.ndarray:
    home = place if (place / artifacts.MANIFEST_NAME).exists() else place / "scores"
    manifest = artifacts.read_manifest(home, "pyinf.scores", 1)
    info = manifest["files"].get("scores.safetensors")
    if info is None:
        raise ArtifactError(f"{home}: the manifest lists no scores.safetensors; score again")
    tensors = artifacts.load_tensors(home / "scores.safetensors", info)
    if "values" in tensors:
        values = tensors["values"].double()
        return (values.sum(2) if values.dim() == 3 else values).numpy()
    modules = [t.double() for name, t in tensors.items() if name.startswith("module:")]
    if not modules:
        raise DataError(f"{home} keeps only the top scores of each query; score again without --only-top")
    return sum(modules[1:], modules[0]).numpy()


def _from_safetensors(place: Path, key: str | None) -> np.ndarray:
    tensors = artifacts.load_tensors(place, None)
    matrices = [name for name, t in tensors.items() if t.dim() == 2]
    if key is None and len(matrices) != 1:
        raise ConfigError(
            f"{place} holds {len(matrices)} matrices ({', '.join(sorted(tensors))}); say which with key=…"
        )
    name = key if key is not None else matrices[0]
    if name not in tensors:
        raise ConfigError(f"{place} holds no tensor '{name}'; it has {', '.join(sorted(tensors))}")
    return tensors[name].double().numpy()


def oriented(array: Any, queries: int, train: int, layout: str = "auto", name: str = "scores") -> np.ndarray:
    """``array`` as a finite float64 ``[queries, train]``; see :func:`load_matrix`."""
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout '{layout}'; use one of {', '.join(LAYOUTS)}")
    values = np.asarray(array)
    if values.dtype.kind not in "fiu":
        raise DataError(f"{name} holds {values.dtype}, not numbers")
    values = values.astype(np.float64)
    wanted = (queries, train)
    if layout == "auto":
        if queries == train and values.shape == wanted:
            raise ConfigError(
                f"{name} is square, {values.shape}; say how it lies with layout queries_by_train or train_by_queries"
            )
        if values.shape == (train, queries):
            raise DataError(
                f"{name} has shape {values.shape}, training examples × queries; queries × training examples is needed: "
                "pass layout train_by_queries if it is meant"
            )
    elif layout == "train_by_queries":
        values = values.T
    if values.shape != wanted:
        raise DataError(
            f"{name} has shape {values.shape}; the bank has {queries} queries and {train} training examples, so it "
            f"must be {wanted}"
        )
    if not np.isfinite(values).all():
        q, i = (int(v) for v in np.argwhere(~np.isfinite(values))[0])
        raise DataError(f"{name} has {values[q, i]} for query {q} and training example {i}; scores must be finite")
    return values
