"""The features of a run: their keys, and the complete cache that training reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from feedface_core.faces import crop as crops

from ..config import Config
from ..models.face_encoder import FaceEncoder
from ..models.frozen_model import FrozenModel, weights_fingerprint
from . import pictures
from .augmentation import VERSION as AUGMENTATION_VERSION
from .feature_store import CacheError, FeatureStore, FileHashes, differences, key_of
from .manifest import Record
from .references import Reference, References

KINDS = ("picture", "text", "face")
PROBES = ("", "A photo of Zoë, 2 years old – smiling! 写真")
"""Captions that tokenizers tell apart."""
_SHOWN = 5
_TOKENISED = 1024


class Keys:
    """The keys of all features of a run.

    Args:
        config, records, base, encoder: what they depend on.
        hashes: of the files' contents.
    """

    def __init__(
        self, config: Config, records: Sequence[Record], base: FrozenModel, encoder: FaceEncoder, hashes: FileHashes
    ) -> None:
        self.records, self.hashes = records, hashes
        self._known: dict[Path, str] = {}
        self.flips = (False, True) if config.data.flip else (False,)
        self.references = References.of(records, config.data)
        face = encoder.config
        self.about: dict[str, dict[str, Any]] = {
            "picture": {
                "autoencoder": base.fingerprint(["autoencoder"]),
                "version of the cutting code": pictures.VERSION,
                "data.resolution": config.data.resolution,
                "data.crop": config.data.crop,
            },
            "text": {
                "text encoder": base.fingerprint(["text"]),
                "tokenizer": key_of(base.token_ids(PROBES).tolist())[:16],
                "number format": str(base.dtype),
            },
            "face": {
                "version of the crop code": crops.VERSION,
                "face encoder": weights_fingerprint({"encoder": encoder.module}),
                "adapter.encoder.layer": face.layer,
                "adapter.encoder.image_size": face.image_size,
                "adapter.encoder.image_mean": list(face.image_mean),
                "adapter.encoder.image_std": list(face.image_std),
            },
        }

        captions = list(dict.fromkeys(["", *(record.caption for record in records)]))
        self._texts: dict[str, str] = {}
        for start in range(0, len(captions), _TOKENISED):
            part = captions[start : start + _TOKENISED]
            # By the tokens: they are all that the encoder sees of a caption.
            for caption, ids in zip(part, base.token_ids(part).tolist(), strict=True):
                self._texts[caption] = key_of(self.about["text"], ids)

    def _hash(self, file: Path) -> str:
        # Each file is asked for up to eight times.
        if file not in self._known:
            self._known[file] = self.hashes.of(file)
        return self._known[file]

    def picture(self, index: int, flip: bool) -> str:
        """Of the moments and the mask of a photo."""
        record = self.records[index]
        mask = self._hash(record.mask) if record.mask is not None else None
        square = record.square if self.about["picture"]["data.crop"] == "face" else None
        return key_of(self.about["picture"], self._hash(record.path), mask, square, flip)

    def text(self, caption: str) -> str:
        """Of the states of a caption of the run, or of the empty one."""
        return self._texts[caption]

    def face(self, reference: Reference) -> str:
        """Of the hidden states of a face crop."""
        record = self.records[reference.index]
        photo = self._hash(record.path)
        augmentation = self.references.augmentation(reference)
        if augmentation is not None:
            mask = self._hash(record.mask) if record.mask is not None and not augmentation.background else None
            changes = [AUGMENTATION_VERSION, asdict(augmentation)]
            return key_of(self.about["face"], photo, record.square, mask, changes)
        # A crop made in advance may have been replaced; otherwise photo and square say all.
        crop = self._hash(record.crop) if record.crop is not None else None
        return key_of(self.about["face"], photo, record.square, record.rule.fill, crop, reference.flip)

    def all(self) -> dict[str, dict[str, tuple[Any, ...]]]:
        """For each kind, what each key is of: index of the record and whether mirrored, caption, or reference."""
        places = [(index, flip) for index in range(len(self.records)) for flip in self.flips]
        return {
            "picture": {self.picture(*place): place for place in places},
            "text": {key: (caption,) for caption, key in self._texts.items()},
            "face": {self.face(reference): reference for reference in self.references.all()},
        }


class FeatureCache:
    """What the dataset reads: features by index of the record."""

    def __init__(self, keys: Keys, stores: Mapping[str, FeatureStore]) -> None:
        self.stores = dict(stores)
        self.pictures = {(i, f): keys.picture(i, f) for i in range(len(keys.records)) for f in keys.flips}
        self.faces = {reference: keys.face(reference) for reference in keys.references.all()}
        self.texts = [keys.text(record.caption) for record in keys.records]
        self.null = keys.text("")

    def moments(self, index: int, flip: bool) -> tuple[Tensor, Tensor]:
        """Moments of the photo and its mask ``(1, h, w)``, float32."""
        found = self.stores["picture"].get(self.pictures[index, flip])
        return found["moments"].float(), found["mask"].float()

    def text(self, index: int) -> dict[str, Tensor]:
        """Text states of the caption."""
        return self.stores["text"].get(self.texts[index])

    def null_text(self) -> dict[str, Tensor]:
        """Text states of the empty caption."""
        return self.stores["text"].get(self.null)

    def hidden(self, reference: Reference) -> Tensor:
        """Hidden states ``(T, E)`` of a face crop."""
        return self.stores["face"].get(self.faces[reference])["hidden"]


def open_cache(config: Config, records: Sequence[Record], base: FrozenModel, encoder: FaceEncoder) -> FeatureCache:
    """The cache of a run, complete.

    Args:
        config: the settings; ``data.cache`` is the folder.
        records: all photos of the run.
        base: with its autoencoder and text part, for their fingerprints.
        encoder: of the faces.

    Raises:
        CacheError: a folder that is missing, or features that are not there: says which, and whether the model,
            the settings or the photos are others.
    """
    folder = Path(config.data.cache or "").expanduser()
    if not folder.is_dir():
        raise CacheError(
            f"data.cache {folder}: no such folder. Make it with python -m trainer.cache and the same settings, or "
            "train without a cache (data.cache=null)"
        )
    keys = Keys(config, records, base, encoder, FileHashes(folder / "files.json"))
    stores = {kind: FeatureStore(folder, kind) for kind in KINDS}
    problems = []
    for kind, wanted in keys.all().items():
        missing = stores[kind].missing(wanted)
        if not missing:
            continue
        reasons = differences(stores[kind].about, keys.about[kind])
        if not reasons:
            names = [wanted[key][0] for key in missing[:_SHOWN]]
            shown = ", ".join(
                records[name].id if isinstance(name, int) else repr(name[:40]) for name in dict.fromkeys(names)
            )
            reasons = [f"new or changed: {shown}{' …' if len(missing) > _SHOWN else ''}"]
        problems.append(f"{kind}: {len(missing)} of {len(wanted)} features are missing ({'; '.join(reasons)})")
    if problems:
        raise CacheError(
            f"data.cache {folder} does not belong to this run:\n  "
            + "\n  ".join(problems)
            + "\nRun python -m trainer.cache with the same settings: it computes what is missing"
        )
    return FeatureCache(keys, stores)
