"""Which sample comes when: a pure function of the seed and the step.

The samples of optimiser step s are entries s·B … (s + 1)·B − 1 of an endless list, in which every epoch is a
new permutation. Nothing depends on the number of processes or workers, and going on at step s is starting
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from ..errors import TrainerError
from . import randomness

MOST_SAMPLES = 10**8
"""Of an epoch: their order is 0.4 GB."""
Entry = tuple[int, int]
"""Index of a sample, and its visit: how often it came before."""


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> Tensor:
    return randomness.permutation(length, seed, "order", epoch)


@lru_cache(maxsize=4)
def shuffle_parts(counts: tuple[int, ...], *key: randomness.Key) -> tuple[np.ndarray, np.ndarray]:
    """So many turns of each part, in an order of their own for every key.

    Returns:
        For each turn, whose it is, and how many turns before it are the same part's; both ``(sum of counts,)``.
    """
    order = randomness.permutation(sum(counts), *key).numpy()
    part = np.repeat(np.arange(len(counts)), counts)[order]
    rank = np.zeros(len(part), np.int64)
    for one, count in enumerate(counts):
        rank[part == one] = np.arange(count)
    return part, rank


@lru_cache(maxsize=64)
def _order_of_part(length: int, *key: randomness.Key) -> np.ndarray:
    return randomness.permutation(length, *key).numpy()


def draw_from_part(photos: Sequence[int], position: int, repeat: int, *key: randomness.Key) -> Entry:
    """An entry of the endless list of one part's photos, which is gone through in epochs of its own.

    Args:
        photos: indices of the part's photos.
        position: in the list.
        repeat: how often a photo comes in one epoch.
        key: of the list; a new permutation for each epoch comes of it.
    """
    epoch, offset = divmod(position, len(photos) * repeat)
    place = int(_order_of_part(len(photos) * repeat, *key, epoch)[offset])
    visit, index = divmod(place, len(photos))
    return int(photos[index]), epoch * repeat + visit


@dataclass(frozen=True)
class GlobalBatches:
    """A batch sampler that yields this process's share of each global batch, from a step on.

    The global batch is split into ``accumulation`` micro-batches, one after the other, and each of them into one share
    a process; so the same samples make up every optimiser step at any number of processes. Do not pass the
    loader through ``accelerator.prepare``: it would shard a second time.

    Args:
        count: number of samples.
        batch_size: samples of one optimiser step over all processes.
        seed: of the order.
        steps: optimiser steps of the whole run.
        start: first step.
        repeat: how often a sample comes in one epoch.
        accumulation: micro-batches of one optimiser step.
        process, processes: index and number of the training processes.
        samples: index of each of the ``count`` samples in the data set; None takes 0 … count − 1.

    Raises:
        TrainerError: no samples, more than can be put in order, or a batch that does not divide by processes ×
            accumulation.
    """

    count: int
    batch_size: int
    seed: int
    steps: int
    start: int = 0
    repeat: int = 1
    accumulation: int = 1
    process: int = 0
    processes: int = 1
    samples: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise TrainerError("there are no samples to train on")
        if self.count * self.repeat > MOST_SAMPLES:
            raise TrainerError(
                f"data.repeat is {self.repeat}, which makes {self.count * self.repeat} samples an epoch of "
                f"{self.count} photos; at most {MOST_SAMPLES} can be put in order"
            )
        if self.batch_size % (self.processes * self.accumulation):
            raise TrainerError(
                f"train.batch_size is {self.batch_size}, which does not divide by {self.processes} process(es) × "
                f"{self.accumulation} accumulation part(s)"
            )

    def global_batch(self, step: int) -> list[Entry]:
        """All samples of an optimiser step, over all processes."""
        entries, length = [], self.count * self.repeat
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, offset = divmod(position, length)
            repeat, index = divmod(int(_order(length, self.seed, epoch)[offset]), self.count)
            index = index if self.samples is None else int(self.samples[index])
            entries.append((index, epoch * self.repeat + repeat))
        return entries

    def __iter__(self) -> Iterator[list[Entry]]:
        share = self.batch_size // (self.processes * self.accumulation)
        for step in range(self.start, self.steps):
            batch = self.global_batch(step)
            for micro_batch in range(self.accumulation):
                first = (micro_batch * self.processes + self.process) * share
                yield batch[first : first + share]

    def __len__(self) -> int:
        return max(self.steps - self.start, 0) * self.accumulation
