"""What each traced layer saw and what came back, from one forward and one backward without weight gradients."""

from pyinf.capture.layers import Layer, LayerSelection, Modules, select_layers
from pyinf.capture.session import CapturedBatch, Consumer, InputGroups, Recorder, TracingSession
from pyinf.capture.source import CaptureCache, PassSource

__all__ = [
    "CaptureCache",
    "CapturedBatch",
    "Consumer",
    "InputGroups",
    "Layer",
    "LayerSelection",
    "Modules",
    "PassSource",
    "Recorder",
    "TracingSession",
    "select_layers",
]
