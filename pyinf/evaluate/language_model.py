"""The ready protocols: a small Llama, pre-trained and fine-tuned on the spot on text that every Python carries."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyinf import artifacts, progress
from pyinf.data.small_llama import small_llama
from pyinf.errors import ArtifactError, ConfigError, DataError
from pyinf.evaluate.protocol import Protocol, Trained

__all__ = ["PROTOCOLS", "LanguageModelProtocol", "ready_protocol"]

_FORMAT = "pyinf.protocol"
_VERSION = 1


@dataclass
class LanguageModelProtocol(Protocol):
    """Fine-tuning of a causal language model on ``train_size`` sequences of ``length`` tokens, queries held out.

    The base model is trained first on other text of the library (``base_sequences``, ``base_epochs``), or read from
    ``base_model``. Fine-tuning starts from it with AdamW, a linear warm-up and a cosine to ``final_rate`` of the rate.
    The batches of an epoch are drawn for the whole training set from the seed, and examples that are left out are
    missing from theirs; the loss of a step is ``Σ_i counts[i] · (sum of token losses of i) / constant``, the constant
    being the expected number of counted tokens a batch, so that every counted token weighs the same throughout.
    ``loss`` of a query is its sum of token losses; ``margin`` is the log-odds of its last token.

    The first ``tuning_queries`` queries are for choosing damping; the others are the ones to report.

    Args:
        parameters: ``"all"``, or ``"linear"``: only the weights of the linear layers in the blocks, the ones that
            influence functions trace by default.
        layout: ``"passages"``: docstrings and functions, cut after ``length`` tokens, from a few modules, so that
            queries have relatives in the training set; ``"blocks"``: the text joined and cut every ``length`` tokens.
        text_file: JSON lines with ``text`` (or plain text lines) to use instead of the standard library.
        base_model: folder or hub name of a model to start from instead; brings its tokenizer.
        device: ``"cpu"``, ``"cuda"``, …
    """

    name: str = "small"
    train_size: int = 512
    query_size: int = 40
    tuning_queries: int = 10
    length: int = 64
    vocabulary: int = 512
    hidden: int = 64
    intermediate: int = 192
    layers: int = 4
    heads: int = 4
    base_sequences: int = 4096
    base_epochs: int = 5
    base_rate: float = 4e-3
    epochs: int = 5
    rate: float = 1e-3
    batch: int = 32
    weight_decay: float = 0.1
    beta2: float = 0.98
    warmup: float = 0.05
    final_rate: float = 0.0
    parameters: str = "all"
    layout: str = "passages"
    text_file: str | None = None
    base_model: str | None = None
    device: str = "cpu"
    data_seed: int = 0

    def __post_init__(self) -> None:
        if self.parameters not in ("all", "linear"):
            raise ConfigError(f"parameters is {self.parameters!r}; use 'all' or 'linear'")
        if self.layout not in ("passages", "blocks"):
            raise ConfigError(f"layout is {self.layout!r}; use 'passages' or 'blocks'")
        if not 0 <= self.tuning_queries < self.query_size:
            raise ConfigError(
                f"tuning_queries is {self.tuning_queries} of {self.query_size} queries; some must be left to report"
            )
        self._tokens: dict[str, Tensor] = {}
        self._base: nn.Module | None = None
        self._facts: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # settings travel to workers; data and model are read from the bank there

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def describe(self) -> dict[str, Any]:
        """All settings."""
        return {"protocol": "language model", **dataclasses.asdict(self)}

    # -- data and base model -------------------------------------------------------------------------------------------

    @property
    def train_tokens(self) -> Tensor:
        """``[N, length]`` int64."""
        return self._get("train")

    @property
    def query_tokens(self) -> Tensor:
        """``[Q, length]`` int64."""
        return self._get("queries")

    def _get(self, name: str) -> Tensor:
        if name not in self._tokens:
            raise ConfigError(
                f"protocol '{self.name}' is not prepared; make a Bank of it first, or call prepare(folder)"
            )
        return self._tokens[name]

    @property
    def facts(self) -> dict[str, Any]:
        """What was measured of the base model: its size and its loss a token."""
        return dict(self._facts)

    @property
    def tuning(self) -> list[int]:
        """Indices of the queries held out for choosing damping."""
        return list(range(self.tuning_queries))

    @property
    def reported(self) -> list[int]:
        """Indices of the queries to report."""
        return list(range(self.tuning_queries, self.query_size))

    def prepare(self, directory: Path) -> None:
        """Data and base model in ``directory``: read back where they are there, else made and saved.

        Raises:
            DataError: not enough text for the sizes asked for.
            ArtifactError: damaged, or made with other settings.
        """
        directory = Path(directory)
        if not (directory / artifacts.MANIFEST_NAME).exists():
            self._make(directory)
        manifest = artifacts.read_manifest(directory, _FORMAT, _VERSION)
        lines = artifacts.differences(manifest["settings"], json.loads(json.dumps(self._base_settings())))
        if lines:
            raise ArtifactError(
                f"{directory} was made with other settings ({'; '.join(lines[:5])}); use another folder"
            )
        files = manifest["files"]
        self._tokens = artifacts.load_tensors(directory / "tokens.safetensors", files["tokens.safetensors"])
        for name, info in files.items():
            if name != "tokens.safetensors" and artifacts.sha256_file(directory / name) != info["sha256"]:
                raise ArtifactError(f"{directory / name} is damaged: its checksum does not match; delete {directory}")
        self._base = _load(directory / "model").to(self.device)
        self._facts = manifest["facts"]

    def _base_settings(self) -> dict[str, Any]:
        """What data and base model depend on; the recipe of the fine-tuning does not matter to them."""
        names = (
            "train_size query_size length vocabulary hidden intermediate layers heads base_sequences base_epochs "
            "base_rate layout text_file base_model data_seed"
        ).split()
        return {name: getattr(self, name) for name in names}

    def _make(self, directory: Path) -> None:
        with progress.stage("data of the protocol", None, "sequences") as stage:
            ids, groups, tokenizer = self._sequences()
            stage.advance(len(ids))
        train, queries, base = self._split(ids, groups)
        model = self._new_model(len(tokenizer))
        if self.base_epochs and self.base_model is None:
            counts = np.ones(len(base), dtype=np.int64)
            with progress.stage("base model", self.base_epochs * math.ceil(len(base) / 32), "steps") as stage:
                recipe = {"epochs": self.base_epochs, "rate": self.base_rate, "batch": 32, "weight_decay": 0.1}
                fit_model(
                    model, base, counts, seed=self.data_seed, beta2=0.98, after_step=lambda: stage.advance(1), **recipe
                )
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
        files = {
            f"model/{p.name}": {"sha256": artifacts.sha256_file(p), "bytes": p.stat().st_size}
            for p in sorted((directory / "model").iterdir())
        }
        tensors = {"train": train, "queries": queries}
        files["tokens.safetensors"] = artifacts.save_tensors(directory / "tokens.safetensors", tensors, None)
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "base_loss_on_train": float(sequence_losses(model, train).mean()) / (self.length - 1),
            "base_loss_on_queries": float(sequence_losses(model, queries).mean()) / (self.length - 1),
        }
        fields = {"settings": self._base_settings(), "facts": facts}
        artifacts.write_manifest(directory, _FORMAT, _VERSION, fields, files)

    def _sequences(self) -> tuple[list[list[int]], list[str], Any]:
        """Token sequences of equal length, what each is from, and the tokenizer."""
        from pyinf.data.library_text import standard_library_passages, train_tokenizer

        if self.text_file is not None:
            rows = _read_texts(Path(self.text_file))
            texts, origins = rows, [self.text_file] * len(rows)
        else:
            passages = standard_library_passages()
            if self.layout == "passages":
                random.Random(self.data_seed).shuffle(passages)
            texts, origins = [p.text for p in passages], [p.origin.split(".")[0] for p in passages]
        if self.base_model is not None:
            from pyinf.data import load_tokenizer

            tokenizer = load_tokenizer(self.base_model, required=True)
        else:
            tokenizer = train_tokenizer(texts[: max(3000, len(texts) // 4)], self.vocabulary)
        encoded = tokenizer(texts)["input_ids"]
        if self.layout == "blocks":
            stream = [token for sequence in encoded for token in sequence]
            blocks = [stream[i : i + self.length] for i in range(0, len(stream) - self.length + 1, self.length)]
            return blocks, ["text"] * len(blocks), tokenizer
        kept = [(ids[: self.length], origin) for ids, origin in zip(encoded, origins, strict=True)]
        kept = [(ids, origin) for ids, origin in kept if len(ids) == self.length]
        return [ids for ids, _ in kept], [origin for _, origin in kept], tokenizer

    def _split(self, ids: list[list[int]], groups: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Training set and queries from the same few groups (modules), base text from the others."""
        rng = random.Random(self.data_seed)
        wanted = self.train_size + self.query_size
        sizes = Counter(groups)
        names = sorted(sizes)
        rng.shuffle(names)
        if len(names) > 1:
            chosen, total = set(), 0
            for name in names:
                if total >= wanted:
                    break
                if 12 <= sizes[name] <= 60:  # enough relatives for a query, and no module that is most of the set
                    chosen.add(name)
                    total += sizes[name]
            inside = [i for i, g in enumerate(groups) if g in chosen]
            outside = [i for i, g in enumerate(groups) if g not in chosen]
        else:
            order = list(range(len(ids)))
            rng.shuffle(order)
            inside, outside = order[:wanted], order[wanted:]
        rng.shuffle(inside)
        rng.shuffle(outside)
        needs_base = self.base_model is None and self.base_epochs > 0
        if len(inside) < wanted or (needs_base and len(outside) < min(self.base_sequences, 32)):
            raise DataError(
                f"the text gives {len(inside)} sequences of {self.length} tokens for the training set and queries and "
                f"{len(outside)} for the base model; {wanted} and {self.base_sequences} are wanted: lower the sizes or "
                "the length, or give more text"
            )
        table = torch.tensor(ids, dtype=torch.long)
        return (
            table[inside[: self.train_size]],
            table[inside[self.train_size : wanted]],
            table[outside[: self.base_sequences]],
        )

    def _new_model(self, vocabulary: int) -> nn.Module:
        if self.base_model is not None:
            from pyinf.data import load_model

            return load_model(self.base_model, dtype="float32", device=self.device)
        return small_llama(
            vocabulary,
            hidden=self.hidden,
            intermediate=self.intermediate,
            layers=self.layers,
            heads=self.heads,
            positions=2 * self.length,
            seed=self.data_seed,
            name=f"Llama of protocol {self.name}",
            device=self.device,
        )

    # -- training and measurement --------------------------------------------------------------------------------------

    def fresh(self) -> nn.Module:
        """A copy of the base model."""
        import copy

        if self._base is None:
            raise ConfigError(f"protocol '{self.name}' is not prepared; make a Bank of it first")
        return copy.deepcopy(self._base)

    def train(self, counts: np.ndarray, seed: int) -> Trained:
        """Fine-tune from the base model; see the class."""
        model = self.fresh()
        loss = fit_model(
            model,
            self.train_tokens,
            counts,
            seed=seed,
            epochs=self.epochs,
            rate=self.rate,
            batch=self.batch,
            weight_decay=self.weight_decay,
            beta2=self.beta2,
            warmup=self.warmup,
            final_rate=self.final_rate,
            parameters=self.parameters,
        )
        return Trained(model, loss)

    def measure(self, model: Any) -> Mapping[str, np.ndarray]:
        """``loss``: summed token losses; ``margin``: log-odds of the last token against the best other."""
        loss, margin = query_measurements(model, self.query_tokens)
        return {"loss": loss, "margin": margin}

    def save_model(self, model: Any, directory: Path) -> None:
        """As a transformers folder, with the tokenizer of the base."""
        model.save_pretrained(directory)


