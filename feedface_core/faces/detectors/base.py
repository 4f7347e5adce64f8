"""The interface of a face detector, and the detectors that need no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import FeedFaceError
from ..box import DetectedFace
from ..crop import check_image, mask_boxes

LONGEST_SIDE = 1024
"""Photos are shrunk to this many pixels before detection: faster, and at full size detectors find many false faces."""
INSIGHTFACE, MTCNN, WHOLE_IMAGE = "insightface", "mtcnn", "whole image"


class DetectorUnavailable(FeedFaceError):
    """The package or the model files of a detector are missing or do not work."""


class Detector(ABC):
    """Finds faces in one photo.

    Attributes:
        name: what the user chose it by.
        licence: of the code and the weights, in a few words.
        detail: the model in use, if there are several.
    """

    name: str
    licence: str
    detail: str = ""

    @property
    def description(self) -> str:
        """Name, model and licence in one line, for reports."""
        return f"{self.name}{f' ({self.detail})' if self.detail else ''} [{self.licence}]"

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """Find the faces of a photo.

        Args:
            image: ``(H, W, 3)`` floats in 0..1, any size; greyscale and alpha as in ``crop.check_image``.

        Returns:
            The faces in the order of the model, boxes and landmarks in pixels of ``image``; empty if there is none.

        Raises:
            FeedFaceError: if the image cannot be used.
        """
        image = check_image(image)
        small = shrink(image)
        sx, sy = image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]

        def rescaled(face: DetectedFace) -> DetectedFace:
            x0, y0, x1, y1 = face.box
            landmarks = None if face.landmarks is None else face.landmarks * torch.tensor([sx, sy])
            return replace(face, box=(x0 * sx, y0 * sy, x1 * sx, y1 * sy), landmarks=landmarks)

        return [rescaled(face) for face in self.find(small)]

    @abstractmethod
    def find(self, image: Tensor) -> list[DetectedFace]:
        """Find the faces of a photo ``(H, W, 3)`` that is already checked and shrunk; boxes in its pixels."""


def shrink(image: Tensor, longest_side: int = LONGEST_SIDE) -> Tensor:
    """Shrink ``(H, W, C)`` so that its longer side is at most ``longest_side`` pixels, antialiased; smaller photos stay
    as they are."""
    height, width = image.shape[:2]
    factor = longest_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    planes = image.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def to_bytes(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8).cpu().contiguous()


class WholeImage(Detector):
    """Takes the whole photo as the face: for photos that are cropped to it already."""

    name, licence = WHOLE_IMAGE, "no model"

    def find(self, image: Tensor) -> list[DetectedFace]:
        return [DetectedFace((0, 0, image.shape[1], image.shape[0]), source=self.name)]


class GivenBoxes(Detector):
    """Returns the faces of one photo that somebody drew boxes around."""

    name, licence = "boxes", "no model"

    def __init__(self, faces: Sequence[DetectedFace]) -> None:
        self.faces = list(faces)

    def detect(self, image: Tensor) -> list[DetectedFace]:
        return self.find(check_image(image))

    def find(self, image: Tensor) -> list[DetectedFace]:
        return list(self.faces)


class GivenMask(Detector):
    """Takes every connected region of a mask ``(H, W)`` as a face. The mask has the size of the photo."""

    name, licence = "mask", "no model"

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def detect(self, image: Tensor) -> list[DetectedFace]:
        image = check_image(image)
        if self.mask.shape != image.shape[:2]:
            raise FeedFaceError(
                f"mask: {self.mask.shape[-1]} × {self.mask.shape[-2]} pixels, but the photo has"
                f" {image.shape[1]} × {image.shape[0]} (Load Image gives an empty mask of 64 × 64 pixels"
                " with a photo that has no transparency)"
            )
        return self.find(image)

    def find(self, image: Tensor) -> list[DetectedFace]:
        return [DetectedFace(box, source=self.name) for box in mask_boxes(self.mask)]
