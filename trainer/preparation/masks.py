"""The mask of a face with its hair, for the training loss: parsed by Facer if its model is there, else an ellipse."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from feedface_core.faces import DetectedFace, DetectorUnavailable, check_image, resample, square_box

from ..errors import TrainerError

logger = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the mask of the same face comes out otherwise: prepared masks are then made anew."""
REGION_SCALE = 4.0
"""The parser sees the square of this many times the face box: room for long hair."""
REGION_SIDE = 512
FACER_FILES = "face_parsing.farl.lapa*.pt"


@dataclass(frozen=True)
class HeadEllipse:
    """An ellipse around a head: centre and semi-axes across and along the face in pixels, unit vector to the chin."""

    centre: tuple[float, float]
    across: float
    along: float
    down: tuple[float, float] = (0.0, 1.0)


def head_ellipse(face: DetectedFace) -> HeadEllipse:
    """The ellipse around a head with short hair, from its landmarks, else from its box.

    The unit is the distance from the eyes to the mouth, or between the eyes if that is longer (a face that
    looks up or down). The chin is 1.8 units below the eyes and the top of the hair 2.2 above, so the ellipse
    follows the head when it tilts. When the head turns, the nose leaves the line from eyes to mouth, and most
    of the head is on the other side: the centre moves back by twice that distance.
    """
    if face.landmarks is None:
        x, y = face.centre
        # Boxes of detectors end at the chin and near the hairline: hair adds to the top and the sides.
        return HeadEllipse((x, y - 0.12 * face.height), 0.7 * face.width, 0.72 * face.height)
    left, right, nose, mouth_left, mouth_right = face.landmarks.double()
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    down = mouth - eyes
    unit = max(down.norm().item(), (right - left).norm().item())
    if unit == 0:
        raise TrainerError("the landmarks of the face are all the same point")
    down = down / down.norm().clamp(min=1e-6)
    across = torch.stack([down[1], -down[0]])
    turn = ((nose - eyes) @ across).clamp(-0.45 * unit, 0.45 * unit)
    centre = eyes - 0.2 * unit * down - 2 * turn * across
    return HeadEllipse(tuple(centre.tolist()), 1.5 * unit, 2.0 * unit, tuple(down.tolist()))


def ellipse_mask(height: int, width: int, ellipse: HeadEllipse) -> Tensor:
    """Coverage ``(height, width)`` in 0..1 of an ellipse, with an edge one pixel wide.

    With u, v the offsets of a pixel's centre across and along the face over the semi-axes a, b and r = √(u² +
    v²), the distance to the edge is about (r − 1)·r / |∇r²/2| with ∇r²/2 = (u/a, v/b).
    """
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    dx, dy = x - ellipse.centre[0], y - ellipse.centre[1]
    down_x, down_y = ellipse.down
    u = (dx * down_y - dy * down_x) / ellipse.across
    v = (dx * down_x + dy * down_y) / ellipse.along
    r = torch.hypot(u, v)
    distance = (r - 1) * r / torch.hypot(u / ellipse.across, v / ellipse.along).clamp(min=1e-9)
    return torch.where(r < 1e-6, torch.ones_like(r), (0.5 - distance).clamp(0, 1))


def face_mask(image: Tensor, face: DetectedFace, parser: FacerParser | None = None) -> tuple[Tensor, str]:
    """The mask of one face of a photo, hair included.

    Args:
        image: ``(H, W, 3)`` floats in 0…1.
        face: the face, in pixels of the photo.
        parser: used if given and the face has landmarks; see :func:`load_parser`.

    Returns:
        The mask ``(H, W)`` in 0…1, and how it was made: the parser's name, ``"ellipse from landmarks"`` or
        ``"ellipse from box"``. A parser that finds nothing inside the box gives way to the ellipse, and the
        text says so.

    Raises:
        FeedFaceError: if the photo cannot be used or the face lies outside it.
    """
    image = check_image(image)
    height, width = image.shape[:2]
    source = "ellipse from landmarks" if face.landmarks is not None else "ellipse from box"
    if parser is not None and face.landmarks is not None:
        mask = _parsed_mask(image, face, parser)
        if mask is not None:
            return mask, parser.name
        source += f" ({parser.name} found nothing)"
    mask = ellipse_mask(height, width, head_ellipse(face))
    if mask.sum() == 0:
        box = ", ".join(f"{v:.0f}" for v in face.box)
        raise TrainerError(f"the face at {box} lies outside the photo of {width} × {height} pixels")
    return mask, source


