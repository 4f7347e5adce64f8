"""Changing the face crop of a person of whom there is one photo.

Without another photo the reference has to be cut from the target itself, and an adapter would learn to paste it. Here
its place, size, tilt, colours, sharpness and background are others, so that what is left in common is the person.
Another photo remains better (see :mod:`trainer.data.references`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedface_core.faces import FILL, resample

from . import pictures, randomness
from .pictures import Box

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
"""Raise it when the same augmentation of the same photo comes out otherwise: cached ones are then made anew."""

SHIFT = 0.1
ZOOM = (0.85, 1.3)
ANGLE = 20.0
COLOUR = (0.75, 1.25)
HUE = 0.03
BLUR = (0.003, 0.012)
BLURRED = 0.3
WITHOUT_BACKGROUND = 0.5


@dataclass(frozen=True)
class Augmentation:
    """One way to change a face crop.

    Args:
        shift: of the square's centre, to the right and down, as shares of its side.
        zoom: side of the square over that of the plain crop.
        angle: degrees by which the picture is turned anticlockwise.
        brightness, contrast, saturation: factors.
        hue: shift, as a share of the circle of colours.
        blur: standard deviation of the Gaussian, as a share of the crop's side; 0 is none.
        background: False leaves only what the mask covers, on grey.
        flip: whether the crop is mirrored.
    """

    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    angle: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    blur: float = 0.0
    background: bool = True
    flip: bool = False

    @classmethod
    def draw(cls, flip: bool, *key: randomness.Key) -> Augmentation:
        """The augmentation for a key, whatever was drawn before.

        Args:
            flip: whether it may mirror.
            key: what it is for, such as the sample's id and the number of the variant.
        """

        def between(what: str, low: float, high: float) -> float:
            return low + (high - low) * randomness.uniform("augmentation", what, *key)

        def chance(what: str, probability: float) -> bool:
            return randomness.chance(probability, "augmentation", what, *key)

        return cls(
            shift=(between("right", -SHIFT, SHIFT), between("down", -SHIFT, SHIFT)),
            zoom=between("zoom", *ZOOM),
            angle=between("angle", -ANGLE, ANGLE),
            brightness=between("brightness", *COLOUR),
            contrast=between("contrast", *COLOUR),
            saturation=between("saturation", *COLOUR),
            hue=between("hue", -HUE, HUE),
            blur=between("blur", *BLUR) if chance("blurred", BLURRED) else 0.0,
            background=not chance("background", WITHOUT_BACKGROUND),
            flip=flip and chance("flip", 0.5),
        )


def augmented_crop(
    photo: Image, square: Box, size: int, augmentation: Augmentation, mask: Tensor | None = None
) -> Tensor:
    """The changed face crop ``(size, size, 3)`` in 0…1.

    Args:
        photo: upright.
        square: the plain face crop, in pixels; may reach past the border, where the crop is grey.
        size: side of the crop in pixels.
        augmentation: what is changed.
        mask: ``(H, W)`` of face and hair, of the photo's shape at any scale; without it the background stays.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as change

    turn = math.radians(augmentation.angle)
    # The upright square in which the turned one fits, at the same pixels for a length.
    margin = math.ceil(size * (abs(math.cos(turn)) + abs(math.sin(turn)) - 1) / 2)
    pixels = size + 2 * margin
    (x0, y0, x1, y1), side = square, square[2] - square[0]
    x, y = (x0 + x1) / 2 + augmentation.shift[0] * side, (y0 + y1) / 2 + augmentation.shift[1] * side
    half = side * augmentation.zoom * (pixels / size) / 2
    around = x - half, y - half, x + half, y + half
    picture = pictures.cut_box(photo, around, pixels).movedim(-1, 0)  # (3, P, P)
    picture = change.adjust_brightness(picture, augmentation.brightness)
    picture = change.adjust_contrast(picture, augmentation.contrast)
    picture = change.adjust_saturation(picture, augmentation.saturation)
    picture = change.adjust_hue(picture, augmentation.hue)
    shown = torch.ones(1, 1).expand(photo.height, photo.width) if augmentation.background or mask is None else mask
    scale_x, scale_y = shown.shape[1] / photo.width, shown.shape[0] / photo.height
    box = around[0] * scale_x, around[1] * scale_y, around[2] * scale_x, around[3] * scale_y
    opacity = resample(shown.unsqueeze(-1), box, pixels, pixels, fill=0.0).movedim(-1, 0)  # (1, P, P)
    picture = FILL + (picture - FILL) * opacity
    picture = change.rotate(picture, augmentation.angle, InterpolationMode.BILINEAR, fill=[FILL] * 3)
    picture = picture[:, margin : margin + size, margin : margin + size]  # (3, S, S)
    if augmentation.blur:
        sigma = augmentation.blur * size
        kernel = 2 * math.ceil(3 * sigma) + 1
        if kernel // 2 < size:  # its padding mirrors the picture
            picture = change.gaussian_blur(picture, [kernel, kernel], [sigma, sigma])
    if augmentation.flip:
        picture = picture.flip(-1)
    return picture.clamp(0, 1).movedim(0, -1)
