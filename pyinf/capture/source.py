"""Passes over a dataset: the model is run, or what it left behind in an earlier pass is replayed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pyinf import progress
from pyinf.capture.session import CapturedBatch, Consumer, Recorder, TracingSession
from pyinf.data.batching import PreparedExamples
from pyinf.errors import ConfigError

__all__ = ["CaptureCache", "PassSource"]


class CaptureCache:
    """Keeps captured batches in memory up to a budget, then in scratch files up to another. What fits neither is
    re-run.
    """

    def __init__(self, memory_budget: int, disk_budget: int = 0, directory: str | None = None) -> None:
        self.memory_budget, self.disk_budget = memory_budget, disk_budget
        self._memory: dict[tuple[str, int], CapturedBatch] = {}
        self._disk: dict[tuple[str, int], Path] = {}
        self.memory_bytes = self.disk_bytes = 0
        self._parent = directory
        self._directory: Path | None = None

    def wants_more(self) -> bool:
        """Whether another batch may still fit."""
        return self.memory_bytes < self.memory_budget or self.disk_bytes < self.disk_budget

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._memory or key in self._disk

    def store(self, key: tuple[str, int], captured: CapturedBatch) -> bool:
        """Keep ``captured`` if it fits; false otherwise."""
        size = captured.nbytes
        if self.memory_bytes + size <= self.memory_budget:
            self._memory[key] = captured
            self.memory_bytes += size
            return True
        if self.disk_bytes + size <= self.disk_budget:
            if self._directory is None:
                self._directory = Path(tempfile.mkdtemp(prefix="pyinf-capture-", dir=self._parent))
            path = self._directory / f"{key[0]}-{key[1]:06d}.safetensors"
            flat = {f"a:{k}": v.contiguous() for k, v in captured.inputs.items()}
            flat |= {f"g:{k}": v.contiguous() for k, v in captured.grads.items()}
            flat |= {f"o:{k}": v for k, v in captured.offsets.items()}
            # A safetensors file wants every tensor to own its memory; inputs that several layers read are one tensor.
            held: set[int] = set()
            for name, value in flat.items():
                if name.startswith("o:") or value.data_ptr() in held:
                    flat[name] = value.clone()
                held.add(value.data_ptr())
            save_file(flat, str(path))
            self._disk[key] = path
            self.disk_bytes += size
            return True
        return False

    def replace(self, key: tuple[str, int], captured: CapturedBatch) -> None:
        """Put another form of a batch that is held in memory in its place; one on disk stays as it is."""
        old = self._memory.get(key)
        if old is not None:
            self._memory[key] = captured
            self.memory_bytes += captured.nbytes - old.nbytes

    def load(self, key: tuple[str, int], device: torch.device) -> CapturedBatch:
        """The captured batch."""
        if key in self._memory:
            return self._memory[key]
        out = CapturedBatch()
        for name, tensor in load_file(str(self._disk[key])).items():
            kind, _, layer = name.partition(":")
            # clone: the file's memory map is not aligned as an allocation is, and alignment may change the last bit
            value = tensor.clone() if kind == "o" else tensor.to(device, copy=True)
            {"a": out.inputs, "g": out.grads, "o": out.offsets}[kind][layer] = value
        return out

    def holds_rotated(self) -> bool:
        """Whether any batch is held in the eigenbases."""
        return any(captured.rotated for captured in self._memory.values())

    def drop(self, kind: str) -> None:
        """Forget all batches captured with loss ``kind``."""
        for key in [k for k in self._memory if k[0] == kind]:
            self.memory_bytes -= self._memory.pop(key).nbytes
        for key in [k for k in self._disk if k[0] == kind]:
            path = self._disk.pop(key)
            self.disk_bytes -= path.stat().st_size
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Free everything."""
        self._memory.clear()
        self._disk.clear()
        self.memory_bytes = self.disk_bytes = 0
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


class PassSource:
    """The batches of one dataset under one model."""

    def __init__(
        self,
        session: TracingSession,
        data: PreparedExamples,
        batches: list[list[int]],
        cache: CaptureCache | None = None,
    ) -> None:
        self.session, self.data, self.batches, self.cache = session, data, batches, cache
        self.model_passes = 0
        self.replayed = 0

    def run(
        self,
        consumer_of: Callable[[int, list[int]], Consumer],
        loss: str,
        stage: str,
        start: int = 0,
        done: Callable[[int], None] | None = None,
        keep: bool = False,
    ) -> None:
        """Feed every batch from number ``start`` on to a consumer.

        Args:
            consumer_of: makes the consumer of a batch from its number and example indices.
            loss: ``train``, ``sampled`` or ``measurement``.
            stage: name shown as progress, counted in sequences.
            done: called after each batch with the number of batches finished.
            keep: put what is captured into the cache for later passes.
        """
        if loss not in ("train", "sampled", "measurement"):
            raise ConfigError(f"unknown loss '{loss}'")
        total = sum(len(b) for b in self.batches)
        with progress.stage(stage, total) as running:
            running.advance(sum(len(b) for b in self.batches[:start]))
            for number in range(start, len(self.batches)):
                indices = self.batches[number]
                self._one(number, indices, consumer_of(number, indices), loss, keep)
                running.advance(len(indices))
                if done is not None:
                    done(number + 1)

    def _one(self, number: int, indices: list[int], consumer: Consumer, loss: str, keep: bool) -> None:
        key = (loss, number)
        if self.cache is not None and key in self.cache:
            self.replayed += 1
            captured = self.cache.load(key, self.session.device)
            consumer.rotated = captured.rotated
            self._replay(captured, consumer)
            consumer.finish_batch()
            rotated = consumer.take_rotated()
            if rotated is not None:
                self.cache.replace(key, rotated)
            return
        consumer.rotated = False
        self.model_passes += 1
        batch = self.data.batch(indices, self.session.device)
        if keep and self.cache is not None and self.cache.wants_more():
            recorder = Recorder(consumer)
            self.session.run(batch, recorder, loss)
            self.cache.store(key, recorder.captured)
        else:
            self.session.run(batch, consumer, loss)
        consumer.finish_batch()

    def _replay(self, captured: CapturedBatch, consumer: Consumer) -> None:
        seen: set[str] = set()
        for layer in self._in_capture_order(captured):
            group = self.session.groups.of_layer[layer.name]
            first = group not in seen
            seen.add(group)
            a, g, offsets = captured.inputs[group], captured.grads[layer.name], captured.offsets[layer.name]
            consumer.consume(layer, group, first, a, g, offsets)

    def _in_capture_order(self, captured: CapturedBatch) -> Iterator:
        by_name = {layer.name: layer for layer in self.session.selection.layers}
        # The order in which the backward delivered them: replays must add in the same order to be bit-identical.
        for name in captured.grads:
            yield by_name[name]
