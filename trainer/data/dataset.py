"""From a manifest to batches. Every draw derives from (seed, sample id, visit) alone.

    records = open_manifest(config.data.manifest, config.data.root, config.data.drop_missing, folders)
    dataset = FaceDataset(records, config, TensorShapes.of(base, config.data.resolution), cache)
    train = config.train
    order = GlobalBatches(len(dataset), train.batch_size, train.seed, train.steps, start=step, …)
    for batch in make_loader(dataset, order, workers=config.data.workers): ...

The loader yields ``config.optimiser.accumulation`` batches an optimiser step. A visit is how often the sample
came before, so it counts epochs.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from feedface_core.errors import FeedFaceError

from ..errors import TrainerError
from . import pictures, randomness
from .batch import collate
from .buckets import Buckets, TensorShapes, parts_by_bucket
from .faces import Place, place_faces
from .manifest import Record
from .order import Entry, GlobalBatches
from .pictures import Size
from .reading import OpenPhoto, read_background, read_picture, read_reference
from .records import Records
from .references import Reference, References
from .shards import DamagedShard
from .signals import leave_signals_to_parent

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..config import Config

logger = logging.getLogger(__name__)

REPLACEMENTS = 20
"""So many samples are tried in place of one that cannot be read."""


class _Unreadable(Exception):
    """A photo, crop or mask that cannot be read: id of its record, and the reason, which names the file."""


class CachedFeatures(Protocol):
    """Where features are taken from instead of photos: :class:`trainer.models.feature_cache.FeatureCache`,
    :class:`trainer.data.shards.ShardedFeatures`."""

    def sample(
        self, index: int, caption: str, flip: bool, references: Sequence[Reference], background: bool = False
    ) -> dict[str, Any]:
        """Moments and mask of a photo, hidden states of its references and, when asked for, of the photo without its
        face, and text states, as ``collate`` names them."""


@dataclass(frozen=True)
class Draws:
    """The random choices of one visit of one sample.

    Args:
        timestep: 0 … timesteps − 1.
        drop_face: the face is dropped: no references are loaded.
        drop_text: the caption is replaced by the empty one.
        standard_loss: the sample is trained without its mask.
        flip: photo and mask are mirrored.
        references: the face crops, none if the face is dropped.
        people: how many of them are of each person in the picture, one after the other.
        faces: where these people are; empty where nobody asks.
        drop_background: the photo without its face is dropped, or not wanted at all.
    """

    timestep: int
    drop_face: bool
    drop_text: bool
    standard_loss: bool
    flip: bool
    references: tuple[Reference, ...]
    people: tuple[int, ...]
    faces: tuple[Place, ...] = ()
    drop_background: bool = True


class FaceDataset(torch.utils.data.Dataset):
    """Samples by ``(index, visit)``. In place of one that cannot be read comes another, drawn from the seed, its id and
    the visit; so the batches are the same however often a run is stopped, and at any number of workers and processes.

    Args:
        records: the photos.
        config: the settings; ``data``, ``loss``, ``adapter.encoder.image_size`` and ``train.seed`` are read.
        shapes: of the frozen model.
        cache: features of exactly these records (:func:`trainer.models.feature_cache.open_cache`); None reads photos.

    Attributes:
        chosen: indices of the photos that may take the place of one that cannot be read.
    """

    def __init__(
        self, records: Sequence[Record], config: Config, shapes: TensorShapes, cache: CachedFeatures | None = None
    ) -> None:
        self.records, self.shapes, self.cache = Records.of(records), shapes, cache
        self.data, self.loss, self.seed = config.data, config.loss, config.train.seed
        self.chosen: Sequence[int] = range(len(self.records))
        self.buckets = Buckets.of(config.data)
        self.crop_size, self.background = config.adapter.encoder.image_size, config.adapter.background
        self.references = References(self.records, config.data)
        self._one_person = config.adapter.text_tokens is not None  # the text's tokens know no regions
        self._places = config.loss.identity.active  # whether anybody asks where the faces are
        self._always_crops = config.loss.identity.sees_crops  # which the cache does not hold
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def bucket_of(self) -> np.ndarray:
        """The bucket of each photo, ``(N,)``."""
        return self.buckets.of_records(self.records)

    def size_of(self, index: int) -> Size:
        """What a photo is trained at."""
        return self.buckets.sizes[0 if len(self.buckets.sizes) == 1 else int(self.bucket_of[index])]

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of the data it was trained on."""
        return {"photos": len(self), "fingerprint": self.records.fingerprint}

    def draws(self, index: int, visit: int) -> Draws:
        """All random choices of a visit of a sample, except for its noise."""
        name, seed, loss = self.records[index].id, self.seed, self.loss

        def chance(probability: float, purpose: str) -> bool:
            return randomness.chance(probability, seed, purpose, name, visit)

        drop_face, flip = chance(loss.face_dropout, "drop face"), self.data.flip and chance(0.5, "flip")
        shown, places = self.shown(index, flip)
        drawn = [] if drop_face else [self.references.draw(face, seed, visit) for face in shown]
        return Draws(
            timestep=randomness.integer(self.shapes.timesteps, seed, "timestep", name, visit),
            drop_face=drop_face,
            drop_text=chance(loss.text_dropout, "drop text"),
            standard_loss=loss.kind == "standard" or chance(loss.standard_probability, "standard loss"),
            flip=flip,
            references=tuple(reference for own in drawn for reference in own),
            people=tuple(map(len, drawn)),
            faces=places,
            drop_background=not self.background or chance(loss.background_dropout, "drop background"),
        )

    def shown(self, index: int, flip: bool) -> tuple[Sequence[int], tuple[Place, ...]]:
        """The records of the people whom a sample's picture shows, its own first, and where they are."""
        record = self.records[index]
        faces = [index] if record.face_count == 1 or self._one_person else self.records.faces_of(index)
        if len(faces) == 1 and not self._places:
            return faces, ()
        with _reading(record):
            places = place_faces([self.records[face] for face in faces], self.data, flip)
        kept = [place for place, found in enumerate(places) if place == 0 or found.square is not None]
        if places[0].square is None and len(kept) > 1:  # it is somebody else's picture
            kept = kept[1:]
        return [faces[place] for place in kept], tuple(places[place] for place in kept)

    def __getitem__(self, entry: Entry) -> dict[str, Any]:
        """The sample, with id and reason of the photos that could not be read as ``unreadable``.

        Raises:
            TrainerError: if none of :data:`REPLACEMENTS` other samples can be read either.
        """
        index, visit = entry
        name, unreadable = self.records[index].id, []
        for attempt in range(REPLACEMENTS + 1):
            try:
                return {**self._sample(index, visit), "unreadable": unreadable}
            except _Unreadable as error:
                unreadable.append(error.args)
            others = self._of_one_size(index)
            place = randomness.integer(len(others), self.seed, "replacement", name, visit, attempt)
            index = int(others[place])
        raise TrainerError(
            f"sample {name} cannot be read, nor can any of {REPLACEMENTS} others in its place; the last reason: "
            f"{unreadable[-1][1]}"
        )

    def _of_one_size(self, index: int) -> Sequence[int]:
        """The photos that may take the place of another in its batch."""
        if len(self.buckets.sizes) == 1:
            return self.chosen
        parts = parts_by_bucket(self.bucket_of, self.chosen)
        return next(part for part in parts if self.bucket_of[part[0]] == self.bucket_of[index])

    def _sample(self, index: int, visit: int) -> dict[str, Any]:
        record, draws, size = self.records[index], self.draws(index, visit), self.size_of(index)
        caption = "" if draws.drop_text else record.caption
        if self.cache is None:
            sample = self._read(record, draws, size)
        else:
            try:
                sample = self.cache.sample(index, caption, draws.flip, draws.references, not draws.drop_background)
            except DamagedShard as error:
                raise _Unreadable(error.shard, str(error)) from error
            if self._always_crops:
                sample["crops"] = self._read_references(draws)
        # Inside an empty mask there is nothing to learn from: a loss normalised by its area would be 0 / 0.
        empty = float(sample["mask"].sum()) == 0.0
        if empty and record.id not in self._warned:
            self._warned.add(record.id)
            logger.warning("sample %s: the mask is empty inside the training square; standard loss", record.id)
        return {
            "id": record.id,
            "visit": visit,
            "caption": caption,
            "draws": dataclasses.replace(draws, standard_loss=True) if empty else draws,
            "noise": randomness.normal(self.shapes.at(size), self.seed, "noise", record.id, visit),
            "latent_noise": randomness.normal(self.shapes.at(size), self.seed, "latents", record.id, visit),
            **sample,
        }

    def _read(self, record: Record, draws: Draws, size: Size) -> dict[str, Any]:
        open_photo = cache(pictures.open_photo)  # the reference may be cut from the same photo
        with _reading(record):
            pixels, mask = read_picture(record, size, self.data.crop, self.shapes.cell, open_photo)
        if draws.flip:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        sample = {"pixels": pixels, "mask": mask, "crops": self._read_references(draws, open_photo)}
        if not draws.drop_background:
            with _reading(record):
                background = read_background(record, self.crop_size, self.data.crop, open_photo)
            sample["background"] = background.flip(1) if draws.flip else background
        return sample

    def _read_references(self, draws: Draws, open_photo: OpenPhoto = pictures.open_photo) -> list[Tensor]:
        crops = []
        for reference in draws.references:
            record, augmentation = self.records[reference.index], self.references.augmentation(reference)
            with _reading(record):
                crops.append(read_reference(record, self.crop_size, reference.flip, augmentation, open_photo))
        return crops


@contextmanager
def _reading(record: Record) -> Iterator[None]:
    try:
        yield
    except (FeedFaceError, OSError) as error:
        raise _Unreadable(record.id, str(error)) from error


def make_loader(dataset: FaceDataset, order: GlobalBatches, workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """The batches of this process, in order. They do not depend on the number of workers."""
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global state
    )


def _start_worker(worker: int) -> None:
    # Workers are the parallelism; threads of their own would fight over the same cores.
    torch.set_num_threads(1)
    leave_signals_to_parent()
