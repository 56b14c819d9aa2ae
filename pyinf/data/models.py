"""Models and tokenizers from a local folder or the hub. Weights are safetensors only; nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyinf.errors import ConfigError, ModelError

__all__ = ["DTYPES", "load_model", "load_tokenizer", "model_limits", "placed", "resolve_device"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def resolve_device(name: str | None) -> torch.device:
    """The device called ``name``; None or ``auto`` is the first GPU, or the CPU where there is none."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} was asked for, but torch sees no GPU; use --device cpu, or see pyinf doctor"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return device


def _resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """A causal language model from a local folder or a hub name, in eval mode, with an optional PEFT adapter on it.

    ``dtype`` None or ``auto`` keeps the checkpoint's own. Raises :class:`ModelError` when the folder holds no model,
    only pickled weights, damaged or incomplete ones, or the adapter does not fit; it names the folder and the remedy.
    """
    torch_dtype = _resolve_dtype(dtype)
    place = resolve_device(device)
    local = _check_folder(name, "model")
    name = Path(name).expanduser() if local else name
    from transformers import AutoModelForCausalLM

    quiet = logging.getLogger("transformers.modeling_utils")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # what it would warn about is checked below
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(name),
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            output_loading_info=True,
            **({"revision": revision} if revision else {}),
        )
    except Exception as error:  # that library raises a dozen kinds
        raise ModelError(_load_reason(str(name), local, error)) from error
    finally:
        quiet.setLevel(level)
    missing = sorted(map(str, info.get("missing_keys", ())))
    if missing:
        raise ModelError(
            f"model {name} lacks {len(missing)} weights in its files ({', '.join(missing[:3])}, …), random otherwise; "
            f"save the whole model again"
        )
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return model.to(place).eval()


def _check_folder(name: str | Path, what: str) -> bool:
    """True for a local folder that holds a model; False for a hub name; ModelError otherwise."""
    path = Path(name).expanduser()
    try:
        exists, is_dir = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {what} {str(name)!r}: {error}") from error
    if not exists:
        if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
            raise ModelError(f"no folder {name}; give the folder that save_pretrained wrote, or a hub name")
        return False
    if not is_dir:
        raise ModelError(f"{what} {name} is a file; give the folder that save_pretrained wrote")
    wanted = "config.json" if what == "model" else "adapter_config.json"
    if not (path / wanted).exists():
        if what == "model" and (path / "adapter_config.json").exists():
            raise ModelError(
                f"{name} is an adapter, not a whole model; give its base with --model and this with --adapter"
            )
        raise ModelError(f"{name} has no {wanted}; give the folder that save_pretrained wrote")
    _check_json(path / wanted)
    files = [entry.name for entry in path.iterdir()]
    if not any(file.endswith(".safetensors") for file in files):
        pickled = sorted(file for file in files if file.endswith(_PICKLED))
        if pickled:
            raise ModelError(
                f"{name} holds only pickled weights ({pickled[0]}), which can run code and are not read; save it "
                f"again as safetensors (save_pretrained with a current transformers)"
            )
        raise ModelError(f"{name} holds no weights (*.safetensors); save the model there again")
    return True


def _check_json(path: Path) -> None:
    try:
        if not isinstance(json.loads(path.read_bytes().decode("utf-8")), dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}; save the model again") from error


def _load_reason(name: str, local: bool, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        return f"model {name} brings its own code, which is not run unless asked for; read it, then --trust-remote-code"
    if local:
        return f"model {name} cannot be loaded, its files are damaged or of an unknown kind ({reason}); save it again"
    return (
        f"no folder {name!r}, and no model of that name could be loaded from the hub ({reason}); "
        f"give a local folder, or check the name and the network"
    )


def _with_adapter(model: torch.nn.Module, adapter: str | Path) -> torch.nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"adapter {adapter} needs peft; install it: pip install 'pyinf[peft]'") from error
    folder = str(Path(adapter).expanduser())
    if not _check_folder(folder, "adapter"):
        # Only these two files are fetched, so that a pickled twin is never there to be read.
        try:
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                str(adapter), allow_patterns=["adapter_config.json", "adapter_model.safetensors"]
            )
        except Exception as error:
            raise ModelError(_load_reason(str(adapter), False, error)) from error
        _check_folder(folder, "adapter")
    try:
        return PeftModel.from_pretrained(model, folder)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:240]
        raise ModelError(
            f"adapter {adapter} does not fit this model or is damaged ({reason}); give the base model it was trained on"
        ) from error


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, required: bool = True
) -> Any:
    """The tokenizer of a local folder or hub name. With ``required=False`` None where a folder holds no tokenizer."""
    path = Path(name).expanduser()
    local = path.is_dir()
    name = path if local else name
    if local and not any((path / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        known = [*path.glob("*.model"), *path.glob("*.vocab"), *path.glob("vocab.txt")]
        if not known:
            if not required:
                return None
            raise ModelError(f"{name} holds no tokenizer; give the folder of one with --tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(name),
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            **({"revision": revision} if revision else {}),
        )
    except Exception as error:
        raise ModelError(_load_reason(str(name), local, error).replace("model ", "tokenizer ", 1)) from error


def model_limits(model: torch.nn.Module) -> tuple[int | None, int | None]:
    """``(vocabulary, positions)`` of a model: its embedding's rows and the longest sequence it takes, where known."""
    from pyinf.data.batching import _model_limits

    return _model_limits(model)


@contextlib.contextmanager
def placed(
    model: torch.nn.Module, device: str | torch.device | None, dtype: torch.dtype | None
) -> Iterator[torch.nn.Module]:
    """The model on another device or in another dtype (None: as it is); its own tensors are put back untouched, also
    after an error.

    Raises:
        ConfigError: torch cannot move it there.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        if device is not None or dtype is not None:
            for tensor in [*model.parameters(), *model.buffers()]:
                wanted = dtype if tensor.is_floating_point() else None
                try:
                    moved = tensor.data.to(device=device, dtype=wanted)
                except (RuntimeError, AssertionError) as error:
                    raise ConfigError(f"cannot move the model to device={device}, dtype={dtype}: {error}") from None
                if moved is not tensor.data and (moved.dtype, moved.device) != (tensor.dtype, tensor.device):
                    kept.append((tensor, tensor.data))
                    tensor.data = moved
        yield model
    finally:
        for tensor, original in kept:
            tensor.data = original
