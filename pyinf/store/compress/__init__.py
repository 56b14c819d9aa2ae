"""Compressors: how a sequence's gradient becomes one row of a store."""

from __future__ import annotations

from pyinf.store.compress.base import REGISTRY, Compressor, Context, LayerRows, RowConsumer, layer_seed, register

# Importing a module enters its compressors in REGISTRY: one line each.
from pyinf.store.compress.factored import FactorRows
from pyinf.store.compress.grass import GraSS
from pyinf.store.compress.less import Less
from pyinf.store.compress.logra import LoGra
from pyinf.store.compress.lorif import LoRIF
from pyinf.store.compress.onebit import OneBit
from pyinf.store.compress.rapidin import RapidIn
from pyinf.store.compress.trackstar import TrackStar
from pyinf.store.compress.trak import Trak

__all__ = [
    "REGISTRY",
    "Compressor",
    "Context",
    "FactorRows",
    "GraSS",
    "LayerRows",
    "Less",
    "LoGra",
    "LoRIF",
    "OneBit",
    "RapidIn",
    "RowConsumer",
    "TrackStar",
    "Trak",
    "layer_seed",
    "register",
]
