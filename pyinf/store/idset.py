"""Sets of row ids in a bit an id where ids are dense, and duplicates among any number of ids in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

__all__ = ["IdSet", "duplicates"]

_BITS = 10  # ids that share one bitmap: 2**_BITS
_BUCKET = 1 << 22  # ids compared at a time


def _hash(ids: np.ndarray) -> np.ndarray:
    """A 64-bit mix of ids ``[B, 1 or 2]`` (splitmix64's finaliser): which bucket they belong to."""
    x = ids[:, 0].astype(np.uint64)
    if ids.shape[1] == 2:
        x = x * np.uint64(0x9E3779B97F4A7C15) + ids[:, 1].astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class IdSet:
    """The ids seen so far, ``[B, 1]`` or ``[B, 2]`` (sequence, position): about a quarter of a byte each if dense."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], np.ndarray] = {}

    def add(self, ids: np.ndarray) -> int | None:
        """Add ``ids``; the index of the first that was there already, or stands twice among them, or None.

        Nothing is added in that case.
        """
        marks = []
        keys = ids[:, -1] >> _BITS
        bits = ids[:, -1] & ((1 << _BITS) - 1)
        order = np.lexsort((bits, keys, ids[:, 0]))
        first = ids[order, 0] if ids.shape[1] == 2 else np.zeros(len(order), np.int64)
        high, low = keys[order], bits[order]
        bad = np.zeros(len(order), bool)
        if len(order):
            bad[1:] = (first[1:] == first[:-1]) & (high[1:] == high[:-1]) & (low[1:] == low[:-1])
            starts = np.flatnonzero(np.r_[True, (first[1:] != first[:-1]) | (high[1:] != high[:-1])])
            for start, stop in zip(starts, np.r_[starts[1:], len(order)], strict=True):
                key = int(first[start]), int(high[start])
                bitmap = self._maps.get(key)
                if bitmap is None:
                    bitmap = np.zeros(1 << (_BITS - 3), np.uint8)
                at, bit = low[start:stop] >> 3, np.uint8(1) << (low[start:stop] & 7).astype(np.uint8)
                bad[start:stop] |= (bitmap[at] & bit) != 0
                marks.append((key, bitmap, at, bit))
        if bad.any():
            return int(order[bad].min())
        for key, bitmap, at, bit in marks:
            np.bitwise_or.at(bitmap, at, bit)
            self._maps[key] = bitmap
        return None


def duplicates(blocks: Callable[[], Iterable[np.ndarray]], count: int) -> np.ndarray:
    """Which rows have an id that an earlier row has: int64, ascending.

    ``blocks()`` goes through the ids ``[B, 1 or 2]`` of all ``count`` rows in order and is called once for every
    ``2²²`` rows: memory does not grow with ``count`` but for the answer.
    """
    passes = -(-count // _BUCKET) if count else 0
    found: list[np.ndarray] = []
    for bucket in range(passes):
        kept, rows, first = [], [], 0
        for ids in blocks():
            here = np.flatnonzero(_hash(ids) % np.uint64(passes) == bucket) if passes > 1 else np.arange(len(ids))
            kept.append(np.array(ids[here]))
            rows.append(here + first)
            first += len(ids)
        ids, at = np.concatenate(kept), np.concatenate(rows)
        order = np.lexsort((at, ids[:, -1], ids[:, 0]))
        ids, at = ids[order], at[order]
        found.append(at[1:][(ids[1:] == ids[:-1]).all(1)])
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)
