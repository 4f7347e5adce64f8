"""What a cache holds: the features that a run needs, their keys, and how they are read and encoded.

Configuration and photos → :class:`Features` of each kind, whose keys say all that a feature depends on → a
:class:`~trainer.data.feature_store.FeatureStore` of each kind → shards. ``trainer.cache`` writes what is missing, and
training reads, both through a :class:`FeatureCache`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from feedface_core.faces import crop as crops

from ..config import Config
from ..errors import TrainerError, first_of
from ..models.frozen_model import weights_fingerprint
from . import augmentation, pictures
from .dataset import read_picture, read_reference
from .feature_store import FeatureStore, FileHashes, key_of
from .manifest import Record
from .references import Reference, References

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..models.face_encoder import FaceEncoder
    from ..models.frozen_model import Base

PROBES = ("", "A photo of Zoë, 2 years old – smiling! 写真")
"""Captions that tokenizers tell apart."""
_TOKENISED = 1024
HashOf = Callable[[Path | None], str | None]


class Features(ABC):
    """All features of one kind. Goes to loader processes, so it holds no model.

    Attributes:
        kind: names the shards.
        settings: what all of these features depend on.
        keys: item → key; an item says what the feature is of.
    """

    kind: str
    settings: dict[str, Any]
    keys: dict[Any, str]

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def name(self, item: Any) -> str:
        """What messages call an item."""
        return self.records[item[0]].id

    def read(self, item: Any) -> Any:
        """What there is to encode of an item; called in loader processes."""
        return item

    @abstractmethod
    def encode(self, inputs: Sequence[Any], base: Base, encoder: FaceEncoder) -> list[dict[str, Tensor]]:
        """The tensors of each of several items, from what :meth:`read` returned."""


class PictureFeatures(Features):
    """Moments of a photo with its mask ``(1, h, w)``; items are the record's index and whether it is mirrored."""

    kind = "picture"

    def __init__(self, config: Config, records: Sequence[Record], base: Base, hash_of: HashOf) -> None:
        super().__init__(records)
        self.data, self.cell = config.data, base.cell
        self.settings = {
            "autoencoder": base.fingerprint(["autoencoder"]),
            "version of the cutting code": pictures.VERSION,
            "data.resolution": config.data.resolution,
            "data.crop": config.data.crop,
        }
        self.keys = {}
        for index, record in enumerate(records):
            square = record.square if config.data.crop == "face" else None
            for flip in (False, True) if config.data.flip else (False,):
                content = hash_of(record.path), hash_of(record.mask_path), square, flip
                self.keys[index, flip] = key_of(self.settings, *content)

    def read(self, item: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        index, flip = item
        pixels, mask = read_picture(self.records[index], self.data.resolution, self.data.crop, self.cell)
        return (pixels.flip(-1), mask.flip(-1)) if flip else (pixels, mask)

    def encode(self, inputs, base, encoder):
        moments = base.encode_pixels(torch.stack([pixels for pixels, _ in inputs])).cpu()
        return [{"moments": row, "mask": mask} for row, (_, mask) in zip(moments, inputs, strict=True)]


class TextFeatures(Features):
    """Text states in the number format in which the host reads them; items are captions."""

    kind = "text"

    def __init__(self, records: Sequence[Record], base: Base) -> None:
        super().__init__(records)
        self.settings = {
            "text encoder": base.fingerprint(["text"]),
            "tokenizer": key_of(base.token_ids(PROBES).tolist())[:16],
            "number format": str(base.dtype),
        }
        captions = list(dict.fromkeys(["", *(record.caption for record in records)]))
        self.keys = {}
        for start in range(0, len(captions), _TOKENISED):
            chunk = captions[start : start + _TOKENISED]
            # By the tokens: they are all that the encoder sees of a caption.
            for caption, ids in zip(chunk, base.token_ids(chunk).tolist(), strict=True):
                self.keys[caption] = key_of(self.settings, ids)

    def name(self, item: str) -> str:
        return repr(item[:40])

    def encode(self, inputs, base, encoder):
        states = {name: tensor.to(base.dtype) for name, tensor in base.encode_text(inputs).items()}
        return [{name: tensor[row] for name, tensor in states.items()} for row in range(len(inputs))]


class FaceFeatures(Features):
    """Hidden states ``(T, E)`` of a face crop; items are :class:`~trainer.data.references.Reference`."""

    kind = "face"

    def __init__(self, config: Config, records: Sequence[Record], encoder: FaceEncoder, hash_of: HashOf) -> None:
        super().__init__(records)
        self.references, self.size = References(records, config.data), encoder.config.image_size
        self._opened: tuple[Path, Image] | None = None
        self.settings = {
            "version of the crop code": crops.VERSION,
            "face encoder": weights_fingerprint({"encoder": encoder.module}),
            "adapter.encoder.layer": encoder.config.layer,
            "adapter.encoder.image_size": encoder.config.image_size,
            "adapter.encoder.image_mean": list(encoder.config.image_mean),
            "adapter.encoder.image_std": list(encoder.config.image_std),
        }
        self.keys = {reference: self._key(reference, hash_of) for reference in self.references.all()}

    def _key(self, reference: Reference, hash_of: HashOf) -> str:
        record, changes = self.records[reference.index], self.references.augmentation(reference)
        if changes is None:
            # A crop made in advance may have been replaced; otherwise photo and square say all.
            content = record.square, record.rule.fill, hash_of(record.crop_path), reference.flip
        else:
            mask = None if changes.background else hash_of(record.mask_path)
            content = record.square, mask, [augmentation.VERSION, asdict(changes)]
        return key_of(self.settings, hash_of(record.path), *content)

    def read(self, item: Reference) -> Tensor:
        augmentation = self.references.augmentation(item)
        return read_reference(self.records[item.index], self.size, item.flip, augmentation, self._open)

    def _open(self, path: Path) -> Image:
        # The variants of a crop come one after the other.
        if self._opened is None or self._opened[0] != path:
            self._opened = path, pictures.open_photo(path)
        return self._opened[1]

    def encode(self, inputs, base, encoder):
        return [{"hidden": row} for row in encoder.encode(torch.stack(inputs).to(base.device)).cpu()]


class FeatureCache:
    """The features of a run in a folder. What a dataset reads, is by the index of the record.

    Args:
        config: the settings; ``data.cache`` is the folder.
        records: all photos of the run.
        base: with its autoencoder and text encoder, for their fingerprints.
        encoder: of the faces.
    """

    def __init__(self, config: Config, records: Sequence[Record], base: Base, encoder: FaceEncoder) -> None:
        self.folder = Path(config.data.cache or "").expanduser()
        self.hashes = FileHashes(self.folder / "files.json")
        hash_of = cache(lambda file: None if file is None else self.hashes.of(file))  # asked for up to eight times
        kinds = (
            PictureFeatures(config, records, base, hash_of),
            TextFeatures(records, base),
            FaceFeatures(config, records, encoder, hash_of),
        )
        self.features: dict[str, Features] = {features.kind: features for features in kinds}
        self.stores = {kind: FeatureStore(self.folder, kind, own.settings) for kind, own in self.features.items()}

    def missing(self, kind: str) -> dict[str, Any]:
        """Key → item of the features of a kind that are not there."""
        items = {key: item for item, key in self.features[kind].keys.items()}
        return {key: items[key] for key in self.stores[kind].missing(items)}

    def stale(self) -> list[Path]:
        """Shards that hold nothing of this run, of all that there are by now."""
        stores = [FeatureStore(self.folder, kind, {}) for kind in self.features]
        return [path for store in stores for path in store.unused(self.features[store.kind].keys.values())]

    def _get(self, kind: str, item: Any) -> dict[str, Tensor]:
        return self.stores[kind].get(self.features[kind].keys[item])

    def moments(self, index: int, flip: bool) -> tuple[Tensor, Tensor]:
        """Moments of the photo and its mask ``(1, h, w)``, float32."""
        found = self._get("picture", (index, flip))
        return found["moments"].float(), found["mask"].float()

    def text(self, caption: str) -> dict[str, Tensor]:
        """Text states of a caption, or of the empty one."""
        return self._get("text", caption)

    def hidden(self, reference: Reference) -> Tensor:
        """Hidden states ``(T, E)`` of a face crop."""
        return self._get("face", reference)["hidden"]


def open_cache(config: Config, records: Sequence[Record], base: Base, encoder: FaceEncoder) -> FeatureCache:
    """The cache of a run, complete.

    Args:
        config, records, base, encoder: as of :class:`FeatureCache`.

    Raises:
        TrainerError: a folder that is missing, or features that are not there: says which, and whether the model,
            the settings or the photos are others.
    """
    folder = Path(config.data.cache or "").expanduser()
    if not folder.is_dir():
        raise TrainerError(
            f"data.cache {folder}: no such folder. Make it with python -m trainer.cache and the same settings, or "
            "train without a cache (data.cache=null)"
        )
    features, problems = FeatureCache(config, records, base, encoder), []
    for kind, own in features.features.items():
        if missing := features.missing(kind):
            names = list(dict.fromkeys(map(own.name, missing.values())))
            changed = f"new or changed: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            why = "; ".join(features.stores[kind].differences()) or changed
            problems.append(f"{kind}: {len(missing)} of {len(set(own.keys.values()))} features are missing ({why})")
    if problems:
        raise TrainerError(
            f"data.cache {folder} does not belong to this run:{first_of(problems)}\nRun python -m trainer.cache with "
            "the same settings: it computes what is missing"
        )
    return features
