"""The features that a run needs, their keys, and how they are read and encoded.

Configuration and photos → for each kind the items with their keys, which say all that a feature depends on → a
:class:`~trainer.data.feature_store.FeatureStore` → shards. ``trainer.cache`` writes what is missing; training reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from feedface_core.errors import FeedFaceError
from feedface_core.faces import crop as crops

from ..config import Config
from ..data import augmentation, pictures
from ..data.buckets import Buckets
from ..data.feature_store import FeatureStore, HashOf, key_of
from ..data.manifest import Record
from ..data.reading import read_background, read_picture, read_reference
from ..data.references import Reference, augmentation_of
from .frozen_model import weights_fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..config import DataSettings
    from .face_encoder import FaceEncoder
    from .frozen_model import FrozenModel

PROBES = ("", "A photo of Zoë, 2 years old – smiling! 写真")
"""Captions that tokenizers tell apart."""
_TOKENISED = 1024


class Features(FeatureStore, torch.utils.data.Dataset, ABC):
    """Features of one kind, and by ``(key, item)`` what they are made of. Loader processes get it: it has no model.

    Args:
        folder: of the cache.
        records: the photos.
        settings: what all of these features depend on.
    """

    kind: str

    def __init__(self, folder: Path, records: Sequence[Record], settings: Mapping[str, Any]) -> None:
        self.records = records
        super().__init__(folder, self.kind, settings, {})

    def of(self, records: Sequence[Record], faces: Sequence[Reference], base: FrozenModel, hash_of: HashOf) -> Self:
        """The same kind of features of other photos.

        Args:
            records: the photos.
            faces: the references that are wanted of them; their indices are places among the photos.
            base: with its tokenizer.
            hash_of: gives the hash of a file.
        """
        found = copy(self)
        found.records, found._files, found._pending = records, {}, {}
        found.keys = found.make_keys(faces, base, hash_of)
        return found

    @abstractmethod
    def make_keys(self, faces: Iterable[Reference], base: FrozenModel, hash_of: HashOf) -> dict[Any, str]:
        """The items of the photos with their keys; see :meth:`of`."""

    def name(self, item: Any) -> str:
        """What messages call an item."""
        return self.records[item[0]].id

    def read(self, item: Any) -> Any:
        """What there is to encode of an item; called in loader processes."""
        return item

    def __getitem__(self, entry: tuple[str, Any]) -> tuple[str, Any, Any, str | None]:
        """Key and item with what there is to encode, and None or why it cannot be read."""
        try:
            return *entry, self.read(entry[1]), None
        except (FeedFaceError, OSError) as error:
            return *entry, None, str(error)

    @abstractmethod
    def encode(self, inputs: Sequence[Any], base: FrozenModel, encoder: FaceEncoder) -> list[dict[str, Tensor]]:
        """The tensors of each of several items, from what :meth:`read` returned."""

    def encode_all(
        self, wanted: Mapping[str, Any], settings: DataSettings, base: FrozenModel, encoder: FaceEncoder
    ) -> Iterator[tuple[str, Any, dict[str, Tensor] | None, str | None]]:
        """Key and item of what is wanted with its tensors, or with None and why it cannot be read.

        Args:
            wanted: key → item.
            settings: say how many are encoded at once, and how many loader processes read.
            base, encoder: the frozen models.
        """
        workers = settings.workers if wanted and self.kind != "text" else 0
        loader = torch.utils.data.DataLoader(
            self, settings.cache_batch, sampler=list(wanted.items()), num_workers=workers, collate_fn=list
        )
        for batch in loader:
            sound = [content for _, _, content, reason in batch if reason is None]
            encoded = iter(self.encode(sound, base, encoder) if sound else ())
            for key, item, _, reason in batch:
                yield key, item, next(encoded) if reason is None else None, reason


class PictureFeatures(Features):
    """Moments of a photo with its mask ``(1, h, w)``; items are the record's index and whether it is mirrored."""

    kind = "picture"

    def __init__(self, folder: Path, config: Config, records: Sequence[Record], base: FrozenModel) -> None:
        self.data, self.cell, self.buckets = config.data, base.cell, Buckets.of(config.data)
        settings = {
            "autoencoder": base.fingerprint(["autoencoder"]),
            "version of the cutting code": pictures.VERSION,
            "data.resolution": config.data.resolution,
            "data.crop": config.data.crop,
        }
        super().__init__(folder, records, settings)

    def make_keys(self, faces, base, hash_of):
        keys = {}
        for index, record in enumerate(self.records):
            square, size = record.square if self.data.crop == "face" else None, self.buckets.size_of(record)
            shape = () if size == self.buckets.sizes[self.buckets.square] else (size,)  # a square's key is as ever
            for flip in (False, True) if self.data.flip else (False,):
                content = *map(hash_of, (record.path, record.mask_path, *record.other_masks)), square, flip, *shape
                keys[index, flip] = key_of(self.settings, *content)
        return keys

    def read(self, item: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = item
        record = self.records[index]
        pixels, mask = read_picture(record, self.buckets.size_of(record), self.data.crop, self.cell)
        return (pixels.flip(-1), mask.flip(-1)) if flip else (pixels, mask)

    def encode(self, inputs, base, encoder):
        moments: list[Any] = [None] * len(inputs)
        for shape in dict.fromkeys(pixels.shape for pixels, _ in inputs):
            places = [place for place, (pixels, _) in enumerate(inputs) if pixels.shape == shape]
            rows = base.encode_pixels(torch.stack([inputs[place][0] for place in places])).cpu()
            for place, row in zip(places, rows, strict=True):
                moments[place] = row
        return [{"moments": row, "mask": mask} for row, (_, mask) in zip(moments, inputs, strict=True)]


class TextFeatures(Features):
    """Text states in the number format in which the host reads them; items are captions."""

    kind = "text"

    def __init__(self, folder: Path, config: Config, records: Sequence[Record], base: FrozenModel) -> None:
        settings = {
            "text encoder": base.fingerprint(["text"]),
            "tokenizer": key_of(base.token_ids(PROBES).tolist())[:16],
            "number format": str(base.dtype),
        }
        super().__init__(folder, records, settings)

    def make_keys(self, faces, base, hash_of):
        captions, keys = list(dict.fromkeys(["", *(record.caption for record in self.records)])), {}
        for start in range(0, len(captions), _TOKENISED):
            chunk = captions[start : start + _TOKENISED]
            # By the tokens: they are all that the encoder sees of a caption.
            for caption, ids in zip(chunk, base.token_ids(chunk).tolist(), strict=True):
                keys[caption] = key_of(self.settings, ids)
        return keys

    def name(self, item: str) -> str:
        return repr(item[:40])

    def encode(self, inputs, base, encoder):
        states = {name: tensor.to(base.dtype) for name, tensor in base.encode_text(inputs).items()}
        return [{name: tensor[row] for name, tensor in states.items()} for row in range(len(inputs))]


class FaceFeatures(Features):
    """Hidden states ``(T, E)`` of a face crop; items are :class:`~trainer.data.references.Reference`."""

    kind = "face"

    def __init__(self, folder: Path, config: Config, records: Sequence[Record], encoder: FaceEncoder) -> None:
        self.mirrored = config.data.mirrors_references
        self.size, self._opened = encoder.config.image_size, (None, None)
        super().__init__(folder, records, encoder_settings(encoder))

    def make_keys(self, faces, base, hash_of):
        keys = {}
        for reference in faces:
            record, changes = self.records[reference.index], self._augmentation(reference)
            if changes is None:
                # A crop made in advance may have been replaced; otherwise photo and square say all.
                content = record.crop_fill, hash_of(record.crop_path), reference.flip
            else:
                mask = None if changes.background else hash_of(record.mask_path)
                content = mask, [augmentation.VERSION, asdict(changes)]
            keys[reference] = key_of(self.settings, hash_of(record.path), record.square, *content)
        return keys

    def _augmentation(self, reference: Reference) -> augmentation.Augmentation | None:
        return augmentation_of(self.records, reference, self.mirrored)

    def read(self, item: Reference) -> Tensor:
        return read_reference(self.records[item.index], self.size, item.flip, self._augmentation(item), self._open)

    def _open(self, path: Path) -> Image:
        if self._opened[0] != path:  # the variants of a crop come one after the other
            self._opened = path, pictures.open_photo(path)
        return self._opened[1]

    def encode(self, inputs, base, encoder):
        return [{"hidden": row} for row in encoder.encode(torch.stack(inputs).to(base.device)).cpu()]


class BackgroundFeatures(Features):
    """Hidden states ``(T, E)`` of a photo without its face; items are as of :class:`PictureFeatures`."""

    kind = "background"

    def __init__(self, folder: Path, config: Config, records: Sequence[Record], encoder: FaceEncoder) -> None:
        self.crop, self.flip, self.size = config.data.crop, config.data.flip, encoder.config.image_size
        super().__init__(folder, records, {**encoder_settings(encoder), "data.crop": config.data.crop})

    def make_keys(self, faces, base, hash_of):
        return {
            (index, flip): key_of(self.settings, hash_of(record.path), record.square, record.crop_fill, flip)
            for index, record in enumerate(self.records)
            for flip in ((False, True) if self.flip else (False,))
        }

    def read(self, item: tuple[int, bool]) -> Tensor:
        picture = read_background(self.records[item[0]], self.size, self.crop)
        return picture.flip(1) if item[1] else picture

    def encode(self, inputs, base, encoder):
        return [{"hidden": row} for row in encoder.encode(torch.stack(inputs).to(base.device)).cpu()]


def encoder_settings(encoder: FaceEncoder) -> dict[str, Any]:
    """All that the hidden states of a picture depend on, beside the picture."""
    config = encoder.config
    settings = {
        "version of the crop code": crops.VERSION,
        "face encoder": weights_fingerprint({"encoder": encoder.module}),
        "adapter.encoder.layer": config.layer,
        "adapter.encoder.image_size": config.image_size,
        "adapter.encoder.image_mean": list(config.image_mean),
        "adapter.encoder.image_std": list(config.image_std),
    }
    if config.type == "recogniser":
        return {"version of the crop code": crops.VERSION, "face encoder": config.name}
    return settings if config.pooling == "none" else {**settings, "adapter.encoder.pooling": config.pooling}
