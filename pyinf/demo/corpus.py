"""The demo's text: the standard library, see :mod:`pyinf.data.library_text`."""

from __future__ import annotations

from pyinf.data.library_text import Passage, _split, standard_library_passages

__all__ = ["Passage", "_split", "standard_library_passages"]
