"""Fails on an import that goes up: the layers of the code, checked from its syntax trees.

python tools/check_layers.py [folder of the package]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# From the top down. A module may import what is below it, and a neighbour in its row that does not import it back.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo", "serve"},
    {"interop", "study"},
    {"doctor", "bench"},
    {"attribute"},
    {"methods"},
    {"store", "solve", "report"},
    {"curvature", "score"},
    {"plan"},
    {"capture", "evaluate"},
    {"ops"},
    {"triton_kernels", "_C"},
    {"data"},
    {"checkpoint"},
    {"tasks", "artifacts"},
    {"progress", "errors", "_version"},
]
RANK = {name: len(LAYERS) - i for i, row in enumerate(LAYERS) for name in row}


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, top-level module of pyinf) for every import in a file, also those inside functions and type checks."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "pyinf" else [origin]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyinf" and len(parts) > 1:
                yield node.lineno, parts[1]


def violations(folder: Path) -> list[str]:
    """One line for every import that goes up, or that closes a circle between two neighbours."""
    found = []
    sideways: dict[tuple[str, str], str] = {}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue  # the front door re-exports from everywhere
        if own not in RANK:
            found.append(f"{folder.name}/{relative}: {own} has no layer in tools/check_layers.py")
            continue
        for line, other in imports(ast.parse(path.read_text(), str(path)), ["pyinf", *relative.parts[:-1]]):
            if other == own or other not in RANK:
                continue  # its own package, or a name that pyinf/__init__.py defines
            where = f"{folder.name}/{relative}:{line}"
            if RANK[other] > RANK[own]:
                found.append(f"{where}: {own} imports {other}, which is above it")
            elif RANK[other] == RANK[own]:
                sideways[own, other] = where
                if (other, own) in sideways:
                    found.append(f"{where}: {own} imports {other}, which imports {own} ({sideways[other, own]})")
    return found


def main() -> int:
    """Checks the package and the kernels."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "pyinf"
    found = violations(folder)
    for path in sorted((ROOT / "triton_kernels").rglob("*.py")) if len(sys.argv) < 2 else []:
        for line, other in imports(ast.parse(path.read_text(), str(path)), ["pyinf", "triton_kernels"]):
            if other != "triton_kernels":
                found.append(
                    f"triton_kernels/{path.name}:{line}: kernels import nothing of pyinf, but this has {other}"
                )
    print("\n".join(found) or "layers: every import goes down")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
