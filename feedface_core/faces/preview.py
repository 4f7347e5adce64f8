"""The photo with numbered boxes, so that the right face can be chosen before anything is generated, and a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from ..schedule import Schedule
from .crop import CROP_SCALE, check_image, square_box
from .detectors.base import shrink
from .select import Selection, crop_scale_of

if TYPE_CHECKING:
    from PIL import ImageDraw

CHOSEN, OTHER, TOO_SMALL = (60, 220, 90), (255, 170, 40), (150, 150, 150)


def draw_faces(image: Tensor, selection: Selection, crop_scale: float = CROP_SCALE) -> Tensor:
    """The photo ``(H, W, 3)`` in 0..1, shrunk as for a detector, with the numbered boxes of its faces.

    Chosen ones are green with the square of their crop (``crop_scale`` times the box), others orange, those that are
    too small grey, without a number; a photo that was skipped gets a line that says so.
    """
    from PIL import Image, ImageDraw

    image = check_image(image)
    small = shrink(image)
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
        draw_label(draw, str(number), (face.box[0] * factor, face.box[1] * factor), colour, 8 * line)
    if selection.outcome == "skipped":
        draw_label(draw, "no face: skipped", (line, line), OTHER, 8 * line)
    return torch.from_numpy(numpy.array(picture)).float() / 255


def draw_label(draw: ImageDraw.ImageDraw, text: str, corner: tuple[float, float], colour: tuple, height: int) -> None:
    """Write text on a ground of colour, above the corner where there is room, and always inside the picture."""
    from PIL import ImageFont

    font, margin = ImageFont.load_default(size=max(10, height)), max(2, height // 6)
    _, _, right, bottom = draw.textbbox((margin, margin), text, font=font, anchor="lt")
    size = (right + margin, bottom + margin)
    above = corner[1] - size[1]
    x = min(max(corner[0], 0), draw.im.size[0] - size[0])
    y = min(max(above if above >= 0 else corner[1], 0), draw.im.size[1] - size[1])
    draw.rectangle([x, y, x + size[0], y + size[1]], fill=colour)
    draw.text((x + margin, y + margin), text, fill=(0, 0, 0), font=font, anchor="lt")


def draw_schedule(schedule: Schedule, width: int = 512, height: int = 288) -> Tensor:
    """A schedule as a picture ``(height, width, 3)``: the factor over the run, and below it those of the blocks."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height), (24, 24, 28))
    draw, size = ImageDraw.Draw(picture), max(12, height // 20)
    font, lines = ImageFont.load_default(size=size), schedule.sites[:4]
    left, top, right, bottom = 3 * size, size, width - 2 * size, height - (3 + len(lines)) * size
    highest = max(1.0, *(factor for _, factor in schedule.points))

    def place(share: float, factor: float) -> tuple[float, float]:
        return left + share * (right - left), bottom - factor / highest * (bottom - top)

    for number in range(5):  # a grid of quarters
        part, grey = number / 4, (70, 70, 78)
        draw.line([place(part, 0.0), place(part, highest)], fill=grey)
        draw.line([place(0.0, part * highest), place(1.0, part * highest)], fill=grey)
        x, y = place(0.0, part * highest)
        draw.text((x - size // 3, y), f"{part * highest:g}", fill=OTHER, font=font, anchor="rm")
        draw.text((place(part, 0.0)[0], bottom + size // 3), f"{part:.0%}", fill=OTHER, font=font, anchor="mt")
    corners = [(0.0, schedule.points[0][1]), *schedule.points, (1.0, schedule.points[-1][1])]
    draw.line([place(*corner) for corner in corners], fill=CHOSEN, width=max(2, height // 96), joint="curve")
    for number, (name, factor) in enumerate(lines):
        more = " …" if number == 3 and len(schedule.sites) > 4 else ""
        draw.text((left, bottom + (2 + number) * size), f"{name[:40]}: {factor:g}{more}", fill=CHOSEN, font=font)
    return torch.from_numpy(numpy.array(picture)).float() / 255
