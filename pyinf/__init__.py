"""pyinf: which training data made the model say this? Influence functions for language models, uncompressed, on one
GPU.
"""

from __future__ import annotations

from pyinf import methods, ops
from pyinf._version import __version__
from pyinf.attribute import Attributor, attribute
from pyinf.curvature import Factors
from pyinf.errors import PyinfError
from pyinf.ops import set_backend
from pyinf.score import Scores
from pyinf.tasks import CausalLM, LogOdds, SequenceClassification, Task

__all__ = [
    "Attributor",
    "CausalLM",
    "Factors",
    "LogOdds",
    "PyinfError",
    "Scores",
    "SequenceClassification",
    "Task",
    "__version__",
    "attribute",
    "doctor",
    "methods",
    "ops",
    "set_backend",
]

from pyinf.doctor import doctor
