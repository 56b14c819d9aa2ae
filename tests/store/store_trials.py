"""A process of its own: writers that are killed at random moments, and what their stores hold afterwards.

python store_trials.py FOLDER KILLS SEED: prints a JSON object. torch is imported once; every writer is a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pyinf.store.reader import Store
from pyinf.store.writer import StoreWriter
from tests.store.store_data import append, rows_of, spec

COUNT, BATCH, SHARD = 3000, 13, 257


def build(directory: Path) -> None:
    """What a build does: skip what is done, append the rest, finish."""
    what = spec("int8")
    rows = rows_of(what, COUNT)
    with StoreWriter(directory, what, shard_rows=SHARD, commit_seconds=0.003) as writer:
        done = set(writer.done_ids().tolist())
        left = [i for i in range(COUNT) if i not in done]
        for start in range(0, len(left), BATCH):
            ids = left[start : start + BATCH]
            append(writer, ids, rows[ids])
            time.sleep(0.001)  # the pass


def killed(directory: Path, delay: float) -> bool:
    """Fork a build and kill it after ``delay`` seconds; whether it was still at work."""
    child = os.fork()
    if child == 0:
        try:
            build(directory)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(3)
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a writer failed with {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def main(folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    draw = random.Random(int(seed))
    directory, trials, done_before, grew = Path(folder) / "store", 0, 0, []
    while trials < int(kills):
        # Moments from the first instruction of a writer to beyond the end of a whole build.
        at_work = killed(directory, draw.choice([0.01, 0.05, 0.3]) * draw.random() * 2)
        if not at_work:
            Store.open(directory, verify=True)
            directory = Path(folder) / f"store{trials}"
            done_before = 0
            continue
        trials += 1
        if (directory / "manifest.json").exists():
            part = Store.open(directory, unfinished=True)
            part.verify()
            with_tail = StoreWriter(directory, spec("int8"), shard_rows=SHARD)
            done = with_tail.done_ids().tolist()
            with_tail.close()
            assert len(set(done)) == len(done) >= done_before, "a row is there twice, or was lost"
            grew.append(len(done))
            done_before = len(done)
    build(directory)
    store = Store.open(directory, verify=True)
    order = store.ids.argsort()
    reference = Path(folder) / "whole"
    build(reference)
    whole = Store.open(reference)
    same = (store.raw(0, COUNT)[order] == whole.raw(0, COUNT)).all()
    documents = all(store.document(int(order[i])) == whole.document(i) for i in range(0, COUNT, 7))
    print(
        json.dumps(
            {
                "kills": trials,
                "rows": store.count,
                "ids": store.ids[order].tolist() == list(range(COUNT)),
                "same": bool(same),
                "documents": documents,
                "grew": grew,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
