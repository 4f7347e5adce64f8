"""From a photo and a box to the square picture that the encoder sees.

The crop is the box times 1.1, square on its longer side (FeedFace, ICLR 2024 Tiny Papers), and resampled in one step:
sub-pixel exact, antialiased, and padded where it reaches past the border of the photo, never cut or squeezed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import BORDERS
from ..errors import FeedFaceError, MissingFile, located, shorten
from .box import Box, check_box

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
"""Raise it when a crop of the same photo and box comes out otherwise: what is kept on disk is then made anew."""
CROP_SCALE = 1.1
CROP_SIZE = 224
LARGEST_SIDE = 4096
"""Pixels of a crop's side."""
LARGEST_SQUARE = 16
"""A square more than this many times as large as the photo is taken for a mistake."""
FILL = 0.5
"""Grey put behind transparent pixels and past the border. Under the encoder's normalisation (mean 0.5, std 0.5) it is
the zero vector, the same that a dropped face crop gives, so it says "nothing here" rather than "black here"."""


def check_image(image: Tensor, name: str = "image") -> Tensor:
    """A photo as ``(H, W, 3)`` floats in 0..1.

    Greyscale ``(H, W)`` or ``(H, W, 1)`` is repeated, alpha in ``(H, W, 2)`` or ``(H, W, 4)`` is composited on grey
    (:data:`FILL`), and values that overshoot 0..1 a little, as resampling leaves them, are clamped.

    Raises:
        FeedFaceError: for another shape or type, an empty photo, NaN or infinity, or values that are not in 0..1.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise FeedFaceError(f"{name}: found {shorten(image)}, expected a tensor of floats in 0..1 (divide by 255)")
    if image.ndim == 2:
        image = image.unsqueeze(-1)
    if image.ndim != 3 or image.shape[-1] not in (1, 2, 3, 4) or 0 in image.shape:
        raise FeedFaceError(f"{name}: found the shape {(*image.shape,)}, expected (H, W, 3) with 1 to 4 channels")
    image = image.float()
    low, high = (value.item() for value in torch.aminmax(image))  # a NaN anywhere makes both of them NaN
    if not (low >= -0.5 and high <= 1.5):
        raise FeedFaceError(f"{name}: found values from {low:.3g} to {high:.3g}, expected 0..1 without NaN")
    if low < 0 or high > 1:
        image = image.clamp(0, 1)
    channels = image.shape[-1]
    if channels in (2, 4):
        alpha = image[..., -1:]
        image = image[..., :-1] * alpha + FILL * (1 - alpha)
    return image if image.shape[-1] == 3 else image.expand(*image.shape[:2], 3)


def square_box(box: Box, scale: float = CROP_SCALE) -> Box:
    """The square around the same centre whose side is the longer side of ``box`` times ``scale``; it may reach past the
    border. Raises :class:`FeedFaceError` for a box that is not usable, or a scale that is not a positive number."""
    x0, y0, x1, y1 = check_box(box)
    if not 0 < scale < math.inf:
        raise FeedFaceError(f"the crop scale is {scale}, expected a positive number")
    half = max(x1 - x0, y1 - y0) * scale / 2
    centre_x, centre_y = (x0 + x1) / 2, (y0 + y1) / 2
    return centre_x - half, centre_y - half, centre_x + half, centre_y + half


def clamp_square(square: Box, width: int, height: int) -> Box:
    """A square that lies inside the photo: moved, and shrunk to the photo's shorter side if it is longer."""
    x0, y0, x1, y1 = square
    side = min(x1 - x0, width, height)
    left = min(max((x0 + x1 - side) / 2, 0.0), width - side)
    top = min(max((y0 + y1 - side) / 2, 0.0), height - side)
    return left, top, left + side, top + side


def resample(image: Tensor, box: Box, height: int, width: int, fill: float = FILL) -> Tensor:
    """Any box of a photo ``(H, W, C)`` in 0..1 as ``(height, width, C)``, resampled with an antialiased bicubic filter
    (a = −0.5, the one of Pillow's ``BICUBIC``). The box may have fractions of pixels and reach past the border.

    The filter is separable and linear, so with R_y and R_x the matrices of its weights the result is

        out = fill + R_y · (image − fill) · R_xᵀ

    where the weights are normalised as if the photo went on forever: what lies past the border counts as ``fill``.
    Raises :class:`FeedFaceError` for a box that is not usable, or more than :data:`LARGEST_SQUARE` times as large as
    the photo.
    """
    x0, y0, x1, y1 = check_box(box)
    _check_size(box, image)
    rows, top = _filter_weights(y0, y1, height, image.shape[0], image)
    columns, left = _filter_weights(x0, x1, width, image.shape[1], image)
    part = image[top : top + rows.shape[1], left : left + columns.shape[1]] - fill  # (h, w, C)
    out = torch.einsum("yh,hwc->ywc", rows, part)
    out = torch.einsum("xw,ywc->yxc", columns, out)
    return (out + fill).clamp(0, 1)


def _check_size(box: Box, image: Tensor) -> None:
    height, width = image.shape[:2]
    if max(box[2] - box[0], box[3] - box[1]) > LARGEST_SQUARE * max(width, height):
        photo = f"the photo of {width} × {height} pixels"
        raise FeedFaceError(f"the square {shorten(box)} is more than {LARGEST_SQUARE} times as large as {photo}")


