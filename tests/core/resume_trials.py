"""Runs a fit and a scoring in forked children, kills them at any moment, and reports what the survivors leave behind.

Not a test module: test_core_resume.py starts it in a process of its own, so that torch is imported once for all children.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import pyinf


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(23, 16), nn.Linear(16, 23)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(2)])

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def examples(n: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [{"input_ids": [rng.randrange(23) for _ in range(rng.randrange(4, 12))]} for _ in range(n)]


TRAIN, QUERIES = examples(18, 1), examples(4, 2)


def drawn(number: int, positive: bool = False):
    """Checkpoint ``number``, or positive second moments: a callable, so that only its content says what it is."""

    def make() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        noise = {k: torch.randn(p.shape, generator=generator) for k, p in Net().named_parameters()}
        return {k: noise[k].abs() if positive else p.detach() + 0.1 * noise[k] for k, p in Net().named_parameters()}

    return make


def trajectory(method: str) -> dict:
    """Options of a method that follows the training run: four checkpoints in two segments."""
    options = {"checkpoints": [drawn(n) for n in range(4)], "learning_rates": 0.1}
    options["second_moments"] = [drawn(10 + n, positive=True) for n in range(4)]
    if method == "source":
        options |= {"steps": 3, "segments": 2, "epsilon": 0.1}
    return options


def work(directory: Path, method: str, cache: str, rank) -> None:
    own = trajectory(method) if method in ("tracin", "source") else {}
    attributor = pyinf.Attributor(
        Net(), method, run_dir=directory, checkpoint_seconds=0, cache=cache, query_rank=rank, **own
    )
    attributor.fit(TRAIN, batch_size=3)
    needed = sum(v for k, v in attributor.plan(TRAIN, QUERIES, 3).memory.items() if k not in ("captured",)) + (64 << 20)
    attributor.options["memory_budget"] = needed - attributor._plan.memory["queries"] // 2  # two blocks of queries
    scores = attributor.score(QUERIES, TRAIN, batch_size=3)
    assert attributor._plan.score_passes == 2
    torch.save(
        {"values": scores.values, "energy": scores.meta.get("captured_energy")},
        directory.parent / f"{directory.name}.pt",
    )


def child(directory: Path, setting: tuple, kill_at: int | None, delay: float = 0.0, counted: Path | None = None) -> int:
    """Fork a child that works and dies at its ``kill_at``-th step on the disk (fsyncs, renames), or ``delay`` seconds later."""  # noqa: E501
    pid = os.fork()
    if pid:
        return pid
    calls = [0]

    def counting(real):
        def run(*args, **kwargs):
            calls[0] += 1
            if calls[0] == kill_at and delay:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process as SIGKILL does: nothing is cleaned up
                signal.setitimer(signal.ITIMER_REAL, delay)
            elif calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return run

    os.replace, os.fsync, os.unlink = counting(os.replace), counting(os.fsync), counting(os.unlink)
    code = 1
    try:
        work(directory, *setting)
        if counted is not None:
            counted.write_text(str(calls[0]))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def finished(pid: int) -> str:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM) else f"signal {os.WTERMSIG(status)}"
    return "done" if os.WEXITSTATUS(status) == 0 else "failed"


def digest(directory: Path) -> dict:
    home = directory / "fit" / "factors"
    factors = (
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(home.iterdir())} if home.exists() else {}
    )
    scores = torch.load(directory.parent / f"{directory.name}.pt", weights_only=True)
    left = sorted(
        str(p.relative_to(directory)) for p in directory.rglob("*") if "factors" not in p.parts and p.is_file()
    )
    return {
        "factors": factors,
        "scores": hashlib.sha256(scores["values"].numpy().tobytes()).hexdigest(),
        "energy": scores["energy"],
        "left": left,
    }


def main(root: Path, setting: tuple, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    whole, counted = root / "whole", root / "count"
    assert finished(child(whole, setting, None, counted=counted)) == "done"
    steps = int(counted.read_text())
    reference, trials = digest(whole), []
    for number in range(4):
        directory, kills = root / f"run{number}", []
        while not kills or kills[-1] == "killed":
            # The first child dies anywhere; those that go on have less to do, and die early if at all.
            at = rng.randrange(1, (int(0.9 * steps) if not kills else steps // 3) + 1) if len(kills) < 3 else None
            delay = rng.uniform(1e-4, 0.01) if number % 2 else 0.0
            kills.append(finished(child(directory, setting, at, delay)))
        trials.append({"kills": kills, **(digest(directory) if kills[-1] == "done" else {})})
    print(json.dumps({"reference": reference, "trials": trials, "steps": steps}))


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    main(Path(sys.argv[1]), (options["method"], options["cache"], options["rank"]), options["seed"])
