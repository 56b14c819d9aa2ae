"""What commands that read a store have in common: the attributor that its rows belong to."""

from __future__ import annotations

from typing import Any

import pyinf
from pyinf.errors import ArtifactError
from pyinf.store.reader import Store

__all__ = ["attributor_for", "normalise_of"]


def attributor_for(store: Store, model: Any, **options: Any) -> pyinf.Attributor:
    """An attributor with the method and options that a store was built with. ``options`` are added."""
    meta = store.spec.meta
    try:
        damping, mode = meta["damping"]
        return pyinf.Attributor(
            model,
            method=meta["method"],
            modules=list(meta["modules"]),
            damping=damping,
            damping_mode=mode,
            fisher=meta["fisher"],
            seed=meta["seed"],
            **{key: value for key, value in meta["options"].items() if value is not None},
            **options,
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{store.directory} does not say how its rows were made ({error}); queries need a store that pyinf store "
            f"build or pyinf.store.build_store wrote"
        ) from error


def normalise_of(store: Store) -> str:
    """Stores keep norms where scores are divided by them."""
    return "norm" if store.spec.norms else "none"
