"""Photos of other shapes than a square: which size each is trained at, and batches of one size.

The plan is a pure function of the seed and the step, like that of squares. The photos of a bucket are gone through in
epochs of their own, each a new permutation. In an epoch of the whole a bucket has the batches that its photos have
filled by its end and had not before: what is left over of one epoch begins the next one, and no photo is left out or
comes twice. The batches of all buckets come in an order drawn for that epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TrainerError
from . import pictures
from .order import Entry, GlobalBatches, draw_from_part, shuffle_parts
from .pictures import Size

if TYPE_CHECKING:
    from ..config import DataSettings
    from .record import Record
    from .records import Records


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are trained at.

    Args:
        sizes: width and height in pixels; the square is among them.
        square: its place there.
    """

    sizes: tuple[Size, ...]
    square: int = 0

    @classmethod
    def of(cls, settings: DataSettings) -> Buckets:
        """Of ``data.resolution``: the square alone, or with ``data.bucket_step`` the largest pictures of at most its
        area whose sides are multiples of the step, up to ``data.bucket_ratio``."""
        return _buckets(settings.resolution, settings.bucket_step, settings.bucket_ratio)

    @cached_property
    def _shapes(self) -> np.ndarray:
        return np.log([width / height for width, height in self.sizes])

    def assign(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """The bucket of photos of these sizes, ``(N,)`` int16: the nearest shape by the logarithm of its ratio; the
        square for a size of 0, which nobody knows."""
        known = (widths > 0) & (heights > 0)
        shapes = np.log(np.where(known, widths, 1) / np.where(known, heights, 1))
        found = np.empty(len(shapes), np.int16)
        for start in range(0, len(shapes), 65536):
            part = slice(start, start + 65536)
            found[part] = np.abs(shapes[part, None] - self._shapes).argmin(1)
        return np.where(known, found, self.square).astype(np.int16)

    def size_of(self, record: Record) -> Size:
        """What a photo is trained at."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        width, height = photo_size(record) or (0, 0)
        return self.sizes[int(self.assign(np.array([width]), np.array([height]))[0])]

    def of_records(self, records: Records) -> np.ndarray:
        """The bucket of each photo, ``(N,)`` int16. Photos whose size the manifest does not say are opened."""
        if len(self.sizes) == 1:
            return np.zeros(len(records), np.int16)
        sizes = records.photo_sizes()
        for index in np.flatnonzero((sizes == 0).any(1)).tolist():
            sizes[index] = photo_size(records[index]) or (0, 0)
        return self.assign(sizes[:, 0], sizes[:, 1])


@lru_cache(maxsize=8)
def _buckets(side: int, step: int | None, ratio: float) -> Buckets:
    if step is None:
        return Buckets(((side, side),))
    upright = []
    for width in range(step, side + 1, step):
        height = side * side // (width * step) * step
        if height <= ratio * width:
            upright.append((width, height))
    sizes = sorted({*upright, *((height, width) for width, height in upright)})
    return Buckets(tuple(sizes), sizes.index((side, side)))


def photo_size(record: Record) -> Size | None:
    """Width and height of a record's photo, from the manifest or from the file; None if that cannot be read."""
    if record.width and record.height:
        return record.width, record.height
    return pictures.size_of(record.path)


def parts_by_bucket(buckets: np.ndarray, chosen: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The chosen photos of each bucket that has any.

    Args:
        buckets: of all photos.
        chosen: indices of the photos to train on.
    """
    photos = np.asarray(chosen)
    return tuple(photos[buckets[photos] == bucket] for bucket in np.unique(buckets[photos]))


@dataclass(frozen=True)
class TensorShapes:
    """What the dataset has to know of the frozen model.

    Args:
        latent: shape of one sample's latents and noise, those of the square.
        cell: side of a latent cell in pixels.
        timesteps: number of timesteps of the noise schedule.
        others: the same shape at other sizes of the picture.
    """

    latent: tuple[int, ...] = (4, 64, 64)
    cell: int = 8
    timesteps: int = 1000
    others: Mapping[Size, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Any, resolution: int, buckets: Buckets | None = None) -> TensorShapes:
        """The shapes of a :class:`~trainer.models.frozen_model.FrozenModel` at a resolution, and at the buckets.

        Raises:
            TrainerError: it cannot be trained at them.
        """
        sizes, steps = () if buckets is None else buckets.sizes, base.scheduler.config.num_train_timesteps
        if len(sizes) > 1 and base.family == "unidiffuser":
            raise TrainerError("data.bucket_step: UniDiffuser knows squares only; set data.bucket_step=null")
        odd = [side for size in sizes[1:] for side in size if side % base.cell]
        if odd:
            raise TrainerError(
                f"data.bucket_step makes a side of {odd[0]}; {base.name} needs a multiple of {base.cell}, best of 64"
            )
        others = {(width, height): tuple(base.latent_shape(height, width)) for width, height in sizes}
        return cls(tuple(base.latent_shape(resolution, resolution)), base.cell, steps, others)

    def at(self, size: Size) -> tuple[int, ...]:
        """The shape of latents and noise of a picture of a size."""
        return self.others.get(size, self.latent)


@dataclass(frozen=True)
class BucketedBatches(GlobalBatches):
    """Batches of one bucket each; an optimiser step, over all processes and accumulation parts, is of one bucket.

    Args:
        parts: indices of the photos of each bucket, at least one in each.
    """

    parts: tuple[np.ndarray, ...] = ()

    def _before(self, epoch: int) -> tuple[int, ...]:
        """Batches of each bucket before an epoch."""
        return tuple(len(part) * self.repeat * epoch // self.batch_size for part in self.parts)

    def global_batch(self, step: int) -> list[Entry]:
        """All samples of an optimiser step, over all processes."""
        epoch = step * self.batch_size // (self.count * self.repeat)  # not too late: batches are rounded down
        while sum(self._before(epoch + 1)) <= step:
            epoch += 1
        before, after = self._before(epoch), self._before(epoch + 1)
        counts = tuple(b - a for a, b in zip(before, after, strict=True))
        buckets, ranks = shuffle_parts(counts, self.seed, "buckets", epoch)
        slot = step - sum(before)
        bucket = int(buckets[slot])
        first = (before[bucket] + int(ranks[slot])) * self.batch_size
        key = self.seed, "order of a bucket", bucket
        return [
            draw_from_part(self.parts[bucket], position, self.repeat, *key)
            for position in range(first, first + self.batch_size)
        ]
