"""Pictures in lines and columns under labels, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FeedFaceError
from .crop import check_image

MOST, LONGEST = 1024, 16384
"""Pictures in a grid; pixels of its longer side."""
GAP = 4


def labelled_grid(
    pictures: Sequence[Tensor], columns: int, rows: Sequence[str] = (), heads: Sequence[str] = ()
) -> Tensor:
    """Pictures of any sizes, in the order of reading, in cells of the first one's size.

    Args:
        pictures: each ``(H, W, 3)`` with values 0…1.
        columns: pictures in a line.
        rows, heads: labels of the lines and of the columns; fewer, or none, leave the others without.

    Returns:
        ``(H', W', 3)``, white where there is no picture.

    Raises:
        FeedFaceError: no pictures, more than :data:`MOST`, or a grid of more than :data:`LONGEST` pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not 1 <= len(pictures) <= MOST:
        raise FeedFaceError(f"{len(pictures)} pictures, expected 1 to {MOST}")
    pictures = [check_image(picture, f"picture {number}") for number, picture in enumerate(pictures, 1)]
    height, width = pictures[0].shape[:2]
    lines, size = -(-len(pictures) // columns), max(10, width // 14)
    font = ImageFont.load_default(size=size)
    left = 0 if not rows else GAP + max(round(font.getlength(text[:100])) for text in rows) + GAP
    top = 0 if not heads else 2 * size
    whole = (left + columns * (width + GAP) - GAP, top + lines * (height + GAP) - GAP)
    if max(whole) > LONGEST:
        raise FeedFaceError(f"the grid would be {whole[0]} × {whole[1]} pixels, more than {LONGEST} on a side")
    grid = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(grid)
    for number, picture in enumerate(pictures):
        if picture.shape[:2] != (height, width):
            fitted = functional.interpolate(
                picture.movedim(-1, 0)[None], (height, width), mode="bilinear", antialias=True
            )
            picture = fitted[0].movedim(0, -1)
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        line, column = divmod(number, columns)
        grid.paste(Image.fromarray(pixels), (left + column * (width + GAP), top + line * (height + GAP)))
    for column, text in enumerate(heads[:columns]):
        draw.text((left + column * (width + GAP) + width / 2, size), text[:100], "black", font, anchor="mm")
    for line, text in enumerate(rows[:lines]):
        draw.text((GAP, top + line * (height + GAP) + height / 2), text[:100], "black", font, anchor="lm")
    return torch.from_numpy(numpy.array(grid)).float() / 255
