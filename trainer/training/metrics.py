"""What a run reports: losses by kind and by timestep, mask area, gradient norm, speed.

Losses stay on the device until they are logged, so a step reads nothing back. The same read finds losses that
are no numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data.jsonl import keep_lines

BUCKETS = 4


class TrainingDiverged(RuntimeError):
    """A loss that is not a number: names the step and the samples."""


@dataclass(frozen=True)
class StepRecord:
    """The trained rows of one forward pass.

    Args:
        step: optimiser step.
        ids, kinds, timesteps, areas: for each row.
        losses: ``(rows,)`` on the device.
    """

    step: int
    ids: Sequence[str]
    kinds: Sequence[str]
    timesteps: Sequence[int]
    areas: Sequence[float]
    losses: Tensor


@dataclass
class Meter:
    """Collects the steps between two log lines.

    Args:
        timesteps: length of the noise schedule.
    """

    timesteps: int
    _records: list[StepRecord] = field(default_factory=list)
    _norms: list[Tensor] = field(default_factory=list)
    _unreadable: dict[str, str] = field(default_factory=dict)
    _samples: int = 0
    _since: float = field(default_factory=time.perf_counter)

    def add(self, record: StepRecord, samples: int) -> None:
        """One forward pass, and how many samples it took on this process (those that teach nothing
        included).
        """
        self._records.append(record)
        self._samples += samples

    def add_norm(self, norm: Tensor) -> None:
        """The norm of the gradient before clipping."""
        self._norms.append(norm.detach())

    def add_unreadable(self, photos: Iterable[tuple[str, str]]) -> None:
        """Photos that could not be read, by id, with the reason."""
        self._unreadable.update(photos)

    def take(self) -> Sums:
        """Read everything back from the device in one go, and start anew."""
        losses = torch.cat([record.losses for record in self._records]) if self._records else torch.zeros(0)
        norms = torch.stack(self._norms) if self._norms else torch.zeros(0)
        values, norms = losses.float().cpu().tolist(), norms.float().cpu().tolist()
        now = time.perf_counter()
        sums = Sums(samples=self._samples, seconds=now - self._since, unreadable=self._unreadable)
        place = 0
        for record in self._records:
            own = values[place : place + len(record.ids)]
            place += len(record.ids)
            sums.add(record, own, self.timesteps)
        for norm in norms:
            sums.put("gradient norm", norm)
        self._records, self._norms, self._samples, self._since = [], [], 0, now
        self._unreadable = {}
        return sums

    def pause(self, seconds: float) -> None:
        """Leave time that was spent on something else out of the speed."""
        self._since += seconds


@dataclass
class Sums:
    """Sums that add up over processes; plain Python, so that it can be sent around.

    Args:
        bad: step and sample ids of the first forward pass whose loss is no number.
        unreadable: photos that could not be read, by id, with the reason.
    """

    samples: int = 0
    seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bad: tuple[int, list[str]] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, value: float) -> None:
        """Count a value in."""
        self.totals[name] += value
        self.counts[name] += 1

    def add(self, record: StepRecord, losses: Sequence[float], timesteps: int) -> None:
        """Count the rows of one forward pass in."""
        wrong = [name for name, loss in zip(record.ids, losses, strict=True) if not math.isfinite(loss)]
        if wrong and self.bad is None:
            self.bad = (record.step, wrong)
        for kind, timestep, area, loss in zip(record.kinds, record.timesteps, record.areas, losses, strict=True):
            self.put("loss", loss)
            self.put(f"loss by kind/{kind}", loss)
            bucket = timestep * BUCKETS // timesteps
            first, last = -(-bucket * timesteps // BUCKETS), -(-(bucket + 1) * timesteps // BUCKETS) - 1
            self.put(f"loss by timestep/{first:04d} to {last:04d}", loss)
            self.put("mask area", area)

    @staticmethod
    def over_processes(parts: Iterable[Sums]) -> Sums:
        """The sums of all processes; the time is that of the slowest."""
        total = Sums()
        for part in parts:
            total.samples += part.samples
            total.seconds = max(total.seconds, part.seconds)
            total.unreadable |= part.unreadable
            for name in part.totals:
                total.totals[name] += part.totals[name]
                total.counts[name] += part.counts[name]
            if part.bad is not None and (total.bad is None or part.bad[0] < total.bad[0]):
                total.bad = part.bad
        return total

    def means(self) -> dict[str, float]:
        """Mean of each value, and ``samples per second``."""
        means = {name: self.totals[name] / self.counts[name] for name in sorted(self.totals)}
        means["samples per second"] = self.samples / max(self.seconds, 1e-9)
        return means

    def check(self, kept: str) -> None:
        """Raises :class:`TrainingDiverged` when a loss was no number; ``kept`` names the last good
        checkpoint.
        """
        if self.bad is None:
            return
        step, ids = self.bad
        raise TrainingDiverged(
            f"the loss of step {step + 1} is not a number, for {', '.join(ids)}. Last good checkpoint: {kept}. Look at "
            "those photos and masks, or lower optimiser.lr; with model.precision=fp16 try bf16"
        )


class LogFile:
    """One JSON object a log line, beside what the tracker shows."""

    def __init__(self, path: Path):
        self._path = path

    def cut(self, step: int) -> None:
        """Delete what a run that was killed logged after its last checkpoint, at this step: it comes again."""
        if self._path.is_file():
            keep_lines(self._path, lambda line: isinstance(line, dict) and line.get("step", math.inf) <= step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
