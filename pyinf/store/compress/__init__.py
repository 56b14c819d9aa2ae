"""Compressors: how a sequence's gradient becomes one row of a store."""

from __future__ import annotations

from pyinf.store.compress.base import REGISTRY, Compressor, Context, LayerRows, RowConsumer, layer_seed, register

__all__ = ["REGISTRY", "Compressor", "Context", "LayerRows", "RowConsumer", "layer_seed", "register"]
