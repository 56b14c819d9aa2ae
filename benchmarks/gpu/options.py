"""What a run was asked for; handed to the worker processes as arguments."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Options:
    """``tiny``: small sizes, to see on any machine that everything runs."""

    device: str
    out: Path
    tiny: bool = False

    def arguments(self) -> list[str]:
        return ["--device", self.device, "--out", str(self.out), *(["--tiny"] if self.tiny else [])]

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal")
        parser.add_argument("--tiny", action="store_true", help="small sizes: a rehearsal, nothing to keep")

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")