def fit_model(
    model: nn.Module,
    tokens: Tensor,
    counts: np.ndarray,
    *,
    seed: int,
    epochs: int,
    rate: float,
    batch: int,
    weight_decay: float,
    beta2: float,
    warmup: float = 0.05,
    final_rate: float = 0.0,
    parameters: str = "all",
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Train ``model`` in place on ``tokens`` ``[N, T]`` with weights ``counts`` ``[N]``; see
    :class:`LanguageModelProtocol`. Returns the mean token loss of the last epoch.
    """
    device = next(model.parameters()).device
    weights = torch.as_tensor(np.asarray(counts), dtype=torch.float32)
    n, length = tokens.shape
    if weights.shape != (n,) or float(weights.min()) < 0 or float(weights.sum()) == 0:
        raise DataError(
            f"counts must be {n} numbers, not negative and not all 0; their shape is {tuple(weights.shape)}"
        )
    chosen = [p for name, p in model.named_parameters() if parameters == "all" or name.endswith("proj.weight")]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen, lr=rate, betas=(0.9, beta2), weight_decay=weight_decay)
    steps = epochs * math.ceil(n / batch)
    warm = max(1, int(warmup * steps))
    normaliser = float(weights.sum()) / n * batch * (length - 1)
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens.to(device)
    step, last = 0, torch.zeros((), dtype=torch.float64)
    model.train()
    for epoch in range(epochs):
        for rows in torch.randperm(n, generator=generator).split(batch):
            along = (step - warm) / max(1, steps - warm)
            factor = (
                (step + 1) / warm
                if step < warm
                else final_rate + (1 - final_rate) * (1 + math.cos(math.pi * along)) / 2
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            step += 1
            rows = rows[weights[rows] > 0]
            if len(rows) == 0:
                continue
            ids = tokens[rows.to(device)]
            loss = (token_losses(model, ids).sum(1) * weights[rows].to(device)).sum()
            optimizer.zero_grad(set_to_none=True)
            (loss / normaliser).backward()
            optimizer.step()
            if epoch == epochs - 1:
                last += loss.detach().double().cpu()
            after_step()
    for p in model.parameters():
        p.requires_grad_(True)
    model.eval()
    return float(last) / (float(weights.sum()) * (length - 1))


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token cross-entropies ``[B, T − 1]`` of token ids ``[B, T]``."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    flat = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
    return flat.reshape(len(ids), -1)


@torch.no_grad()
def sequence_losses(model: nn.Module, tokens: Tensor, batch: int = 128) -> Tensor:
    """Sum of token losses of each sequence: ``[N, T]`` → ``[N]``."""
    device = next(model.parameters()).device
    return torch.cat([token_losses(model, ids.to(device)).sum(1).cpu() for ids in tokens.split(batch)])


@torch.no_grad()
def query_measurements(model: nn.Module, tokens: Tensor, batch: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss of each query, and the log-odds of its last token against the best other token: two ``[Q]``."""
    device = next(model.parameters()).device
    losses, margins = [], []
    for ids in tokens.split(batch):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits.double()
        flat = functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
        )
        losses.append(flat.reshape(len(ids), -1).sum(1).cpu())
        last, target = logits[:, -2].clone(), ids[:, -1:]
        right = last.gather(1, target).squeeze(1)
        last.scatter_(1, target, -math.inf)
        margins.append((right - last.amax(1)).cpu())
    return torch.cat(losses).numpy(), torch.cat(margins).numpy()


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _read_texts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {path}: {error}") from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix in (".jsonl", ".json"):
            try:
                row = json.loads(line)
                texts.append(str(row["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: expected an object with 'text' ({error!r})") from None
        else:
            texts.append(line)
    if not texts:
        raise DataError(f"{path} holds no text")
    return texts


_QUICK = {
    "name": "quick",
    "train_size": 48,
    "query_size": 8,
    "tuning_queries": 2,
    "length": 24,
    "vocabulary": 384,
    "hidden": 24,
    "intermediate": 48,
    "layers": 2,
    "heads": 2,
    "base_sequences": 256,
    "base_epochs": 2,
    "base_rate": 1e-2,
    "epochs": 3,
    "rate": 5e-3,
    "batch": 16,
}
_GPU = {
    "name": "gpu",
    "train_size": 4096,
    "query_size": 60,
    "length": 256,
    "vocabulary": 16384,
    "hidden": 768,
    "intermediate": 2048,
    "layers": 12,
    "heads": 12,
    "base_sequences": 100_000,
    "base_epochs": 3,
    "base_rate": 6e-4,
    "epochs": 4,
    "rate": 2e-4,
    "batch": 256,
    "layout": "blocks",
    "device": "cuda",
}

# name -> (what it is, settings that differ from the defaults)
PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "quick": ("every step in seconds, for tests; scores mean little", _QUICK),
    "small": ("a small Llama on a two-core CPU: meant for 100 half subsets and more", {}),
    "gpu": ("GPT-2-sized, for one GPU; not measured yet", _GPU),
}


def ready_protocol(name: str, **changes: Any) -> LanguageModelProtocol:
    """One of the ready protocols (``quick``, ``small``, ``gpu``), with settings of yours on top.

    Raises:
        ConfigError: unknown name or setting; lists what there is.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"unknown protocol '{name}'; ready ones: {', '.join(PROTOCOLS)}")
    known = {f.name: f for f in dataclasses.fields(LanguageModelProtocol)}
    for key in changes:
        if key not in known:
            raise ConfigError(f"protocol '{name}' has no setting '{key}'; it has {', '.join(sorted(known))}")
    return LanguageModelProtocol(**{**PROTOCOLS[name][1], **changes})
