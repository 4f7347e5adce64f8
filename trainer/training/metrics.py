"""What a run reports: mean losses and other numbers between two log lines, gradient norm, speed.

Numbers stay on the device until they are logged, so a step reads nothing back. The same read finds losses that are no
numbers.
"""

from __future__ import annotations

import math
import time
from collections import Counter
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
    """Sums that add up over processes; plain Python, so that they can be sent around.

    Args:
        totals, counts: sum and number of the values of each name.
        bad: step and ids of the first forward pass with a loss that is no number.
    """

    samples: int = 0
    seconds: float = 0.0
    totals: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    bad: tuple[int, list[str]] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, values: Sequence[float]) -> None:
        """Count values in."""
        for value in values:
            self.totals[name] += value
            self.counts[name] += 1

    def add(self, step: int, record: Record) -> None:
        """Count a forward pass of an optimiser step in."""
        losses = record.losses.tolist()
        wrong = [row for row, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong and self.bad is None:
            self.bad = (step, [record.ids[row] for row in wrong if record.ids])
        self.put("loss", losses)
        for loss, names in zip(losses, record.groups, strict=False):
            for name in names:
                self.put(name, [loss])
        for name, values in record.values.items():
            self.put(name, values.tolist())
        self.samples += record.samples
        self.unreadable |= dict(record.unreadable)

    @classmethod
    def over_processes(cls, every: Iterable[Sums]) -> Sums:
        """The sums of all processes; the time is that of the slowest."""
        whole = cls()
        for sums in every:
            whole.samples += sums.samples
            whole.seconds = max(whole.seconds, sums.seconds)
            whole.totals.update(sums.totals)
            whole.counts.update(sums.counts)
            whole.unreadable |= sums.unreadable
            whole.bad = min((bad for bad in (whole.bad, sums.bad) if bad is not None), default=None)
        return whole

    def means(self) -> dict[str, float]:
        """Mean of each value, and ``samples per second``."""
        means = {name: self.totals[name] / self.counts[name] for name in sorted(self.counts)}
        return {**means, "samples per second": self.samples / max(self.seconds, 1e-9)}

    def check(self, kept: str) -> None:
        """Raises :class:`TrainingDiverged` when a loss was no number; ``kept`` names the last good checkpoint."""
        if self.bad is not None:
            step, ids = self.bad
            raise TrainingDiverged(
                f"the loss of step {step + 1} is not a number{', for ' if ids else ''}{', '.join(ids)}. Last good "
                f"checkpoint: {kept}. Look at those photos and masks, or lower optimiser.lr; with model.precision=fp16 "
                "try bf16"
            )


@dataclass
class Meter:
    """Collects what is reported between two log lines.

    Args:
        records: of the forward passes, with their optimiser step (from 0).
        norms: of the gradients before clipping.
        since: start of the time that counts; who does something else moves it on.
    """

    records: list[tuple[int, Record]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)

    def read(self) -> Sums:
        """Everything read back from the device."""
        sums = Sums(seconds=time.perf_counter() - self.since)
        for step, record in self.records:
            sums.add(step, record)
        sums.put("gradient norm", [float(norm) for norm in self.norms])
        return sums
