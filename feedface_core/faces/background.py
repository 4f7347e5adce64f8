"""The photo without its face, for a second stream (J. Pinkney, Face Mixer Diffusion)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..errors import FeedFaceError
from .box import Box, check_box
from .crop import FILL, check_image, resample, square_box


def largest_square(width: int, height: int, face: Box | None) -> tuple[int, int, int]:
    """Left, top and side of the largest square of a photo: in the middle, moved as little as it takes to hold the face.

    A face that is longer than the square is centred in it as far as the photo allows.

    Args:
        width, height: of the photo in pixels.
        face: what has to be inside, or None for the plain middle.
    """
    return largest_rectangle(width, height, (1, 1), face)[:3]


def largest_rectangle(width: int, height: int, shape: tuple[int, int], face: Box | None) -> tuple[int, int, int, int]:
    """Left, top, width and height of the largest part of a photo that has a shape, placed as the largest square is.

    Args:
        width, height, face: see :func:`largest_square`.
        shape: width and height in any unit.
    """
    across, down = shape
    if width * down >= height * across:
        sides = max(round(height * across / down), 1), height
    else:
        sides = width, max(round(width * down / across), 1)
    offsets = []
    for axis, (length, side) in enumerate(zip((width, height), sides, strict=True)):
        offset = (length - side) // 2
        if face is not None:
            low, high = max(math.floor(face[axis]), 0), min(math.ceil(face[axis + 2]), length)
            offset = (low + high - side) // 2 if high - low > side else min(max(offset, high - side), low)
        offsets.append(min(max(offset, 0), length - side))
    return *offsets, *sides


def without_faces(image: Tensor, squares: Sequence[Box], fill: float = FILL) -> Tensor:
    """A photo ``(H, W, 3)`` with the squares filled with grey: every pixel that one of them touches.

    Raises:
        FeedFaceError: no photo, or something that is no box.
    """
    image = check_image(image).clone()
    for square in squares:
        x0, y0, x1, y1 = check_box(square)
        image[max(math.floor(y0), 0) : max(math.ceil(y1), 0), max(math.floor(x0), 0) : max(math.ceil(x1), 0)] = fill
    return image


def background_picture(image: Tensor, boxes: Sequence[Box], size: int, scale: float, fill: float = FILL) -> Tensor:
    """What the encoder of a background sees: the largest square of a photo with its first face, all faces blank.

    Args:
        image: ``(H, W, 3)`` with values 0…1.
        boxes: of the faces, in pixels.
        size: side of the result.
        scale: side of the blanked square over the longer side of a box, as for the crop of the face.
        fill: the grey value.

    Returns:
        ``(size, size, 3)``

    Raises:
        FeedFaceError: no photo, no boxes, or something that is no box.
    """
    if not boxes:
        raise FeedFaceError("no box of a face: without one the face would stay in the background")
    squares = [square_box(box, scale) for box in boxes]
    blank = without_faces(image, squares, fill)
    left, top, side = largest_square(blank.shape[1], blank.shape[0], squares[0])
    return resample(blank, (left, top, left + side, top + side), size, size, fill)
