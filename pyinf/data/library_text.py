"""Real text that every Python carries: docstrings and source of the standard library, in a fixed order; and a tokenizer
trained on the spot. What the demo and the retraining protocols learn from.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyinf.errors import DataError

__all__ = ["END", "Passage", "standard_library_passages", "train_tokenizer"]

END = "<|end|>"

# Tests and bundled third-party copies are not on every installation, so they would make the corpus differ.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo",
            "__pycache__", "_pyrepl", "pydoc_data", "encodings", "msilib", "distutils", "config"}  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """A piece of text, where it is from (``heapq.heappush``) and what it is (``docstring`` or ``source``)."""

    text: str
    origin: str
    kind: str


def _files(root: Path) -> list[Path]:
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not any(part in _SKIPPED or part.startswith("config-") for part in parts):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def _split(text: str, limit: int) -> list[str]:
    """Cut at blank lines so that pieces stay under ``limit`` characters where paragraphs allow."""
    pieces, current = [], ""
    for paragraph in text.split("\n\n"):
        if current and len(current) + len(paragraph) + 2 > limit:
            pieces.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [*pieces, current] if current.strip() else pieces


def _passages_of(path: Path, root: Path, limit: int) -> list[Passage]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError):
        return []  # a file that this Python cannot read is no text to learn from; the rest of the library is
    module = _module_name(path, root)
    lines = source.splitlines()
    found: list[Passage] = []

    def visit(node: ast.AST, name: str, header: str) -> None:
        docstring = ast.get_docstring(node) if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else None  # fmt: skip
        if docstring and len(docstring) >= 40:
            for piece in _split(inspect.cleandoc(docstring), limit):
                found.append(Passage(f"{header}\n{piece}", name, "docstring"))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{name}.{child.name}", f"class {name}.{child.name}:")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{name}.{child.name}"
                visit(child, inner, f"def {inner}({ast.unparse(child.args)}):")
                body = textwrap.dedent("\n".join(lines[child.lineno - 1 : child.end_lineno]))
                if 80 <= len(body) <= limit and not ast.get_docstring(child):
                    found.append(Passage(f"# {module}\n{body}", inner, "source"))

    visit(tree, module, f"module {module}:")
    return found


def standard_library_passages(limit: int = 480) -> list[Passage]:
    """Every docstring of 40 characters or more, and every short function without one, of the standard library.

    Sorted by file and by place in the file; pieces of about ``limit`` characters; no text twice. The same on every
    machine with the same Python version.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    passages = []
    for path in _files(root):
        for passage in _passages_of(path, root, limit):
            if passage.text not in seen:
                seen.add(passage.text)
                passages.append(passage)
    if len(passages) < 500:
        raise DataError(
            f"Only {len(passages)} passages of text in {root}; this reads the sources of Python's own library, "
            "which this installation lacks. Use a Python that has them."
        )
    return passages


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level byte-pair tokenizer (``transformers.PreTrainedTokenizerFast``) of at most ``vocabulary`` tokens.

    Every text starts with ``END``, so that the model always begins from the same token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=END)
