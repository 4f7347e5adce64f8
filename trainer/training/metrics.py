"""What a run reports: mean losses and other numbers between two log lines, gradient norm, speed.

Numbers stay on the device until they are logged, so a step reads nothing back. The same read finds losses that are no
numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import TrainerError


class TrainingDiverged(TrainerError):
    """A loss or a weight that is not a number: names the step and the samples."""


@dataclass(frozen=True)
class Record:
    """What one forward pass reports.

    Args:
        samples: how many went in, those that teach nothing included.
        losses: ``(rows,)`` without gradient, on any device; their mean is logged as ``loss``.
        ids: of the rows, to name those whose loss is no number.
        groups: for each row, other names under which its loss is averaged as well.
        values: other numbers to average, one tensor ``(n,)`` for each name.
        unreadable: samples that could not be read, with the reason.
    """

    samples: int
    losses: Tensor
    ids: Sequence[str] = ()
    groups: Sequence[Sequence[str]] = ()
    values: Mapping[str, Tensor] = field(default_factory=dict)
    unreadable: Iterable[tuple[str, str]] = ()


@dataclass
class Sums:
    """Sums that add up over processes; plain Python, so that it can be sent around.

    Args:
        totals: sum and count of the values of each name.
        bad: step and ids of the first forward pass with a loss that is no number.
    """

    samples: int = 0
    seconds: float = 0.0
    totals: dict[str, tuple[float, int]] = field(default_factory=dict)
    bad: tuple[int, list[str]] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, value: float, count: int = 1) -> None:
        """Count a value, or the sum of ``count`` values, in."""
        total, before = self.totals.get(name, (0.0, 0))
        self.totals[name] = (total + value, before + count)

    def add(self, step: int, record: Record) -> None:
        """Count a forward pass of an optimiser step in."""
        losses = record.losses.tolist()
        wrong = [row for row, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong and self.bad is None:
            self.bad = (step, [record.ids[row] for row in wrong] if record.ids else [])
        for row, loss in enumerate(losses):
            for name in ("loss", *(record.groups[row] if record.groups else ())):
                self.put(name, loss)
        for name, values in record.values.items():
            for value in values.tolist():
                self.put(name, value)
        self.samples += record.samples
        self.unreadable |= dict(record.unreadable)

    @classmethod
    def over_processes(cls, all_sums: Iterable[Sums]) -> Sums:
        """The sums of all processes; the time is that of the slowest."""
        whole = cls()
        for sums in all_sums:
            whole.samples += sums.samples
            whole.seconds = max(whole.seconds, sums.seconds)
            whole.unreadable |= sums.unreadable
            for name, (total, count) in sums.totals.items():
                whole.put(name, total, count)
            if sums.bad is not None and (whole.bad is None or sums.bad[0] < whole.bad[0]):
                whole.bad = sums.bad
        return whole

    def means(self) -> dict[str, float]:
        """Mean of each value, and ``samples per second``."""
        means = {name: total / count for name, (total, count) in sorted(self.totals.items())}
        return {**means, "samples per second": self.samples / max(self.seconds, 1e-9)}

    def check(self, kept: str) -> None:
        """Raises :class:`TrainingDiverged` when a loss was no number; ``kept`` names the last good checkpoint."""
        if self.bad is None:
            return
        step, ids = self.bad
        of = f", for {', '.join(ids)}" if ids else ""
        raise TrainingDiverged(
            f"the loss of step {step + 1} is not a number{of}. Last good checkpoint: {kept}. Look at those photos and "
            "masks, or lower optimiser.lr; with model.precision=fp16 try bf16"
        )


class Meter:
    """Collects what is reported between two log lines."""

    def __init__(self) -> None:
        self._records: list[tuple[int, Record]] = []
        self._norms: list[Tensor] = []
        self._since = time.perf_counter()

    def add(self, step: int, record: Record) -> None:
        """A forward pass of an optimiser step (from 0)."""
        self._records.append((step, record))

    def add_norm(self, norm: Tensor) -> None:
        """The norm of the gradient before clipping."""
        self._norms.append(norm.detach())

    def pause(self, seconds: float) -> None:
        """Leave time that was spent on something else out of the speed."""
        self._since += seconds

    def take(self) -> Sums:
        """Read everything back from the device, and start anew."""
        now = time.perf_counter()
        sums = Sums(seconds=now - self._since)
        for step, record in self._records:
            sums.add(step, record)
        for norm in self._norms:
            sums.put("gradient norm", float(norm))
        self._records, self._norms, self._since = [], [], now
        return sums
