"""MTCNN from facenet-pytorch, whose weights come inside the package."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import FeedFaceError
from ..box import DetectedFace
from .base import MTCNN, Detector, DetectorUnavailable, to_bytes


class MtcnnDetector(Detector):
    """MTCNN (Zhang et al. 2016, arXiv:1604.02878).

    Args:
        device: where the three small networks run (2 MB).
        threshold: lowest probability that counts as a face.
        min_face_size: smallest face looked for, in pixels of the shrunk photo.
    """

    name = MTCNN
    licence = "MIT, weights included in facenet-pytorch"
    packages = ("facenet_pytorch",)
    install = "pip install facenet-pytorch==2.5.3"

    def __init__(self, device: str | torch.device = "cpu", threshold: float = 0.9, min_face_size: int = 20) -> None:
        try:
            from facenet_pytorch import MTCNN as Network
        except ImportError as error:
            raise DetectorUnavailable(
                f"the detector {MTCNN!r} needs the package facenet-pytorch ({error}); install it with"
                f' "{self.install}" (2.6.0 would replace PyTorch by an old release)'
            ) from error
        self.threshold, self.min_face_size = threshold, min_face_size
        self.network = Network(keep_all=True, min_face_size=min_face_size, device=torch.device(device)).eval()

    def find(self, image: Tensor) -> list[DetectedFace]:
        if min(image.shape[:2]) < self.min_face_size:
            return []  # the pyramid of scales would be empty
        try:
            boxes, probabilities, points = self.network.detect(to_bytes(image).to(self.network.device), landmarks=True)
        except IndexError as error:
            # facenet-pytorch drops candidates that fall outside the picture from one list and not from the other.
            raise FeedFaceError(
                f"MTCNN failed on a photo of {image.shape[1]} × {image.shape[0]} pixels ({error}); choose another"
                " detector, or give a box or a mask"
            ) from error
        if boxes is None:
            return []
        return [
            DetectedFace(box, float(probability), torch.as_tensor(marks.astype("float32")), source=self.name)
            for box, probability, marks in zip(boxes, probabilities, points, strict=True)
            if probability >= self.threshold and box[2] > box[0] and box[3] > box[1]
        ]
