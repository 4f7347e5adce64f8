"""Face recognisers: a face → a vector that is near those of other photos of the person.

Nothing here downloads anything. A recogniser whose package or model files are missing is passed over by ``auto``, and
asking for it by name gives an error that says what is missing and how to get it.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FeedFaceError, shorten
from .box import DetectedFace
from .crop import check_image
from .detectors import AUTO, load_detector
from .detectors.base import INSIGHTFACE, Detector, DetectorUnavailable, to_bytes
from .detectors.insightface import find_insightface_packs

DLIB, ENCODER = "dlib", "adapter's encoder"
RECOGNISER_NAMES = (INSIGHTFACE, DLIB, ENCODER)
"""From the strongest to the weakest."""
_SAME_FACE = 0.3
"""Intersection over union from which a face that is found again is the same one."""


class RecogniserUnavailable(FeedFaceError):
    """The package or the model files of a recogniser are missing or do not work."""


class Recogniser(ABC):
    """Tells faces apart.

    Attributes:
        name: which one, with its model: vectors of recognisers of different names are not comparable.
        licence: of the code and the weights, in a few words.
        install: the command that installs it.
        same: the similarity from which two photos count as of one person; NaN where nobody has measured one.
        distance: largest mean Euclidean distance of the vectors within one person.
    """

    name: str
    licence: str
    install: str
    same: float
    distance: float

    @abstractmethod
    def vectors(self, image: Tensor, faces: Sequence[DetectedFace]) -> list[Tensor | None]:
        """The vector ``(D,)``, float32 on the CPU, of each of the faces of one photo ``(H, W, 3)`` in 0…1; None for a
        face that the recogniser does not find again. Of unit length where :meth:`similarity` is the cosine."""

    def vector(self, image: Tensor, face: DetectedFace) -> Tensor | None:
        """The vector ``(D,)`` of one face, as :meth:`vectors` gives it."""
        return self.vectors(image, [face])[0]

    def similarity(self, vectors: Tensor, others: Tensor) -> Tensor:
        """``(N, D)`` and ``(M, D)`` → ``(N, M)`` in −1…1, higher for more alike faces: the cosine."""
        return (functional.normalize(vectors, dim=-1) @ functional.normalize(others, dim=-1).T).clamp(-1, 1)


class InsightFaceRecogniser(Recogniser):
    """The recogniser of an InsightFace pack (ArcFace, Deng et al. 2019, arXiv:1801.07698): unit vectors of 512.

    Args:
        roots: folders that hold ``models/<pack>/*.onnx``.
        model: the pack; the preferred one by default.

    Raises:
        DetectorUnavailable: no package or no such pack, or one without a recogniser.
    """

    licence = "code MIT; model packs for non-commercial research only"
    install = "pip install insightface onnxruntime, and a model pack"
    same, distance = 0.4, 1.1  # of unit vectors, so that the distance is a cosine of 0.4

    def __init__(self, roots: Sequence[str | Path] = (), model: str | None = None, device: str = "cpu") -> None:
        options = {"insightface_roots": roots, "model": model, "recognition": True, "device": device}
        self.detector: Detector = load_detector(INSIGHTFACE, **options)
        self.name = f"{INSIGHTFACE}/{self.detector.detail}"

    def vectors(self, image: Tensor, faces: Sequence[DetectedFace]) -> list[Tensor | None]:
        from torchvision.ops import box_iou

        found = [face for face in self.detector.detect(image) if face.embedding is not None]
        if not found or not faces:
            return [None] * len(faces)
        boxes = [torch.tensor([face.box for face in several]) for several in (faces, found)]
        overlaps, places = box_iou(*boxes).max(1)
        pairs = zip(overlaps.tolist(), places.tolist(), strict=True)
        return [found[place].embedding.float() if overlap >= _SAME_FACE else None for overlap, place in pairs]


class DlibRecogniser(Recogniser):
    """dlib's residual network (weights in the package face_recognition_models): vectors of 128.

    They are as long as the network makes them, about 1.45, and near each other in angle; its author compares by
    Euclidean distance d and takes 0.6 for one person. The similarity is 1 − d, from −1 on: 0.4 at that distance, as
    InsightFace's.

    Raises:
        RecogniserUnavailable: one of the two packages is missing.
    """

    name, licence = DLIB, "code BSL-1.0, weights public domain"
    install = "pip install dlib-bin face_recognition_models"
    same, distance = 0.4, 0.55

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise RecogniserUnavailable(f'{DLIB}: {error}; "{self.install}"') from error
        package = importlib.util.find_spec("face_recognition_models")
        folder = Path(package.origin).parent / "models" if package is not None else None
        if folder is None or not folder.is_dir():
            raise RecogniserUnavailable(f'{DLIB}: no package face_recognition_models; "{self.install}"')
        self.landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self.network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
        self.rectangle = dlib.rectangle

    def vectors(self, image: Tensor, faces: Sequence[DetectedFace]) -> list[Tensor | None]:
        pixels = to_bytes(check_image(image)).numpy()
        shapes = [self.landmarks(pixels, self.rectangle(*map(round, face.box))) for face in faces]
        return [torch.tensor(list(self.network.compute_face_descriptor(pixels, shape))) for shape in shapes]

    def similarity(self, vectors: Tensor, others: Tensor) -> Tensor:
        """1 − the Euclidean distance, at least −1."""
        return (1 - torch.cdist(vectors, others)).clamp(min=-1)


class EncoderRecogniser(Recogniser):
    """The class tokens of an adapter's face encoder. The weakest recogniser: CLIP was trained to describe pictures, so
    light, pose and clothes count as much as who it is. It needs nothing beside the adapter, and for drawn people there
    is no other.

    Args:
        encode: one photo ``(H, W, 3)`` and a list of faces → hidden states ``(N, T, E)`` of their crops.
        key: which encoder, its fingerprint.
    """

    licence, install = "as the adapter", "connect an adapter"
    same = distance = float("nan")

    def __init__(self, encode: Callable[[Tensor, Sequence[DetectedFace]], Tensor], key: str = "") -> None:
        self.encode, self.name = encode, f"{ENCODER} {key}".strip()

    def vectors(self, image: Tensor, faces: Sequence[DetectedFace]) -> list[Tensor | None]:
        if not faces:
            return []
        return list(functional.normalize(self.encode(image, faces)[:, 0].float().cpu(), dim=-1))


LICENCES = {INSIGHTFACE: InsightFaceRecogniser.licence, DLIB: DlibRecogniser.licence}

# A network takes seconds to load, and a node runs again for every picture.
_load_dlib = lru_cache(maxsize=1)(DlibRecogniser)


def load_recogniser(
    name: str = AUTO,
    *,
    insightface_roots: Sequence[str | Path] = (),
    model: str | None = None,
    device: str | torch.device = "cpu",
    encoder: EncoderRecogniser | None = None,
) -> Recogniser:
    """A recogniser by name.

    Args:
        name: one of :data:`RECOGNISER_NAMES`, or ``"auto"``: the first of them that can be used.
        insightface_roots: folders that hold ``models/<pack>/*.onnx``.
        model: InsightFace model pack; the preferred one of those found by default.
        device: where InsightFace runs.
        encoder: the one of an adapter, if there is one.

    Raises:
        DetectorUnavailable: if InsightFace was asked for and is missing.
        RecogniserUnavailable: if another that was asked for, or with ``"auto"`` every one, is missing; says of each
            why and how to get it.
        FeedFaceError: if there is no recogniser of that name.
    """
    if name not in (AUTO, *RECOGNISER_NAMES):
        found = shorten(name)
        raise FeedFaceError(f"no face recogniser {found}; there are: {AUTO}, {', '.join(RECOGNISER_NAMES)}")
    if name == DLIB:
        return _load_dlib()
    if name == ENCODER:
        if encoder is None:
            raise RecogniserUnavailable(f"the recogniser {ENCODER!r} needs an adapter, and none is connected")
        return encoder
    problems = []
    if name == INSIGHTFACE or find_insightface_packs(insightface_roots):
        try:
            return InsightFaceRecogniser(insightface_roots, model, str(device))
        except DetectorUnavailable as error:
            if name == INSIGHTFACE:
                raise
            problems.append(str(error))
    else:
        problems.append("no InsightFace models in " + (", ".join(map(str, insightface_roots)) or "no folder"))
    try:
        return _load_dlib()
    except RecogniserUnavailable as error:
        problems.append(str(error))
    if encoder is not None:
        return encoder
    raise RecogniserUnavailable("no face recogniser can be used: " + "; ".join(problems))


def vectors_of_crops(recogniser: Recogniser, crops: Tensor, scale: float) -> list[Tensor | None]:
    """The vector ``(D,)`` of each of several face crops; None where the recogniser does not find the face again.

    Args:
        crops: ``(N, H, W, 3)`` with values 0…1.
        scale: side of a crop over the longer side of its face's box.
    """
    height, width = crops.shape[1:3]
    x, y = width * (1 - 1 / scale) / 2, height * (1 - 1 / scale) / 2
    face = DetectedFace((x, y, width - x, height - y))
    return [recogniser.vector(crop, face) for crop in crops]
