"""Files on disk: written whole or not at all, read with their checksums, never unpickled.

Every file is written under a temporary name in its own directory, synced, renamed over the final name, and the
directory synced: a process killed at any moment leaves the old file or the new one. Tensors are safetensors files whose
bytes depend only on their content (sorted header), so equal tensors give equal checksums. A directory of them is
described by a ``manifest.json`` that carries a format name, a format version, free fields, the size and SHA-256 of
every file, and a checksum of itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from pyinf.errors import ArtifactError, ResourceError

__all__ = [
    "MANIFEST_NAME",
    "RUN_NAME",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_writer",
    "check_free_disk",
    "claim_directory",
    "differences",
    "fingerprint_examples",
    "fingerprint_model",
    "free_disk",
    "load_tensors",
    "read_json",
    "read_manifest",
    "remove_stale_temporaries",
    "resolve_file",
    "save_tensors",
    "sha256_file",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"
_CHECKSUM = "checksum"
_MAX_JSON_BYTES = 1 << 28
_CHUNK = 1 << 24
_TEMPORARY = ".pyinf-tmp"
_REMEDY = "delete it and run again"

_SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# ------------------------------------------------------------------------------------------ writing


def _host_tag() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync a directory; the rename itself is atomic there all the same.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return ResourceError(f"no space left on the disk while writing {path}; free some space and run again")
    return ArtifactError(f"cannot write {path}: {error.strerror or error}; check the path and its permissions")


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the name ``path`` only when the block ends without an exception, synced to disk.

    Raises :class:`ArtifactError` when the path cannot be written and :class:`ResourceError` when the disk is full.
    """
    target = Path(path)
    name = f".{target.name}.{_host_tag()}-{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY}"
    temporary = target.parent / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = open(temporary, "xb")
    except OSError as error:
        raise _write_error(target, error) from error
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, (ArtifactError, ResourceError)):
            raise _write_error(target, error) from error
        raise


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> dict[str, Any]:
    """Write ``data`` to ``path`` whole or not at all; returns ``{"sha256", "bytes"}`` of what was written."""
    with atomic_writer(path) as handle:
        handle.write(data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _json_default(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return value.item()
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _dump_json(obj: Any, path: Path) -> bytes:
    options: dict[str, Any] = {"indent": 2, "sort_keys": True, "allow_nan": False, "default": _json_default}
    try:
        text = json.dumps(obj, ensure_ascii=False, **options)
        # A lone surrogate cannot be UTF-8; the escaped form carries it.
        if any("\ud800" <= c <= "\udfff" for c in text):
            text = json.dumps(obj, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error
    return (text + "\n").encode()


def atomic_write_json(path: str | os.PathLike[str], obj: Any) -> dict[str, Any]:
    """Write ``obj`` as JSON (sorted keys; NaN refused) whole or not at all; returns ``{"sha256", "bytes"}``."""
    return atomic_write_bytes(path, _dump_json(obj, Path(path)))


def remove_stale_temporaries(directory: str | os.PathLike[str]) -> list[str]:
    """Delete what killed writers of this machine left in ``directory`` (not below it); returns the names deleted."""
    removed = []
    directory = Path(directory)
    for path in directory.glob(f".*{_TEMPORARY}"):
        stem = path.name[: -len(_TEMPORARY)].rpartition(".")[2].split("-")
        if len(stem) != 3 or not stem[1].isdigit():
            continue
        try:
            if stem[0] == _host_tag():
                stale = not _alive(int(stem[1]))
            else:  # written by another machine on a shared disk: only when nobody can still be writing it
                stale = time.time() - path.stat().st_mtime > 86400
            if stale:
                path.unlink()
                removed.append(path.name)
        except OSError:
            continue
    return removed


def _alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------ reading


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal. Raises :class:`ArtifactError` when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """Read a JSON file. Raises :class:`ArtifactError` naming the file when it is missing, damaged or not JSON."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ArtifactError(
                f"{what} {path} has {size} bytes, more than the {_MAX_JSON_BYTES} one may have; {_REMEDY}"
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{what} {path} is missing") from error
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {what} {path}: {error}") from error
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"{what} {path} is damaged: not JSON ({reason}); {_REMEDY}") from error


# ------------------------------------------------------------------------------------------ tensors


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write tensors of any shape as one safetensors file, whole or not at all; returns ``{"sha256", "bytes"}``.

    The bytes depend on names, values and metadata only. One tensor at a time is brought to the CPU. Raises
    :class:`ArtifactError` for a dtype that the format lacks, :class:`ResourceError` when the disk is full.
    """
    target = Path(path)
    header: dict[str, Any] = {}
    if metadata:
        wrong = [key for key, value in metadata.items() if not isinstance(key, str) or not isinstance(value, str)]
        if wrong:
            raise ArtifactError(f"cannot write {target}: metadata {wrong[0]!r} is not a string")
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    # The format wants offsets without holes; wider types first keeps every tensor aligned for a memory map.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _SAFETENSORS_DTYPES or tensor.layout != torch.strided:
            raise ArtifactError(f"cannot write {target}: tensor {name!r} is {tensor.dtype}, {tensor.layout}")
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, size = hashlib.sha256(), 0
    with atomic_writer(target) as handle:
        for chunk in _chunks(struct.pack("<Q", len(encoded)), encoded, (_raw_bytes(tensors[name]) for name in order)):
            handle.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _chunks(length: bytes, header: bytes, body: Iterable[memoryview]) -> Iterator[bytes | memoryview]:
    yield length
    yield header
    yield from body


def load_tensors(path: str | os.PathLike[str], expected: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file to the CPU; with ``expected`` (``{"sha256", "bytes"}``) only if it is exactly that file.

    Raises :class:`ArtifactError` naming the file and what was expected and found when it is missing, truncated,
    tampered with, or not safetensors.
    """
    import safetensors
    from safetensors.torch import load_file

    path = Path(path)
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is missing or cannot be read; {_REMEDY}") from error
    if expected is not None:
        if size != expected["bytes"]:
            raise ArtifactError(f"{path} is damaged: expected {expected['bytes']} bytes, found {size}; {_REMEDY}")
        found = sha256_file(path)
        if found != expected["sha256"]:
            raise ArtifactError(
                f"{path} is damaged or was changed: expected SHA-256 {expected['sha256'][:12]}…, found {found[:12]}…; "
                f"{_REMEDY}"
            )
    try:
        return load_file(path)
    except MemoryError as error:
        raise ResourceError(f"not enough memory to load {path} ({size} bytes)") from error
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: not a safetensors file ({error}); {_REMEDY}") from error


# ------------------------------------------------------------------------------------------ manifests


def resolve_file(directory: str | os.PathLike[str], name: str) -> Path:
    """The path of file ``name`` in ``directory``. Raises :class:`ArtifactError` for a name that leads out of it."""
    directory = Path(directory)
    parts = name.split("/") if isinstance(name, str) else [""]
    bad = any(part in ("", ".", "..") for part in parts) or any(c in "\\:" or ord(c) < 32 for c in "/".join(parts))
    path = directory.joinpath(*parts) if not bad else directory
    try:
        # A symbolic link is followed, so a link that points out of the directory is refused as well.
        bad = bad or not path.resolve().is_relative_to(directory.resolve())
    except (OSError, ValueError, RuntimeError):
        bad = True
    if bad:
        raise ArtifactError(
            f"file name {name!r} in {directory / MANIFEST_NAME} leads out of its directory; do not use it"
        )
    return path


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_file_info(path: Path, name: Any, info: Any) -> None:
    good = (
        isinstance(info, dict)
        and isinstance(info.get("sha256"), str)
        and len(info["sha256"]) == 64
        and all(c in "0123456789abcdef" for c in info["sha256"])
        and type(info.get("bytes")) is int
        and info["bytes"] >= 0
    )
    if not good:
        raise ArtifactError(f"{path} is damaged: the entry of file {name!r} lacks its SHA-256 or size; {_REMEDY}")


def write_manifest(
    directory: str | os.PathLike[str],
    format: str,
    version: int,
    fields: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write ``directory/manifest.json``; ``files`` maps a name to the ``{"sha256", "bytes"}`` its writer returned.

    Write it last: a directory without a manifest is unfinished. Returns the manifest as :func:`read_manifest` would.
    """
    path = Path(directory) / MANIFEST_NAME
    taken = {"format", "version", "files", _CHECKSUM} & set(fields)
    if taken:
        raise ArtifactError(f"cannot write {path}: field {sorted(taken)[0]!r} is reserved")
    for name, info in files.items():
        resolve_file(directory, name)
        _check_file_info(path, name, dict(info))
    manifest = {"format": format, "version": version, **fields, "files": {name: dict(files[name]) for name in files}}
    manifest = json.loads(_dump_json(manifest, path))  # as it will be read: tuples become lists, keys strings
    manifest[_CHECKSUM] = _manifest_digest(manifest)
    atomic_write_json(path, manifest)
    return manifest


def read_manifest(directory: str | os.PathLike[str], format: str, version: int) -> dict[str, Any]:
    """Read and check ``directory/manifest.json``: format, version, its own checksum, names and entries of its files.

    The files themselves are checked when they are loaded (:func:`load_tensors` with ``manifest["files"][name]``).
    Raises :class:`ArtifactError` naming what was expected and what was found.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise ArtifactError(f"no directory {directory}: expected one that holds {format} (version {version})")
    if not path.exists():
        raise ArtifactError(
            f"{directory} has no {MANIFEST_NAME}: not finished, or not {format}; run again to finish it"
        )
    manifest = read_json(path, "manifest")
    if not isinstance(manifest, dict):
        raise ArtifactError(
            f"manifest {path} is damaged: expected an object, found a {type(manifest).__name__}; {_REMEDY}"
        )
    if manifest.get("format") != format:
        raise ArtifactError(
            f"{directory} holds {manifest.get('format')!r}, expected {format!r}; give the right directory"
        )
    found = manifest.get("version")
    if type(found) is not int or found != version:
        raise ArtifactError(
            f"{directory} is {format} version {found!r}, this pyinf reads version {version}; "
            f"use the pyinf that wrote it or make it again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtifactError(f"manifest {path} is damaged: it lists no files; {_REMEDY}")
    for name, info in files.items():
        resolve_file(directory, name)
        _check_file_info(path, name, info)
    if manifest.get(_CHECKSUM) != _manifest_digest(manifest):
        raise ArtifactError(f"manifest {path} is damaged or was changed: its checksum does not match; {_REMEDY}")
    return manifest


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What differs between two JSON values, one line each: ``key: old → new``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}, key=str):
            name = f"{prefix}.{key}" if prefix else str(key)
            if key not in old:
                lines.append(f"{name}: absent → {_short(new[key])}")
            elif key not in new:
                lines.append(f"{name}: {_short(old[key])} → absent")
            else:
                lines.extend(differences(old[key], new[key], name))
        return lines
    same = old == new or (isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new))
    return [] if same else [f"{prefix or 'value'}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def claim_directory(directory: str | os.PathLike[str], run: Mapping[str, Any]) -> bool:
    """Make ``directory`` the home of one run, described by the JSON object ``run``; true when it already is (resume).

    Raises :class:`ArtifactError` when it holds a different run, listing what differs, or files that no run wrote.
    Temporary files of killed writers in it are deleted.
    """
    directory = Path(directory)
    path = directory / RUN_NAME
    wanted = json.loads(_dump_json(dict(run), path))
    if directory.exists() and not directory.is_dir():
        raise ArtifactError(f"{directory} is a file, expected a directory; choose another output directory")
    if path.exists():
        found = read_json(path, "run description")
        lines = differences(found, wanted)
        if lines:
            more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
            raise ArtifactError(
                f"{directory} holds a different run ({'; '.join(lines[:8])}{more}); "
                f"choose another output directory or delete this one"
            )
        remove_stale_temporaries(directory)
        return True
    if directory.exists():
        remove_stale_temporaries(directory)
        try:
            strange = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise ArtifactError(f"cannot read {directory}: {error.strerror or error}") from error
        if strange:
            raise ArtifactError(
                f"{directory} is not empty and holds no pyinf run (it has {strange[0]!r}); choose another directory"
            )
    atomic_write_json(path, wanted)
    return False


# ------------------------------------------------------------------------------------------ fingerprints


def fingerprint_model(model: torch.nn.Module, names: Iterable[str] | None = None, samples: int = 4096) -> str:
    """SHA-256 of a model's parameters and buffers: names, shapes, dtypes, and ``samples`` evenly spaced values each.

    ``names`` keeps only the tensors with those names or below the modules so named. An edit of a few values between the
    sample points goes unseen; training, quantising, merging or loading in another dtype does not.
    """
    wanted = None if names is None else sorted(set(names))
    return fingerprint_tensors(
        {
            name: value
            for name, value in model.state_dict(keep_vars=True).items()
            if wanted is None or any(name == w or name.startswith(w + ".") for w in wanted)
        },
        samples,
    )


def fingerprint_tensors(tensors: Mapping[str, Any], samples: int = 4096) -> str:
    """SHA-256 of named tensors, as :func:`fingerprint_model` takes it; what is no tensor is passed over."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        if value.is_meta or value.numel() == 0 or value.layout != torch.strided:
            continue
        flat = value.detach().reshape(-1)
        step = max(1, -(-flat.numel() // samples))
        digest.update(_raw_bytes(flat[::step]))
        digest.update(_raw_bytes(flat[-1:]))
    return digest.hexdigest()


def _update_with(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value.long()).numpy()
    elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float, np.number)):
        digest.update(f"list{len(value)}|".encode())
        for item in value:
            _update_with(digest, item)
        return
    if isinstance(value, (int, float, list, tuple, np.ndarray, np.number)):
        try:
            array = np.asarray(value)
            array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        except (ValueError, TypeError, OverflowError):
            digest.update(f"other|{value!r}|".encode())
            return
        digest.update(f"{array.dtype.str}{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}=".encode())
            _update_with(digest, value[key])
    else:
        digest.update(f"{type(value).__name__}|{value!s}|".encode("utf-8", "surrogatepass"))


def fingerprint_examples(examples: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of a collection of examples: every field of every example, in order; lists and tensors count the same."""
    digest = hashlib.sha256()
    digest.update(f"{len(examples)}|".encode())
    for index in range(len(examples)):
        digest.update(b"#")
        _update_with(digest, dict(examples[index]))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ disk


def free_disk(path: str | os.PathLike[str]) -> int:
    """Free bytes on the disk that holds ``path`` (or would: its nearest existing parent is asked)."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def check_free_disk(path: str | os.PathLike[str], needed_bytes: int, what: str = "this run") -> None:
    """Raise :class:`ResourceError` unless the disk of ``path`` has ``needed_bytes`` free."""
    free = free_disk(path)
    if needed_bytes > free:
        raise ResourceError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB of disk at {path}, {free / 2**30:.2f} GiB are free; "
            f"free some space or choose another directory"
        )
