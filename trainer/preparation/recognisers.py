"""Face recognisers: a face → a vector that is near those of other photos of the person."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from feedface_core.faces import DetectorUnavailable, find_insightface_packs, load_detector

from ..config.preparation import DetectSettings, IdentitySettings
from ..errors import TrainerError
from .identities import compares_faces
from .photo import Drop, Photo, Stage


class InsightFaceRecogniser:
    """The recogniser of an InsightFace pack: unit vectors, so a distance of 1.1 is a cosine of 0.4."""

    name = "insightface"
    distance = 1.1
    """Largest mean distance within one person."""

    def __init__(self, settings: DetectSettings) -> None:
        self.detector = load_detector(
            "insightface",
            insightface_roots=settings.insightface_roots,
            model=settings.model,
            recognition=True,
            device=settings.device,
        )

    def vector(self, photo: Photo) -> np.ndarray | None:
        """The vector of ``photo.face``, or None if it is not found again."""
        from torchvision.ops import box_iou

        found = [face for face in self.detector.detect(photo.image) if face.embedding is not None]
        if not found:
            return None
        overlaps = box_iou(torch.tensor([face.box for face in found]), torch.tensor([photo.face.box]))[:, 0]
        return found[overlaps.argmax()].embedding.numpy() if overlaps.max() >= 0.3 else None


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

    def vector(self, photo: Photo) -> np.ndarray:
        """The vector of ``photo.face``."""
        pixels = (photo.image * 255).round().to(torch.uint8).numpy()
        shape = self.landmarks(pixels, self.rectangle(*map(round, photo.face.box)))
        return np.array(self.network.compute_face_descriptor(pixels, shape))


Recogniser = InsightFaceRecogniser | DlibRecogniser


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
    """Gives photos whose faces are compared the vector of theirs; it stays empty for a face that is not found again.

    Args:
        recogniser: that looks at the faces.
        settings: say which faces are compared; to cluster them, all have to be recognised.
    """

    def __init__(self, recogniser: Recogniser, settings: IdentitySettings) -> None:
        self.recogniser, self.settings = recogniser, settings

    def process(self, photo: Photo) -> None:
        if not compares_faces(photo, self.settings):
            return
        vector = self.recogniser.vector(photo)
        if vector is None and self.settings.source == "cluster":
            raise Drop("face not recognised", self.recogniser.name)
        photo.vector = [] if vector is None else [round(float(value), 6) for value in vector]
