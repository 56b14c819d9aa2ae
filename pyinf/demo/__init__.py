"""The main job on real input, offline: plant a falsehood, train, ask, and trace the answer back to what taught it."""

from pyinf.demo.run import run

__all__ = ["run"]
