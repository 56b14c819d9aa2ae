"""What commands on a store share: options, loading, the attributors of rows and of exact scores, prefilters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import pyinf
from pyinf.cli._job import _examples
from pyinf.cli._options import option
from pyinf.cli._terminal import Screen
from pyinf.data import Examples, load_model, load_tokenizer
from pyinf.data.batching import prepare
from pyinf.errors import ArtifactError, ConfigError
from pyinf.methods.identity import data_fingerprint
from pyinf.store.prefilter import BM25Prefilter, EmbeddingPrefilter, Prefilter, hidden_states
from pyinf.store.reader import Store

__all__ = [
    "attributor_for",
    "check_prefilter",
    "count_or_share",
    "exact_attributor",
    "examples_of",
    "load",
    "make_prefilter",
    "tokenizer_of",
]

PREFILTERS = ("bm25", "embedding")
_EXACT = "Exact scores"

Directory = Annotated[Path, typer.Argument(help="Folder of a store.")]
Fit = Annotated[
    Path | None, option("--fit", help="Folder of a pyinf fit whose factors are used.", panel=_EXACT, exists=True)
]
TrainOfStore = Annotated[
    str | None, option("--train", help="The training data of the store: gives exact scores.", panel=_EXACT)
]
Rescore = Annotated[
    float | None,
    option("--rescore", help="Compute the best again: a share of the store (0.01), or a number.", panel=_EXACT),
]
Recall = Annotated[
    float | None, option("--recall", help="Compute as many again as this recall at k takes: 0.95.", panel=_EXACT)
]
RescoreMethod = Annotated[str, option("--rescore-method", help="Which exact scores: ekfac, ekfac_cg, …", panel=_EXACT)]
Sample = Annotated[
    int | None, option("--sample", min=0, help="Examples with exact scores that measure recall.", panel=_EXACT)
]
RecallBy = Annotated[
    str, option("--recall-by", help="--recall holds for low, the interval's end, or value.", panel=_EXACT)
]
Most = Annotated[
    float, option("--most", help="The most that --recall may compute: a share, or a number.", panel=_EXACT)
]
ExactDamping = Annotated[
    float | None, option("--damping", help="Of the exact scores; the store's if not given.", panel=_EXACT)
]
Coarse = Annotated[
    bool, option("--coarse", help="Scan 1bit rows by the signs of the queries: faster, less exact.", panel=_EXACT)
]


def load(options: dict[str, Any], screen: Screen) -> Any:
    """The model that the options describe."""
    screen.say(f"loading {options['model']}")
    return load_model(
        options["model"],
        adapter=options.get("adapter"),
        dtype=options["dtype"],
        device=options["device"],
        trust_remote_code=options.get("trust_remote_code", False),
        revision=options.get("revision"),
    )


def tokenizer_of(options: dict[str, Any]) -> Any:
    """The tokenizer that was named, or the model's own, or None where it has none."""
    name = options.get("tokenizer")
    trust = options.get("trust_remote_code", False)
    return load_tokenizer(name or options["model"], required=name is not None, trust_remote_code=trust)


def examples_of(options: dict[str, Any], model: Any, which: str, screen: Screen) -> Examples:
    """``"train"`` or ``"queries"`` as the options describe them; what there is to note about them is said."""
    data = _examples(options, which, tokenizer_of(options), model)
    for note in data.notes:
        screen.say(note)
    return data


def count_or_share(value: float | None) -> float | int | None:
    """A share below 1, or a number of rows."""
    if value is None or value < 1:
        return value
    if value != int(value):
        raise ConfigError(f"{value} is neither a share below 1 nor a number of rows")
    return int(value)


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


def exact_attributor(
    store: Store,
    model: Any,
    train: Examples,
    method: str,
    damping: float | None,
    fit: Path | None,
    batch_size: int | None,
    **options: Any,
) -> pyinf.Attributor:
    """For exact scores of a store's rows: factors of an earlier fit, or fitted now and kept beside the store.

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
        run_dir=None if fit is not None else store.directory.with_name(f"{store.directory.name}.{method}"),
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
