"""Face recognisers: a face → a vector that is near those of other photos of the person."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from feedface_core.faces import DetectedFace, DetectorUnavailable, find_insightface_packs, load_detector

from ..config.preparation import DetectSettings, IdentitySettings
from ..errors import TrainerError
from .photo import Drop, Photo, Stage


class Recogniser(Protocol):
    """Face → vector; two photos of a person are closer than photos of two.

    Attributes:
        name: shown to the user.
        distance: largest mean distance within one person.
    """

    name: str
    distance: float

    def vector(self, photo: Photo) -> np.ndarray | None:
        """The vector of ``photo.face``, or None if it is not found again."""


class InsightFaceRecogniser:
    """The recogniser of an InsightFace pack: unit vectors, so a distance of 1.1 is a cosine of 0.4."""

    name = "insightface"
    distance = 1.1

    def __init__(self, settings: DetectSettings) -> None:
        self.detector = load_detector(
            "insightface",
            insightface_roots=settings.insightface_roots,
            model=settings.model,
            recognition=True,
            device=settings.device,
        )

    def vector(self, photo: Photo) -> np.ndarray | None:
        found = [face for face in self.detector.detect(photo.image) if face.embedding is not None]
        best = max(found, key=lambda face: _overlap(face, photo.face), default=None)
        if best is None or _overlap(best, photo.face) < 0.3:
            return None
        return best.embedding.numpy()


class DlibRecogniser:
    """dlib's residual network (weights in the package face_recognition_models, public domain)."""

    name = "dlib"
    distance = 0.55

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise TrainerError(f'identity.recogniser=dlib: {error}; "pip install dlib-bin"') from error
        package = importlib.util.find_spec("face_recognition_models")
        folder = Path(package.origin).parent / "models" if package is not None else None
        if folder is None or not folder.is_dir():
            raise TrainerError(
                'identity.recogniser=dlib: no package face_recognition_models; "pip install face_recognition_models"'
            )
        self.landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self.network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
        self.rectangle = dlib.rectangle

    def vector(self, photo: Photo) -> np.ndarray | None:
        pixels = (photo.image * 255).round().to(torch.uint8).numpy()
        box = self.rectangle(*(round(value) for value in photo.face.box))
        shape = self.landmarks(pixels, box)
        return np.array(self.network.compute_face_descriptor(pixels, shape))


def load_recogniser(settings: IdentitySettings, detect: DetectSettings) -> Recogniser:
    """The recogniser that the settings name.

    Raises:
        TrainerError: if it is not installed, or with auto if none is.
    """
    problems = []
    if settings.recogniser in ("auto", "insightface"):
        try:
            if settings.recogniser == "insightface" or find_insightface_packs(detect.insightface_roots):
                return InsightFaceRecogniser(detect)
            problems.append("no InsightFace models in " + ", ".join(detect.insightface_roots))
        except DetectorUnavailable as error:
            problems.append(str(error))
    if settings.recogniser in ("auto", "dlib"):
        try:
            return DlibRecogniser()
        except TrainerError as error:
            problems.append(str(error))
    raise TrainerError(f"identity.source={settings.source} needs a face recogniser: " + "; ".join(problems))


class Recognise(Stage):
    """Gives photos the vector of their face: ``photo.vector``, which stays empty for a face that is not found again.

    Args:
        recogniser: that looks at the faces.
        wanted: which photos have to be looked at.
        required: drop photos whose face is not recognised.
    """

    def __init__(self, recogniser: Recogniser, wanted: Callable[[Photo], bool], required: bool) -> None:
        self.recogniser, self.wanted, self.required = recogniser, wanted, required

    def process(self, photo: Photo) -> None:
        if not self.wanted(photo):
            return
        vector = self.recogniser.vector(photo)
        if vector is None and self.required:
            raise Drop("face not recognised", self.recogniser.name)
        photo.vector = [] if vector is None else [round(float(value), 6) for value in vector]


def _overlap(first: DetectedFace, second: DetectedFace) -> float:
    """Intersection over union of two boxes."""
    x0, y0 = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    x1, y1 = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    common = max(x1 - x0, 0.0) * max(y1 - y0, 0.0)
    return common / (first.area + second.area - common)
