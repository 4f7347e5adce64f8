"""Looking at photos and pictures: where the face is, whose it is like, what CLIP makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from feedface_core.errors import FeedFaceError, listing
from feedface_core.faces import DetectedFace, Detector, crop_face, load_detector, load_image, select_from_photo
from feedface_core.faces.box import Box
from feedface_core.faces.detectors.base import WHOLE_IMAGE, WholeImage
from feedface_core.faces.recognisers import ENCODER, EncoderRecogniser, Recogniser, load_recogniser
from feedface_core.faces.select import crop_scale_of

from ..config import EvaluateSettings
from ..errors import TrainerError
from .judges import ClipJudge, RewardJudge
from .memo import Memo, digest_of, from_text, key_of, to_text
from .people import Person, Photo

VERSION = 1
"""Raise it when something else is seen in the same file: what earlier runs saw is then looked at again."""


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen in a picture.

    Args:
        path: its file.
        face: the largest face, None if none was found.
        vector: ``(D,)`` of the face in the recogniser, None where there is none.
        clip_face, clip: ``(E,)`` CLIP's embeddings of the face and of the picture; None without CLIP.
    """

    path: Path
    face: DetectedFace | None
    vector: np.ndarray | None
    clip_face: np.ndarray | None = None
    clip: np.ndarray | None = None


class Looker:
    """Looks at files, at each once.

    Args:
        settings: which detector, recogniser and judges.
        memo: of the output folder.
        encoder: the adapter's, for ``recogniser=encoder``.
        recogniser: takes the place of the settings'.

    Raises:
        FeedFaceError: a detector, recogniser or model that is missing.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        memo: Memo,
        encoder: EncoderRecogniser | None = None,
        recogniser: Recogniser | None = None,
    ) -> None:
        detect = settings.detect
        packs = {"insightface_roots": detect.insightface_roots, "model": detect.model, "device": detect.device}
        self.memo = memo
        self.detector: Detector = load_detector(detect.detector, threshold=detect.threshold, **packs)
        name = ENCODER if settings.recogniser == "encoder" else settings.recogniser
        # Under auto the encoder does not step in: an adapter would be judged by what it was given.
        chosen = encoder if settings.recogniser == "encoder" else None
        self.recogniser = recogniser or load_recogniser(name, encoder=chosen, **packs)
        self.clip = None if settings.clip is None else ClipJudge(settings.clip, settings.device)
        self.reward = None if settings.image_reward is None else RewardJudge(settings.image_reward, settings.device)
        self._depends = [
            VERSION,
            self.detector.description,
            detect.threshold,
            self.recogniser.name,
            self.clip and self.clip.fingerprint,
        ]

    @property
    def finds_faces(self) -> bool:
        """Whether a detector looks at all: who takes the whole picture for the face always finds one."""
        return self.detector.name != WHOLE_IMAGE

    def __call__(self, path: Path, box: Box | None = None) -> Look:
        """Look at a file, at the face in a box or at the largest one. Raises ``FeedFaceError`` if it is no picture."""
        key = key_of("look", digest_of(path), box, self._depends)
        found = self.memo.get(key) or self.memo.put(key, file=path.name, **self._look(path, box))
        place = found["box"]
        face = None if place is None else DetectedFace(tuple(place), source=found["source"])
        return Look(path, face, *(from_text(found[name]) for name in ("vector", "clip_face", "clip")))

    def _look(self, path: Path, box: Box | None) -> dict:
        image = load_image(path)
        if box is not None:
            face: DetectedFace | None = DetectedFace(box)
        else:
            face = next(iter(select_from_photo(image, self.detector, when_none="skip").chosen_faces), None)
        vector = clip_face = None
        # Without a detector the pictures have no boxes, so those of the photos are for the adapter only.
        compared = face if self.finds_faces else WholeImage().detect(image)[0]
        if compared is not None:
            vector = self.recogniser.vector(image, compared)
            if self.clip is not None:
                scale = crop_scale_of(compared)
                clip_face = self.clip.images([crop_face(image, compared.box, self.clip.side, scale)])[0]
        clip = None if self.clip is None else self.clip.images([image])[0]
        return {
            "box": None if face is None else list(face.box),
            "source": "" if face is None else face.source,
            **{name: to_text(one) for name, one in (("vector", vector), ("clip_face", clip_face), ("clip", clip))},
        }

    def similarity(self, vectors: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> np.ndarray:
        """``(N, M)`` as the recogniser compares."""
        return self.recogniser.similarity(*(torch.from_numpy(np.stack([*some])) for some in (vectors, others))).numpy()

    def rewards(self, prompt: str, path: Path) -> float:
        """ImageReward of a picture for a prompt."""
        key = key_of("reward", digest_of(path), prompt, self.reward.fingerprint)
        found = self.memo.get(key) or self.memo.put(key, reward=self.reward.score(prompt, path))
        return found["reward"]


@dataclass(frozen=True, eq=False)
class References:
    """The photos of a person in which a face was found, in their order.

    Args:
        person: whose.
        looks: at least one; those of the same file once.
        used: as many of the first ones as the adapter sees.
        without_face: files of the others.
    """

    person: Person
    looks: tuple[Look, ...]
    used: int
    without_face: tuple[Path, ...] = ()

    @property
    def shown(self) -> tuple[Look, ...]:
        """Those that the adapter sees."""
        return self.looks[: self.used]

    @cached_property
    def vectors(self) -> np.ndarray:
        """``(N, D)`` of the recogniser."""
        return np.stack([look.vector for look in self.looks])


def look_at_photos(person: Person, looker: Looker, used: int) -> References:
    """The references of a person.

    Raises:
        TrainerError: no face in any of the photos, or none that the recogniser can compare.
        FeedFaceError: a photo that cannot be read.
    """
    looks, without, seen = [], [], set()
    for photo in person.photos:
        if (digest := digest_of(photo.path)) in seen:
            continue  # the same file again would be more alike than two photos of a person can be
        seen.add(digest)
        look = _look_at(photo, looker)
        if look.vector is None:
            without.append(photo.path)
        else:
            looks.append(look)
    if not looks:
        files, tools = listing(path.name for path in without), f"{looker.detector.name} and {looker.recogniser.name}"
        raise TrainerError(
            f"{person.name}: no face in any of the {len(without)} photos ({files}) by {tools}; give other photos, or "
            "detect.detector='whole image' for photos that show nothing but the face"
        )
    return References(person, tuple(looks), min(used, len(looks)), tuple(without))


def _look_at(photo: Photo, looker: Looker) -> Look:
    try:
        return looker(photo.path, photo.box)
    except FeedFaceError as error:
        raise TrainerError(f"photo {photo.path}: {str(error).removeprefix(f'{photo.path}: ')}") from error