def _parsed_mask(image: Tensor, face: DetectedFace, parser: FacerParser) -> Tensor | None:
    """The connected region that covers most of the face's box, as the parser sees its neighbourhood; or None."""
    from scipy import ndimage

    height, width = image.shape[:2]
    x0, y0, x1, y1 = (round(v) for v in square_box(face.box, REGION_SCALE))
    side = max(x1 - x0, y1 - y0, 1)
    pixels = min(side, REGION_SIDE)
    landmarks = (face.landmarks - torch.tensor([x0, y0])) * (pixels / side)
    region = resample(image, (x0, y0, x0 + side, y0 + side), pixels, pixels)
    probability = parser.parse(region, landmarks).clamp(0, 1).float()  # (pixels, pixels)
    box = [round((v - origin) * pixels / side) for v, origin in zip(face.box, (x0, y0, x0, y0), strict=True)]
    labels = torch.from_numpy(ndimage.label((probability > 0.5).cpu().numpy())[0])
    left, top, right, bottom = (max(v, 0) for v in box)
    inside = torch.bincount(labels[top:bottom, left:right].flatten(), minlength=2)
    inside[0] = 0
    if inside.sum() == 0:
        return None
    # One more pixel, so that the soft edge of the region stays and other people's hair goes.
    near = F.max_pool2d((labels == inside.argmax()).float()[None, None], 3, stride=1, padding=1)
    whole = F.interpolate(probability * near, size=(side, side), mode="bilinear", align_corners=False)[0, 0]
    mask = torch.zeros(height, width)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x0 + side, width), min(y0 + side, height)
    mask[top:bottom, left:right] = whole[top - y0 : bottom - y0, left - x0 : right - x0]
    return mask


class FacerParser:
    """FaRL (Zheng et al. 2022, arXiv:2112.03109) trained on LaPa, through the package pyfacer: every class
    but the background.

    Args:
        model_path: the TorchScript file ``face_parsing.farl.lapa….pt``.
        device: where it runs.

    Raises:
        DetectorUnavailable: the file is missing or no such model, or the package is not installed.
    """

    name = "facer farl/lapa/448"

    def __init__(self, model_path: str | Path, device: str | torch.device = "cpu") -> None:
        path = Path(model_path)
        if not path.is_file():  # facer would take a path that is not there for something to download
            raise DetectorUnavailable(f"{path}: no such face parsing model")
        try:
            from facer import face_parser
        except ImportError as error:
            raise DetectorUnavailable(
                f'face parsing needs the package pyfacer ({error}); "pip install pyfacer timm"'
            ) from error
        self.device = torch.device(device)
        try:
            self.network = face_parser("farl/lapa/448", device=self.device, model_path=str(path))
        except Exception as error:
            raise DetectorUnavailable(f"{path}: not a face parsing model that facer can load ({error})") from error

    def parse(self, image: Tensor, landmarks: Tensor) -> Tensor:
        """How likely each pixel belongs to the face or its hair, ``(H, W)`` in 0…1.

        Args:
            image: ``(H, W, 3)`` in 0…1.
            landmarks: ``(5, 2)`` in pixels.
        """
        pictures = image.permute(2, 0, 1).unsqueeze(0).to(self.device, torch.float32)  # (1, 3, H, W)
        face = {"points": landmarks[None].to(self.device, torch.float32), "image_ids": torch.zeros(1, dtype=torch.long)}
        logits = self.network(pictures, face)["seg"]["logits"][0]  # (11, H, W)
        # Class 0 is the background. Outside the parser's own view the logits are all zero: that is background too.
        return torch.where(logits.abs().sum(dim=0) == 0, 0.0, 1 - logits.softmax(dim=0)[0]).cpu().clone()


def load_parser(roots: Sequence[str | Path], device: str | torch.device = "cpu") -> FacerParser | None:
    """The face parser whose model (``face_parsing.farl.lapa*.pt``) lies in one of the folders, or None if there is none
    or pyfacer is not installed."""
    found = [path for root in roots for path in sorted(Path(root).expanduser().glob(FACER_FILES))]
    if found and importlib.util.find_spec("facer") is None:
        logger.warning(
            '%s is there, but the package pyfacer is not: "pip install pyfacer timm". Masks are ellipses.', found[0]
        )
        return None
    return FacerParser(found[0], device) if found else None
