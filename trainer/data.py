"""From a manifest to batches. Every draw derives from (seed, sample id, visit) alone.

    records, dropped = read_manifest(config.data.manifest, config.data.root, config.data.drop_missing)
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from feedface_core.faces import FaceError, resample

from . import pictures, randomness
from .manifest import Record
from .order import Entry, GlobalBatches
from .retrieval import References
from .stopping import leave_signals_to_parent

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from .config import Config

logger = logging.getLogger(__name__)


class DataError(RuntimeError):
    """A sample that cannot be made: names the sample and the file."""


class CachedFeatures(Protocol):
    """What the dataset reads from a cache, by the index of the record."""

    def moments(self, index: int, flip: bool) -> tuple[Tensor, Tensor]:
        """Moments of the photo and its mask ``(1, h, w)``."""

    def text(self, index: int) -> dict[str, Tensor]:
        """Text states of the caption, without batch dimension."""

    def null_text(self) -> dict[str, Tensor]:
        """Text states of the empty caption."""

    def hidden(self, index: int, flip: bool) -> Tensor:
        """Hidden states ``(T, E)`` of the face crop."""


@dataclass(frozen=True)
class TensorShapes:
    """What the dataset has to know of the base and the encoder.

    Args:
        latent: shape of one sample's latents and noise.
        cell: side of a latent cell in pixels.
        timesteps: number of timesteps of the noise schedule.
    """

    latent: tuple[int, ...] = (4, 64, 64)
    cell: int = 8
    timesteps: int = 1000

    @classmethod
    def of(cls, base: Any, resolution: int) -> TensorShapes:
        """The shapes of a :class:`trainer.bases.Base` at a resolution."""
        return cls(tuple(base.latent_shape(resolution, resolution)), base.cell, base.schedule.steps)


@dataclass(frozen=True)
class Draws:
    """The random choices of one visit of one sample.

    Args:
        timestep: 0 … timesteps − 1.
        drop_face: the face is dropped: no references are loaded.
        drop_text: the caption is replaced by the empty one.
        standard_loss: the sample is trained without its mask.
        flip: photo and mask are mirrored.
        references: indices of the reference photos, empty if the face is dropped.
        flip_references: for each reference, whether its crop is mirrored.
    """

    timestep: int
    drop_face: bool
    drop_text: bool
    standard_loss: bool
    flip: bool
    references: tuple[int, ...]
    flip_references: tuple[bool, ...]


@dataclass
class Batch:
    """Samples of one forward pass, B of them with R references in all.

    Args:
        ids: sample ids.
        visits: how often each sample came before.
        captions: texts, empty where dropped.
        text: cached text states, each ``(B, …)``, the empty caption's where dropped; or None.
        pixels: ``(B, 3, H, W)`` in −1…1, or None with a cache.
        moments: cached moments ``(B, …)``, or None.
        crops: face crops ``(R, S, S, 3)`` in 0…1 in the order of the samples; None with a cache or with R =
            0.
        hidden: cached hidden states ``(R, T, E)``, or None likewise.
        reference_counts: references of each sample; 0 where the face is dropped.
        masks: ``(B, 1, h, w)`` in 0…1 over latent cells.
        noise: ``(B, *latent)`` standard normal.
        latent_noise: the same, for sampling the latents from their moments.
        timesteps: ``(B,)`` int64.
        drop_face, drop_text, standard_loss: a decision for each sample, as plain lists: no device is read
            back.
    """

    ids: list[str]
    visits: list[int]
    captions: list[str]
    text: dict[str, Tensor] | None
    pixels: Tensor | None
    moments: Tensor | None
    crops: Tensor | None
    hidden: Tensor | None
    reference_counts: list[int]
    masks: Tensor
    noise: Tensor
    latent_noise: Tensor
    timesteps: Tensor
    drop_face: list[bool]
    drop_text: list[bool]
    standard_loss: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    def _with_tensors(self, change) -> Batch:
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = change(value)
            elif isinstance(value, dict):
                value = {name: change(tensor) for name, tensor in value.items()}
            values[field.name] = value
        return Batch(**values)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())


class FaceDataset(torch.utils.data.Dataset):
    """Samples by ``(index, visit)``.

    Args:
        records: the photos.
        config: the settings; ``data``, ``loss``, ``adapter.encoder.image_size`` and ``train.seed`` are read.
        shapes: of the base.
        cache: precomputed features of exactly these records, or None to read the photos.
    """

    def __init__(
        self,
        records: Sequence[Record],
        config: Config,
        shapes: TensorShapes,
        cache: CachedFeatures | None = None,
    ) -> None:
        self.records, self.shapes, self.cache = list(records), shapes, cache
        self.data, self.loss, self.seed = config.data, config.loss, config.train.seed
        self._warned: set[str] = set()
        self.crop_size = config.adapter.encoder.image_size
        data = config.data
        self.references = References(self.records, data.references, data.retrieval, data.duplicate_distance)

    def __len__(self) -> int:
        return len(self.records)

    def draws(self, index: int, visit: int) -> Draws:
        """All random choices of a visit of a sample, except for its noise."""
        name, seed, loss = self.records[index].id, self.seed, self.loss
        drop_face = randomness.chance(loss.face_dropout, seed, "drop face", name, visit)
        references = () if drop_face else tuple(self.references.draw(index, seed, visit))
        return Draws(
            timestep=randomness.integer(self.shapes.timesteps, seed, "timestep", name, visit),
            drop_face=drop_face,
            drop_text=randomness.chance(loss.text_dropout, seed, "drop text", name, visit),
            standard_loss=loss.kind == "standard"
            or randomness.chance(loss.standard_probability, seed, "standard loss", name, visit),
            flip=self.data.flip and randomness.chance(0.5, seed, "flip", name, visit),
            references=references,
            flip_references=tuple(
                self.data.flip and randomness.chance(0.5, seed, "flip reference", name, visit, place)
                for place in range(len(references))
            ),
        )

    def __getitem__(self, entry: Entry) -> dict[str, Any]:
        index, visit = entry
        record = self.records[index]
        draws = self.draws(index, visit)
        try:
            sample = self._read(index, draws) if self.cache is None else self._recall(index, draws)
        except (pictures.PictureError, FaceError, OSError) as error:
            raise DataError(f"sample {record.id}: {error}") from error
        # Inside an empty mask there is nothing to learn from: a loss normalised by its area would be 0 / 0.
        empty = float(sample["mask"].sum()) == 0.0
        if empty and record.id not in self._warned:
            self._warned.add(record.id)
            logger.warning("sample %s: the mask is empty inside the training square; standard loss", record.id)
        return {
            "id": record.id,
            "visit": visit,
            "caption": "" if draws.drop_text else record.caption,
            "draws": dataclasses.replace(draws, standard_loss=True) if empty else draws,
            "noise": randomness.normal(self.shapes.latent, self.seed, "noise", record.id, visit),
            "latent_noise": randomness.normal(self.shapes.latent, self.seed, "latents", record.id, visit),
            **sample,
        }

    def _recall(self, index: int, draws: Draws) -> dict[str, Any]:
        moments, mask = self.cache.moments(index, draws.flip)
        hidden = [
            self.cache.hidden(reference, flip)
            for reference, flip in zip(draws.references, draws.flip_references, strict=True)
        ]
        text = self.cache.null_text() if draws.drop_text else self.cache.text(index)
        return {"moments": moments, "mask": mask, "hidden": hidden, "text": text}

    def _read(self, index: int, draws: Draws) -> dict[str, Any]:
        pixels, mask = read_picture(self.records[index], self.data.resolution, self.data.crop, self.shapes.cell)
        if draws.flip:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        crops = []
        for reference, flip in zip(draws.references, draws.flip_references, strict=True):
            crop = read_crop(self.records[reference], self.crop_size)  # (S, S, 3)
            crops.append(crop.flip(1) if flip else crop)
        return {"pixels": pixels, "mask": mask, "crops": crops}


def read_picture(record: Record, resolution: int, crop: str, cell: int) -> tuple[Tensor, Tensor]:
    """Read a photo and its mask and cut the training square out of both.

    Returns:
        Pixels ``(3, resolution, resolution)`` in −1…1 and the mask ``(1, h, w)`` over latent cells.

    Raises:
        PictureError: a photo or mask that cannot be read, or a mask of another shape than its photo.
    """
    photo = pictures.open_photo(record.path)
    square = pictures.training_square(*photo.size, record.square if crop == "face" else None)
    cells = resolution // cell
    if record.mask is None:
        mask = torch.ones(1, cells, cells)
    else:
        mask = pictures.cut_mask(pictures.read_mask(record.mask, photo.size), photo.size, square, cells)
    return pictures.cut_pixels(photo, square, resolution), mask


def read_crop(record: Record, size: int) -> Tensor:
    """The face crop ``(size, size, 3)`` in 0…1: the one made in advance if it has that size, else cut anew.

    Raises:
        PictureError: a file that cannot be read.
    """
    if record.crop is not None:
        crop = pictures.open_photo(record.crop)
        if crop.size == (size, size):
            return pictures.to_tensor(crop)
    photo = pictures.to_tensor(pictures.open_photo(record.path))
    return resample(photo, record.square, size, size)


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples → one :class:`Batch`."""

    def stack(name: str) -> Tensor | None:
        return torch.stack([sample[name] for sample in samples]) if name in samples[0] else None

    def chain(name: str) -> Tensor | None:
        parts = [tensor for sample in samples for tensor in sample.get(name, ())]
        return torch.stack(parts) if parts else None

    text = None
    if "text" in samples[0]:
        text = {name: torch.stack([s["text"][name] for s in samples]) for name in samples[0]["text"]}
    draws: list[Draws] = [sample["draws"] for sample in samples]
    return Batch(
        ids=[sample["id"] for sample in samples],
        visits=[sample["visit"] for sample in samples],
        captions=[sample["caption"] for sample in samples],
        text=text,
        pixels=stack("pixels"),
        moments=stack("moments"),
        crops=chain("crops"),
        hidden=chain("hidden"),
        reference_counts=[len(draw.references) for draw in draws],
        masks=stack("mask"),
        noise=stack("noise"),
        latent_noise=stack("latent_noise"),
        timesteps=torch.tensor([draw.timestep for draw in draws], dtype=torch.int64),
        drop_face=[draw.drop_face for draw in draws],
        drop_text=[draw.drop_text for draw in draws],
        standard_loss=[draw.standard_loss for draw in draws],
    )


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
