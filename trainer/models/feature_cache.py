"""The features of a run, opened from the folder that ``trainer.cache`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.feature_store import FileHashes
from ..data.manifest import Record
from ..data.references import Reference, References
from ..errors import TrainerError, first_of
from .features import BackgroundFeatures, FaceFeatures, Features, PictureFeatures, TextFeatures

if TYPE_CHECKING:
    from .face_encoder import FaceEncoder
    from .frozen_model import FrozenModel


class FeatureCache(dict[str, Features]):
    """The features of a run by kind: ``picture``, ``text`` and ``face``, and ``background`` for a second stream.

    Args:
        config: the settings.
        records: all photos of the run.
        base: with its autoencoder and text encoder, for their fingerprints.
        encoder: of the faces.
        folder: of the features; None takes ``data.cache``.
    """

    def __init__(
        self,
        config: Config,
        records: Sequence[Record],
        base: FrozenModel,
        encoder: FaceEncoder,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder or Path(config.data.cache).expanduser()
        self.hashes = FileHashes(self.folder / "files.json")
        super().__init__(
            picture=PictureFeatures(self.folder, config, records, base),
            text=TextFeatures(self.folder, config, records, base),
            face=FaceFeatures(self.folder, config, records, encoder),
        )
        if config.adapter.background:
            self["background"] = BackgroundFeatures(self.folder, config, records, encoder)
        hash_of = self.hashes.asked_once()
        for features in self.values():
            faces = References(records, config.data).all() if features.kind == "face" else ()
            features.keys = features.make_keys(faces, base, hash_of)

    def sample(
        self, index: int, caption: str, flip: bool, references: Sequence[Reference], background: bool = False
    ) -> dict[str, Any]:
        """See :class:`~trainer.data.dataset.CachedFeatures`."""
        found = {name: tensor.float() for name, tensor in self["picture"].get((index, flip)).items()}
        found["hidden"] = [self["face"].get(reference)["hidden"] for reference in references]
        if background:
            found["background_hidden"] = self["background"].get((index, flip))["hidden"]
        return found | {"text": self["text"].get(caption)}


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
