"""The photo with numbered boxes, so that the right face can be chosen before anything is generated."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from .crops import CROP_SCALE, check_image, square_box
from .detector_base import shrink
from .face import DetectedFace
from .selection import Selection, crop_scale_of

CHOSEN, OTHER, TOO_SMALL = (60, 220, 90), (255, 170, 40), (150, 150, 150)
PREVIEW_SIDE = 1024


def draw_faces(
    image: Tensor, selection: Selection, crop_scale: float = CROP_SCALE, longest_side: int = PREVIEW_SIDE
) -> Tensor:
    """Draw the boxes of a photo with their numbers: chosen ones green with the square of their crop, others
    orange.

    Faces that are too small are grey and have no number; a photo that was skipped gets a line that says so.

    Args:
        image: ``(H, W, 3)`` floats in 0..1.
        selection: what was found and taken.
        crop_scale: side of the crop over the longer side of the box.
        longest_side: larger photos are shrunk to this many pixels.

    Returns:
        ``(h, w, 3)`` floats in 0..1.
    """
    from PIL import Image, ImageDraw

    image = check_image(image)
    small = shrink(image, longest_side)
    factor = small.shape[1] / image.shape[1]
    picture = Image.fromarray((small.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    draw = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 300))

    def rectangle(box, colour, width) -> None:
        draw.rectangle([v * factor for v in box], outline=colour, width=width)

    for face in selection.too_small:
        rectangle(face.box, TOO_SMALL, max(1, line // 2))
    # The chosen ones last, so that they lie on top.
    for number in sorted(range(len(selection.faces)), key=lambda index: index in selection.chosen):
        face = selection.faces[number]
        chosen = number in selection.chosen
        colour = CHOSEN if chosen else OTHER
        if chosen:
            rectangle(square_box(face.box, crop_scale_of(face, crop_scale)), colour, max(1, line // 2))
        rectangle(face.box, colour, line * 2 if chosen else line)
        _label(draw, str(number), _corner(face, factor, picture.size), colour, 8 * line)
    if selection.outcome == "skipped":
        _label(draw, "no face: skipped", (line, line), OTHER, 8 * line)
    return torch.from_numpy(numpy.array(picture)).float() / 255


def _corner(face: DetectedFace, factor: float, size: tuple[int, int]) -> tuple[float, float]:
    """Upper left corner of the box, moved into the picture."""
    return min(max(face.box[0] * factor, 0), size[0] - 12), min(max(face.box[1] * factor, 0), size[1] - 12)


def _label(draw, text: str, corner: tuple[float, float], colour: tuple[int, int, int], height: int) -> None:
    from PIL import ImageFont

    try:
        font = ImageFont.load_default(size=max(10, height))
    except TypeError:  # Pillow before 10.1 has one size only
        font = ImageFont.load_default()
    left, top, right, bottom = draw.textbbox(corner, text, font=font)
    margin = max(2, height // 6)
    draw.rectangle([corner[0], corner[1], right + 2 * margin, bottom + 2 * margin], fill=colour)
    draw.text((corner[0] + margin, corner[1] + margin), text, fill=(0, 0, 0), font=font)
