"""Make the environments of the peer libraries: one virtual environment each, under `.envs/`, by venv and pip only.

    python benchmarks/peers/envs.py                 # all of them
    python benchmarks/peers/envs.py kronfluence     # one
    python benchmarks/peers/envs.py --check         # what each holds, without changing anything

torch is installed first and pinned through every later step, so that all libraries run on the same build of it. The
peers pull a torchvision and a torchaudio built for another torch, after which importing transformers fails; nothing
measured here uses them, so they are taken out again. Where pip finds torch is left to pip's own configuration.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / ".envs"
TORCH = "torch==2.13.0"
COMMON = ("transformers==5.23.0", "numpy", "safetensors", "psutil")
PEERS: dict[str, str] = {
    "kronfluence": "kronfluence==1.0.1",
    "bergson": "bergson==2.5.1",
    "dattri_llm": "dattri-llm[transformers]==0.1.0",
}
IMPORTS = {"kronfluence": "kronfluence", "bergson": "bergson", "dattri_llm": "dattri_llm"}
STAMP = "pyinf-peer.json"


def python_of(peer: str, root: Path = ENVS) -> Path:
    """Interpreter of one peer's environment (it need not exist yet)."""
    return root / peer / "bin" / "python"


def _run(arguments: list[str]) -> None:
    print("+", " ".join(arguments), flush=True)
    subprocess.run(arguments, check=True)


def make(peer: str, root: Path = ENVS) -> Path:
    """Create the environment of `peer` unless it is there and complete. Returns its interpreter.

    Raises `subprocess.CalledProcessError` when pip or the first import fails.
    """
    if peer not in PEERS:
        raise SystemExit(f"unknown peer {peer!r}: one of {', '.join(PEERS)}")
    python = python_of(peer, root)
    stamp = root / peer / STAMP
    if stamp.is_file() and json.loads(stamp.read_text()).get("package") == PEERS[peer]:
        return python
    started = time.perf_counter()
    root.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(root / peer)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, TORCH])
    _run([*pip, TORCH, *COMMON, PEERS[peer]])
    _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"])
    _run([str(python), "-c", f"import transformers.models.llama.modeling_llama, {IMPORTS[peer]}"])
    stamp.write_text(json.dumps({"package": PEERS[peer], "seconds": round(time.perf_counter() - started, 1)}))
    return python


def describe(peer: str, root: Path = ENVS) -> str:
    """One line: what the environment holds, or that it is missing."""
    python = python_of(peer, root)
    if not (root / peer / STAMP).is_file():
        return f"{peer}: missing (make it with `python benchmarks/peers/envs.py {peer}`)"
    code = (
        "import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in "
        f"({PEERS[peer].split('==')[0].split('[')[0]!r}, 'torch', 'transformers', 'numpy')), sep=', ')"
    )
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return f"{peer}: {found.stdout.strip()}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the environments of the peer libraries.")
    parser.add_argument("peers", nargs="*", default=list(PEERS), help="which (default: all)")
    parser.add_argument("--check", action="store_true", help="only say what each holds")
    options = parser.parse_args()
    for peer in options.peers:
        if not options.check:
            make(peer)
        print(describe(peer))


if __name__ == "__main__":
    main()
