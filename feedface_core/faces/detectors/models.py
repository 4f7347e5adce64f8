"""The detectors that run a model: MTCNN from facenet-pytorch, and the model packs of InsightFace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..box import DetectedFace, FaceError
from .base import INSIGHTFACE, MTCNN, Detector, DetectorUnavailable, to_bytes

INSIGHTFACE_PACKS = ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
"""Model packs in order of preference; others follow by name."""


class MtcnnDetector(Detector):
    """MTCNN (Zhang et al. 2016, arXiv:1604.02878) from facenet-pytorch, whose weights come inside the
    package.

    Args:
        device: where the three small networks run (2 MB).
        threshold: lowest probability that counts as a face.
        min_face_size: smallest face looked for, in pixels of the shrunk photo.
    """

    name = MTCNN
    licence = "MIT, weights included in facenet-pytorch"
    INSTALL = "pip install facenet-pytorch==2.5.3"

    def __init__(self, device: str | torch.device = "cpu", threshold: float = 0.9, min_face_size: int = 20) -> None:
        try:
            from facenet_pytorch import MTCNN as Network
        except ImportError as error:
            raise DetectorUnavailable(
                f"the detector {MTCNN!r} needs the package facenet-pytorch ({error}); install it with"
                f' "{self.INSTALL}" (2.6.0 would replace PyTorch by an old release)'
            ) from error
        self.threshold = threshold
        self.min_face_size = min_face_size
        self.network = Network(keep_all=True, min_face_size=min_face_size, device=torch.device(device)).eval()

    def find(self, image: Tensor) -> list[DetectedFace]:
        if min(image.shape[:2]) < self.min_face_size:
            return []  # the pyramid of scales would be empty
        pixels = to_bytes(image).to(self.network.device)
        try:
            boxes, probabilities, points = self.network.detect(pixels, landmarks=True)
        except IndexError as error:
            # facenet-pytorch drops candidates that fall outside the picture from one list and not from the
            # other.
            raise FaceError(
                f"MTCNN failed on a photo of {image.shape[1]} × {image.shape[0]} pixels ({error}); choose"
                " another detector, or give a box or a mask"
            ) from error
        if boxes is None:
            return []
        return [
            DetectedFace(
                box=box,
                confidence=float(probability),
                landmarks=torch.as_tensor(marks.astype("float32")),
                source=self.name,
            )
            for box, probability, marks in zip(boxes, probabilities, points, strict=True)
            if probability >= self.threshold and box[2] > box[0] and box[3] > box[1]
        ]


@dataclass(frozen=True)
class InsightFacePack:
    """A folder of InsightFace models: ``<root>/models/<name>``."""

    name: str
    path: Path


def find_insightface_packs(roots: Sequence[str | Path]) -> list[InsightFacePack]:
    """The model packs below the given InsightFace folders, preferred ones first.

    Args:
        roots: folders that hold ``models/<name>/*.onnx``, e.g. ``ComfyUI/models/insightface``.
    """
    packs: dict[str, InsightFacePack] = {}
    for root in roots:
        models = Path(root).expanduser() / "models"
        for folder in sorted(models.iterdir()) if models.is_dir() else []:
            # The archive of antelopev2 unpacks into antelopev2/antelopev2.
            for path in (folder, folder / folder.name):
                if path.is_dir() and any(path.glob("*.onnx")):
                    packs.setdefault(folder.name, InsightFacePack(folder.name, path.resolve()))
    rank = {name: index for index, name in enumerate(INSIGHTFACE_PACKS)}
    return sorted(packs.values(), key=lambda pack: (rank.get(pack.name, len(rank)), pack.name))


class InsightFaceDetector(Detector):
    """An InsightFace model pack through its own ``FaceAnalysis``.

    Args:
        pack: the folder of models.
        threshold: lowest score that counts as a face.
        recognition: also compute the identity vector of every face.
        device: ``"cpu"``, or ``"cuda"`` if onnxruntime offers it.
    """

    name = INSIGHTFACE
    licence = "code MIT; model packs for non-commercial research only"
    INSTALL = "pip install insightface onnxruntime"
    SIZES = (640, 320, 160)
    """Sides of the square the detector works on. A face that fills the photo is often found only at the
    smaller ones."""

    def __init__(
        self,
        pack: InsightFacePack,
        threshold: float = 0.5,
        recognition: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        self.detail = pack.name
        self.threshold = threshold
        modules = ["detection", "recognition"] if recognition else ["detection"]
        try:
            import onnxruntime
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise DetectorUnavailable(
                f'the detector {INSIGHTFACE!r} needs its packages ({error}): "{self.INSTALL}"'
            ) from error
        cuda = "CUDAExecutionProvider"
        on_cuda = torch.device(device).type == "cuda" and cuda in onnxruntime.get_available_providers()
        self.context = 0 if on_cuda else -1
        try:
            # An absolute path as the name is used as it is, by 0.7 and by 2.x, and never looked for online.
            self.analysis = FaceAnalysis(
                name=str(pack.path),
                allowed_modules=modules,
                providers=[cuda, "CPUExecutionProvider"] if on_cuda else ["CPUExecutionProvider"],
            )
        except Exception as error:  # AssertionError, ConnectionError, and whatever onnxruntime has for broken files
            files = ", ".join(sorted(file.name for file in pack.path.glob("*.onnx"))) or "none"
            raise DetectorUnavailable(
                f"InsightFace cannot use the models in {pack.path} (.onnx files: {files}):"
                f" {str(error) or 'none of them is a face detector'} ({type(error).__name__})"
            ) from error
        if recognition and "recognition" not in self.analysis.models:
            raise DetectorUnavailable(f"the InsightFace models in {pack.path} hold no face recogniser")

    def find(self, image: Tensor) -> list[DetectedFace]:
        pixels = to_bytes(image).numpy()[..., ::-1].copy()  # (H, W, 3) blue, green, red
        found = []
        for side in self.SIZES:
            self.analysis.prepare(ctx_id=self.context, det_thresh=self.threshold, det_size=(side, side))
            found = self.analysis.get(pixels)
            if found or getattr(self.analysis.det_model, "static_input_size", None):
                break
        return [self._face(face) for face in found]

    def _face(self, face) -> DetectedFace:
        landmarks, embedding = face.kps, getattr(face, "embedding", None)
        if embedding is not None:
            embedding = F.normalize(torch.from_numpy(embedding).float().flatten(), dim=0)
        return DetectedFace(
            box=tuple(face.bbox.tolist()),
            confidence=float(face.det_score),
            landmarks=None if landmarks is None else torch.from_numpy(landmarks).float(),
            embedding=embedding,
            source=self.name,
        )
