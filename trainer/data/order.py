"""Which sample comes when: a pure function of the seed and the step.

The samples of optimiser step s are entries s·B … (s + 1)·B − 1 of an endless list, in which every epoch is a
new permutation. Nothing depends on the number of processes or workers, and going on at step s is starting
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from torch import Tensor

from . import randomness

Entry = tuple[int, int]
"""Index of a sample, and its visit: how often it came before."""


class GlobalBatches:
    """A batch sampler that yields this process's part of each global batch, from a step on.

    The global batch is split into ``accumulation`` parts, one after the other, and each part into one share a
    process; so the same samples make up every optimiser step at any number of processes. Do not pass the
    loader through ``accelerator.prepare``: it would shard a second time.

    Args:
        count: number of samples.
        batch_size: samples of one optimiser step over all processes.
        seed: of the order.
        steps: optimiser steps of the whole run.
        start: first step.
        repeat: how often a sample comes in one epoch.
        accumulation: parts of one optimiser step.
        process, processes: index and number of the training processes.

    Raises:
        ValueError: no samples, or a batch that does not divide by processes × accumulation.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        steps: int,
        *,
        start: int = 0,
        repeat: int = 1,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if count < 1:
            raise ValueError("there are no samples to train on")
        if batch_size % (processes * accumulation):
            raise ValueError(
                f"train.batch_size is {batch_size}, which does not divide by {processes} process(es) × "
                f"{accumulation} accumulation part(s)"
            )
        if not 0 <= process < processes:
            raise ValueError(f"process {process} of {processes} does not exist")
        self.count, self.batch_size, self.seed, self.repeat = count, batch_size, seed, repeat
        self.steps, self.start, self.accumulation = steps, start, accumulation
        self.process, self.processes = process, processes
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        return randomness.permutation(self.count * self.repeat, self.seed, "order", epoch)

    def entry(self, position: int) -> Entry:
        """The entry at a position of the endless list."""
        epoch, place = divmod(position, self.count * self.repeat)
        index = int(self._epoch(epoch)[place])
        return index % self.count, epoch * self.repeat + index // self.count

    def global_batch(self, step: int) -> list[Entry]:
        """All samples of an optimiser step, over all processes."""
        first = step * self.batch_size
        return [self.entry(position) for position in range(first, first + self.batch_size)]

    def __iter__(self) -> Iterator[list[Entry]]:
        share = self.batch_size // (self.processes * self.accumulation)
        for step in range(self.start, self.steps):
            batch = self.global_batch(step)
            for part in range(self.accumulation):
                first = (part * self.processes + self.process) * share
                yield batch[first : first + share]

    def __len__(self) -> int:
        return max(self.steps - self.start, 0) * self.accumulation

    def __getstate__(self) -> dict:
        # The cache of permutations cannot be pickled, and workers started by spawn need no copy of it.
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._permutation)