def _filter_weights(start: float, stop: float, size: int, length: int, like: Tensor) -> tuple[Tensor, int]:
    """Weights ``(size, n)`` of the n pixels from the returned first one on, for samples between start and stop."""
    step = (stop - start) / size
    reach = max(step, 1.0)  # enlarging interpolates between neighbours, shrinking averages over a pixel of the result
    first = min(max(math.floor(start - 2 * reach), 0), length)
    last = max(min(math.ceil(stop + 2 * reach) + 1, length), first)
    # The normalisation sums over the endless grid, not only over the pixels that exist.
    margin = math.ceil(2 * reach) + 1
    grid = torch.arange(math.floor(start) - margin, math.ceil(stop) + margin + 1, dtype=torch.float64)
    centres = start + (torch.arange(size, dtype=torch.float64) + 0.5) * step
    weights = _cubic((grid + 0.5 - centres[:, None]) / reach)
    weights = weights / weights.sum(dim=1, keepdim=True)
    inside = (grid >= first) & (grid < last)
    begin = int(grid[inside][0]) if bool(inside.any()) else first
    return weights[:, inside].to(like), begin


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = −0.5: (a+2)|x|³ − (a+3)|x|² + 1 up to 1, a|x|³ − 5a|x|² + 8a|x| − 4a up to 2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def crop_face(
    image: Tensor, box: Box, size: int = CROP_SIZE, scale: float = CROP_SCALE, fill: float = FILL, border: str = "pad"
) -> Tensor:
    """The square face crop ``(size, size, 3)`` in 0..1.

    Args:
        image: ``(H, W, 3)`` floats in 0..1 (greyscale and alpha as in :func:`check_image`).
        size: side of the crop in pixels, the encoder's image size.
        scale: side of the square over the longer side of the box.
        fill: value where the square reaches past the border.
        border: ``pad`` fills up there, ``clamp`` moves and shrinks the square until it lies inside the photo.

    Raises:
        FeedFaceError: for a bad photo, box, size or border, or a box that lies outside the photo.
    """
    image = check_image(image)
    if not (isinstance(size, int) and 1 <= size <= LARGEST_SIDE):
        raise FeedFaceError(f"the size of the crop is {shorten(size)}, expected 1 to {LARGEST_SIDE} pixels")
    if border not in BORDERS:
        raise FeedFaceError(f"the border of the crop is {shorten(border)}, expected one of {', '.join(BORDERS)}")
    height, width = image.shape[:2]
    square = square_box(box, scale)
    if box[2] <= 0 or box[3] <= 0 or box[0] >= width or box[1] >= height:
        raise FeedFaceError(f"the box {shorten(box)} lies outside the photo of {width} × {height} pixels")
    _check_size(square, image)
    return resample(image, clamp_square(square, width, height) if border == "clamp" else square, size, size, fill)


def cut_squares(pictures: Tensor, squares: Sequence[Box], size: int, fill: float = FILL) -> Tensor:
    """A square of each picture ``(N, 3, H, W)`` in 0..1, in its pixels, as ``(N, 3, size, size)``, cut as
    :func:`resample` does, with a gradient to the pixels."""
    cut = (resample(one.movedim(0, -1), box, size, size, fill) for one, box in zip(pictures, squares, strict=True))
    return torch.stack([*cut]).movedim(-1, 1)


def image_from_pil(picture: Image) -> Tensor:
    """A Pillow picture (the frame it stands at) as ``(H, W, 3)`` floats in 0..1, upright by its EXIF orientation.

    Transparency is composited on grey (:data:`FILL`); greyscale, 16 bit, palette and CMYK pictures are converted.
    """
    import numpy
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        # Pillow's own conversion of 16-bit greyscale clips at 255.
        values = torch.from_numpy(numpy.array(picture, dtype=numpy.float32))
        return check_image(values if picture.mode == "F" and values.max() <= 1 else values / 65535)
    transparent = "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info
    picture = picture.convert("RGBA" if transparent else "RGB")
    return check_image(torch.from_numpy(numpy.array(picture)).float() / 255)


def picture_formats() -> list[str]:
    """The formats that are opened, by Pillow's names: not those that start programs of their own (EPS: Ghostscript)."""
    from PIL import Image as PillowImage

    PillowImage.init()
    wanted = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF")
    return [name for name in wanted if name in PillowImage.OPEN]


def load_image(path: str | Path) -> Tensor:
    """A photo file as ``(H, W, 3)`` floats in 0..1, upright. Raises :class:`FeedFaceError` if the file is missing, of
    another format (see :func:`picture_formats`), or broken."""
    from PIL import Image as PillowImage

    with located(path):
        if not os.path.isfile(path):
            raise MissingFile("no such photo")
        try:
            with PillowImage.open(path, formats=picture_formats()) as picture:
                return image_from_pil(picture)
        except Exception as error:  # the decoders of a dozen formats raise all types for broken files
            raise FeedFaceError(f"not a photo that can be read ({shorten(error)})") from error


def mask_boxes(mask: Tensor, threshold: float = 0.5) -> list[Box]:
    """One box for every connected region of a mask ``(H, W)``, largest region first; specks under 1 % of the largest
    are left out. Raises :class:`FeedFaceError` if the mask has another shape or holds NaN."""
    from scipy import ndimage

    if mask.ndim != 2 or not torch.isfinite(mask.float()).all():
        raise FeedFaceError(f"mask: found {shorten(mask)}, expected finite values (H, W)")
    labels, _ = ndimage.label((mask > threshold).cpu().numpy())
    areas = torch.bincount(torch.from_numpy(labels).flatten())[1:].tolist()
    regions = [
        (area, (float(xs.start), float(ys.start), float(xs.stop), float(ys.stop)))
        for area, (ys, xs) in zip(areas, ndimage.find_objects(labels), strict=True)
    ]
    regions.sort(key=lambda region: -region[0])
    return [box for area, box in regions if area >= 0.01 * regions[0][0]]
