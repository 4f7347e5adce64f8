"""The features that a run needs, their keys, and how they are read and encoded.

Configuration and photos → for each kind the items with their keys, which say all that a feature depends on → a
:class:`~trainer.data.feature_store.FeatureStore` → shards. ``trainer.cache`` writes what is missing; training reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from feedface_core.errors import FeedFaceError
from feedface_core.faces import crop as crops

from ..config import Config
from ..data import augmentation, pictures
from ..data.feature_store import FeatureStore, FileHashes, key_of
from ..data.manifest import Record
from ..data.reading import read_picture, read_reference
from ..data.references import Reference, References
from ..errors import TrainerError, first_of
from .frozen_model import weights_fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

    from .face_encoder import FaceEncoder
    from .frozen_model import FrozenModel

HashOf = Callable[[Path | None], str | None]
PROBES = ("", "A photo of Zoë, 2 years old – smiling! 写真")
"""Captions that tokenizers tell apart."""
_TOKENISED = 1024


class Features(FeatureStore, torch.utils.data.Dataset):
    """Features of one kind, and by ``(key, item)`` what they are made of. Loader processes get it: it has no model."""

    records: Sequence[Record]

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

    def encode(self, inputs: Sequence[Any], base: FrozenModel, encoder: FaceEncoder) -> list[dict[str, Tensor]]:
        """The tensors of each of several items, from what :meth:`read` returned."""
        raise NotImplementedError


class PictureFeatures(Features):
    """Moments of a photo with its mask ``(1, h, w)``; items are the record's index and whether it is mirrored."""

    def __init__(
        self, folder: Path, config: Config, records: Sequence[Record], base: FrozenModel, hash_of: HashOf
    ) -> None:
        self.records, self.data, self.cell = records, config.data, base.cell
        settings = {
            "autoencoder": base.fingerprint(["autoencoder"]),
            "version of the cutting code": pictures.VERSION,
            "data.resolution": config.data.resolution,
            "data.crop": config.data.crop,
        }
        keys = {}
        for index, record in enumerate(records):
            square = record.square if config.data.crop == "face" else None
            for flip in (False, True) if config.data.flip else (False,):
                content = hash_of(record.path), hash_of(record.mask_path), square, flip
                keys[index, flip] = key_of(settings, *content)
        super().__init__(folder, "picture", settings, keys)

    def read(self, item: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = item
        pixels, mask = read_picture(self.records[index], self.data.resolution, self.data.crop, self.cell)
        return (pixels.flip(-1), mask.flip(-1)) if flip else (pixels, mask)

    def encode(self, inputs, base, encoder):
        moments = base.encode_pixels(torch.stack([pixels for pixels, _ in inputs])).cpu()
        return [{"moments": row, "mask": mask} for row, (_, mask) in zip(moments, inputs, strict=True)]


class TextFeatures(Features):
    """Text states in the number format in which the host reads them; items are captions."""

    def __init__(self, folder: Path, records: Sequence[Record], base: FrozenModel) -> None:
        settings = {
            "text encoder": base.fingerprint(["text"]),
            "tokenizer": key_of(base.token_ids(PROBES).tolist())[:16],
            "number format": str(base.dtype),
        }
        captions, keys = list(dict.fromkeys(["", *(record.caption for record in records)])), {}
        for start in range(0, len(captions), _TOKENISED):
            chunk = captions[start : start + _TOKENISED]
            # By the tokens: they are all that the encoder sees of a caption.
            for caption, ids in zip(chunk, base.token_ids(chunk).tolist(), strict=True):
                keys[caption] = key_of(settings, ids)
        super().__init__(folder, "text", settings, keys)

    def name(self, item: str) -> str:
        return repr(item[:40])

    def encode(self, inputs, base, encoder):
        states = {name: tensor.to(base.dtype) for name, tensor in base.encode_text(inputs).items()}
        return [{name: tensor[row] for name, tensor in states.items()} for row in range(len(inputs))]


class FaceFeatures(Features):
    """Hidden states ``(T, E)`` of a face crop; items are :class:`~trainer.data.references.Reference`."""

    def __init__(
        self, folder: Path, config: Config, records: Sequence[Record], encoder: FaceEncoder, hash_of: HashOf
    ) -> None:
        self.records, self.references = records, References(records, config.data)
        self.size, self._opened = encoder.config.image_size, (None, None)
        settings = {
            "version of the crop code": crops.VERSION,
            "face encoder": weights_fingerprint({"encoder": encoder.module}),
            "adapter.encoder.layer": encoder.config.layer,
            "adapter.encoder.image_size": encoder.config.image_size,
            "adapter.encoder.image_mean": list(encoder.config.image_mean),
            "adapter.encoder.image_std": list(encoder.config.image_std),
        }
        keys = {}
        for reference in self.references.all():
            record, changes = records[reference.index], self.references.augmentation(reference)
            if changes is None:
                # A crop made in advance may have been replaced; otherwise photo and square say all.
                content = record.crop_fill, hash_of(record.crop_path), reference.flip
            else:
                mask = None if changes.background else hash_of(record.mask_path)
                content = mask, [augmentation.VERSION, asdict(changes)]
            keys[reference] = key_of(settings, hash_of(record.path), record.square, *content)
        super().__init__(folder, "face", settings, keys)

    def read(self, item: Reference) -> Tensor:
        changes = self.references.augmentation(item)
        return read_reference(self.records[item.index], self.size, item.flip, changes, self._open)

    def _open(self, path: Path) -> Image:
        if self._opened[0] != path:  # the variants of a crop come one after the other
            self._opened = path, pictures.open_photo(path)
        return self._opened[1]

    def encode(self, inputs, base, encoder):
        return [{"hidden": row} for row in encoder.encode(torch.stack(inputs).to(base.device)).cpu()]


class FeatureCache(dict[str, Features]):
    """The features of a run by kind: ``picture``, ``text`` and ``face``.

    Args:
        config: the settings; ``data.cache`` is the folder.
        records: all photos of the run.
        base: with its autoencoder and text encoder, for their fingerprints.
        encoder: of the faces.
    """

    def __init__(self, config: Config, records: Sequence[Record], base: FrozenModel, encoder: FaceEncoder) -> None:
        self.folder = Path(config.data.cache).expanduser()
        self.hashes = FileHashes(self.folder / "files.json")
        hash_of = cache(lambda file: None if file is None else self.hashes.of(file))  # asked for up to eight times
        super().__init__(
            picture=PictureFeatures(self.folder, config, records, base, hash_of),
            text=TextFeatures(self.folder, records, base),
            face=FaceFeatures(self.folder, config, records, encoder, hash_of),
        )


def find_cache(config: Config) -> Path:
    """The folder ``data.cache``. Raises ``TrainerError`` if it is missing; asked for before the models are loaded."""
    folder = Path(config.data.cache).expanduser()
    if not folder.is_dir():
        raise TrainerError(
            f"data.cache {folder}: no such folder. Make it with python -m trainer.cache and the same settings, or "
            "train without a cache (data.cache=null)"
        )
    return folder


def open_cache(config: Config, records: Sequence[Record], base: FrozenModel, encoder: FaceEncoder) -> FeatureCache:
    """The cache of a run, complete.

    Args:
        config, records, base, encoder: as of :class:`FeatureCache`.

    Raises:
        TrainerError: a folder that is missing, or features that are not there: says which, and whether the model,
            the settings or the photos are others.
    """
    folder = find_cache(config)
    found, problems = FeatureCache(config, records, base, encoder), []
    for kind, features in found.items():
        if missing := features.missing():
            names = list(dict.fromkeys(map(features.name, missing.values())))
            changed = f"new or changed: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            why, count = "; ".join(features.differences()) or changed, len(set(features.keys.values()))
            problems.append(f"{kind}: {len(missing)} of {count} features are missing ({why})")
    if problems:
        raise TrainerError(
            f"data.cache {folder} does not belong to this run:{first_of(problems)}\nRun python -m trainer.cache with "
            "the same settings: it computes what is missing"
        )
    return found
