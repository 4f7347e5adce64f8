"""Several data sets in fixed shares: a pure function of the seed and the step, like the order of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config.fields import as_path
from ..errors import TrainerError
from .manifest import read_rows
from .order import Entry, GlobalBatches, draw_from_part, shuffle_parts

if TYPE_CHECKING:
    from ..config import DataSettings

CYCLE = 1000
"""So many samples hold each data set's share exactly, in an order of their own each time."""


def slots(weights: Sequence[float]) -> tuple[int, ...]:
    """How many samples of a cycle each data set gets: its share, by largest remainders.

    Raises:
        TrainerError: a share that comes to less than one sample.
    """
    exact = [CYCLE * weight / sum(weights) for weight in weights]
    found = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: (found[part] - exact[part], part))
    for part in by_remainder[: CYCLE - sum(found)]:
        found[part] += 1
    for weight, count in zip(weights, found, strict=True):
        if not count:
            raise TrainerError(
                f"data.weights: {weight:g} of {sum(weights):g} is less than one sample in {CYCLE}; leave that manifest "
                "out, or give it more"
            )
    return tuple(found)


@dataclass(frozen=True)
class MixedBatches(GlobalBatches):
    """Batches of several data sets; each is gone through in epochs of its own.

    Args:
        parts: indices of the photos of each data set.
        weights: of the data sets; in every :data:`CYCLE` samples each has its share exactly.

    Raises:
        TrainerError: a data set without photos, or with too small a share; and as :class:`GlobalBatches`.
    """

    parts: tuple[Sequence[int], ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.parts) != len(self.weights):
            raise TrainerError(f"data.weights has {len(self.weights)} numbers for {len(self.parts)} manifests")
        for number, part in enumerate(self.parts, 1):
            if not len(part):
                raise TrainerError(f"data.weights: manifest {number} has no photos to train on")
        slots(self.weights)

    def global_batch(self, step: int) -> list[Entry]:
        """All samples of an optimiser step, over all processes."""
        entries, counts = [], slots(self.weights)
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            cycle, slot = divmod(position, CYCLE)
            owners, ranks = shuffle_parts(counts, self.seed, "mixture", cycle)
            part = int(owners[slot])
            drawn = cycle * counts[part] + int(ranks[slot])
            entries.append(draw_from_part(self.parts[part], drawn, self.repeat, self.seed, "order of a part", part))
        return entries


def count_rows(settings: DataSettings, photos: int) -> list[int]:
    """Photos of each manifest.

    Raises:
        TrainerError: weights for another number of manifests, or photos of which it is not known where they come from.
    """
    manifests = [settings.manifest] if isinstance(settings.manifest, str) else settings.manifest
    if len(settings.weights) != len(manifests):
        raise TrainerError(f"data.weights has {len(settings.weights)} numbers for {len(manifests)} manifest(s)")
    if settings.shards is not None:
        raise TrainerError(
            "data.weights: shards do not say which manifest a photo is of; train with data.cache instead"
        )
    counts = [len(read_rows(as_path(manifest, "data.manifest"))) for manifest in manifests]
    if sum(counts) != photos:
        raise TrainerError(
            f"data.weights: the manifests have {sum(counts)} rows, of which {photos} can be used. Which manifest the "
            "others are of is not known: repair the manifests"
        )
    return counts


def parts_of(counts: Sequence[int], chosen: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The chosen photos of each data set.

    Args:
        counts: photos of each, one after the other.
        chosen: indices of the photos to train on.
    """
    ends = np.cumsum(counts)
    places = np.searchsorted(ends, np.asarray(chosen), side="right")
    return tuple(np.asarray(chosen)[places == part] for part in range(len(counts)))
