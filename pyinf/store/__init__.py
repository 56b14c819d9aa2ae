"""Gradient stores: rows of compressed gradients on disk, and the retrieval of the best of them."""

from __future__ import annotations

from pyinf.store.build import build_store, open_compressor, query_rows
from pyinf.store.faiss_index import FaissIndex, build_index, open_index
from pyinf.store.format import StoreSpec
from pyinf.store.merge import compact as compact_store
from pyinf.store.merge import merge as merge_stores
from pyinf.store.quantise import FORMATS, decode, encode, row_bytes
from pyinf.store.reader import Store
from pyinf.store.retrieve import Rescorer, Retrieved, query_store
from pyinf.store.scan import all_scores
from pyinf.store.sections import Section, layout, section_scores
from pyinf.store.writer import StoreWriter

__all__ = [
    "FORMATS",
    "FaissIndex",
    "Rescorer",
    "Retrieved",
    "Section",
    "Store",
    "StoreSpec",
    "StoreWriter",
    "all_scores",
    "build_index",
    "build_store",
    "compact_store",
    "decode",
    "encode",
    "layout",
    "merge_stores",
    "open_compressor",
    "open_index",
    "query_rows",
    "query_store",
    "row_bytes",
    "section_scores",
]
