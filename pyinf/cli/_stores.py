"""What commands that read a store have in common: the attributors of its rows and of exact scores, prefilters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyinf
from pyinf.data import Examples
from pyinf.data.batching import prepare
from pyinf.errors import ArtifactError, ConfigError
from pyinf.methods.identity import data_fingerprint
from pyinf.store.prefilter import BM25Prefilter, EmbeddingPrefilter, Prefilter, hidden_states
from pyinf.store.reader import Store

__all__ = ["attributor_for", "check_prefilter", "exact_attributor", "make_prefilter", "normalise_of"]

PREFILTERS = ("bm25", "embedding")


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


def exact_attributor(
    store: Store,
    model: Any,
    train: Examples,
    method: str,
    damping: float | None,
    fit: Path | None,
    home: Path | None,
    batch_size: int | None,
    **options: Any,
) -> pyinf.Attributor:
    """For exact scores of a store's rows: factors of an earlier fit, or fitted now and kept in ``home``.

    Raises:
        ArtifactError: ``train`` is not what the store was built from.
    """
    if store.spec.data not in (None, data_fingerprint(prepare(train, "train", model))):
        raise ArtifactError(
            f"{store.directory} was built from other training data, or from the same read with other options; give "
            "both as they were"
        )
    meta = store.spec.meta
    own, mode = meta["damping"]
    attributor = pyinf.Attributor(
        model,
        method=method,
        modules=list(meta["modules"]),
        damping=own if damping is None else damping,
        damping_mode=mode,
        fisher=meta["fisher"],
        seed=meta["seed"],
        run_dir=home,
        **options,
    )
    if fit is not None and attributor.method.factors is not None:
        attributor.load_factors(fit / "fit" / "factors")
    else:
        attributor.fit(train, batch_size)
    attributor.run_dir = None  # the few scores of a second stage are not kept
    return attributor


def check_prefilter(name: str | None) -> None:
    """Raises ``ConfigError`` for a prefilter that there is none of."""
    if name not in (None, *PREFILTERS):
        raise ConfigError(f"unknown prefilter {name!r}; use {' or '.join(PREFILTERS)}")


def make_prefilter(name: str | None, model: Any, asked: Examples, train: Examples, store: Store) -> Prefilter | None:
    """The prefilter called ``name`` over a store's rows: BM25 of the texts, or the model's own hidden states."""
    if name is None:
        return None
    ordered = [train[int(i)] for i in store.ids]
    if name == "bm25":
        texts = [train.text(int(i)) for i in store.ids]
        return BM25Prefilter(asked, ordered, [asked.text(q) for q in range(len(asked))], texts)
    return EmbeddingPrefilter(hidden_states(model, asked, name="queries"), hidden_states(model, ordered))
