"""Who is in the photo: given, read off the file's name or folder, or clustered with a face recogniser."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch

from feedface_core.faces import DetectedFace, DetectorUnavailable, find_insightface_packs, load_detector

from ..settings import ConfigError
from .photo import Drop, Photo, Stage
from .settings import DetectSettings, IdentitySettings

MOST_CLUSTERED = 20_000
"""Average linkage keeps all pairwise distances: 1.6 GB at this number of photos."""


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
            raise ConfigError(f'identity.recogniser=dlib: {error}; "pip install dlib-bin"') from error
        package = importlib.util.find_spec("face_recognition_models")
        folder = Path(package.origin).parent / "models" if package is not None else None
        if folder is None or not folder.is_dir():
            raise ConfigError(
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


class Recognise(Stage):
    """Gives every photo the vector of its face, for :func:`cluster`."""

    def __init__(self, settings: IdentitySettings, detect: DetectSettings) -> None:
        self.recogniser = load_recogniser(settings, detect)

    def process(self, photo: Photo) -> None:
        vector = self.recogniser.vector(photo)
        if vector is None:
            raise Drop("face not recognised", self.recogniser.name)
        photo.vector = [round(float(value), 6) for value in vector]


def load_recogniser(settings: IdentitySettings, detect: DetectSettings) -> Recogniser:
    """The recogniser that the settings name.

    Raises:
        ConfigError: if it is not installed, or with auto if none is.
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
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError("identity.source=cluster needs a face recogniser: " + "; ".join(problems))


def cluster(ids: Sequence[str], vectors: Sequence[Sequence[float]], distance: float) -> dict[str, str]:
    """Names of persons by photo id: average linkage, cut at a mean distance.

    Persons are numbered by their number of photos, then by their first photo.

    Raises:
        ConfigError: for more photos than all pairwise distances fit in memory for.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(ids) > MOST_CLUSTERED:
        raise ConfigError(
            f"identity.source=cluster compares all pairs, for at most {MOST_CLUSTERED} photos; there are "
            f"{len(ids)}. Give identities (a folder a person, or a column of the table) or prepare parts"
        )
    labels = fcluster(linkage(np.array(vectors), "average"), distance, "distance") if len(ids) > 1 else [1]
    sizes = Counter(int(label) for label in labels)
    first: dict[int, int] = {}
    for place, label in enumerate(labels):
        first.setdefault(int(label), place)
    order = sorted(sizes, key=lambda label: (-sizes[label], first[label]))
    names = {label: f"person-{number:04d}" for number, label in enumerate(order, 1)}
    return {photo: names[int(label)] for photo, label in zip(ids, labels, strict=True)}


def named_identity(photo: Photo, settings: IdentitySettings) -> str | None:
    """The person as given, by the pattern, or by the sub-folder; None if none of them says.

    Raises:
        ConfigError: for a pattern that is no regular expression with a group.
    """
    source = settings.source
    if source in ("auto", "given") and photo.given.get("identity"):
        return str(photo.given["identity"])
    if source == "pattern" or (source == "auto" and settings.pattern is not None):
        found = compile_pattern(settings.pattern).search(photo.path.name)
        return found.group(1) if found else None
    if source in ("auto", "folder"):
        parent = PurePosixPath(photo.id).parent
        return None if parent == PurePosixPath(".") or parent.is_absolute() else str(parent)
    return None


def compile_pattern(pattern: str | None) -> re.Pattern[str]:
    """Raises ``ConfigError`` unless the pattern is a regular expression with a group."""
    try:
        compiled = re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"identity.pattern {pattern!r}: not a regular expression ({error})") from error
    if compiled.groups < 1:
        raise ConfigError(f"identity.pattern {pattern!r}: needs a group that is the person, such as '(.+)_\\d+'")
    return compiled


def _overlap(first: DetectedFace, second: DetectedFace) -> float:
    """Intersection over union of two boxes."""
    x0, y0 = max(first.box[0], second.box[0]), max(first.box[1], second.box[1])
    x1, y1 = min(first.box[2], second.box[2]), min(first.box[3], second.box[3])
    common = max(x1 - x0, 0.0) * max(y1 - y0, 0.0)
    return common / (first.area + second.area - common)
