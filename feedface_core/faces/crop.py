"""From a photo and a box to the square picture that the encoder sees.

The crop is the box times 1.1, square on its longer side (FeedFace, ICLR 2024 Tiny Papers), and resampled in
one step: sub-pixel exact, antialiased, and padded where it reaches past the border of the photo, never cut or
squeezed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import BORDERS
from ..errors import FeedFaceError
from .box import Box, check_box

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
"""Raise it when a crop of the same photo and box comes out otherwise: crops and features kept on disk are then made
anew."""
CROP_SCALE = 1.1
CROP_SIZE = 224
LARGEST_SQUARE = 16
"""A square more than this many times as large as the photo is taken for a mistake."""
FILL = 0.5
"""Grey put behind transparent pixels and past the border. Under the encoder's normalisation (mean 0.5, std
0.5) it is the zero vector, the same that a dropped face crop gives, so it says "nothing here" rather than
"black here"."""


def check_image(image: Tensor, name: str = "image") -> Tensor:
    """Return a photo as ``(H, W, 3)`` floats in 0..1.

    Greyscale ``(H, W)`` or ``(H, W, 1)`` is repeated, alpha in ``(H, W, 2)`` or ``(H, W, 4)`` is composited
    on grey (:data:`FILL`), and values that overshoot 0..1 a little, as resampling leaves them, are clamped.

    Raises:
        FeedFaceError: for another shape or type, an empty photo, NaN or infinity, or values that are not in 0..1.
    """
    if not isinstance(image, Tensor):
        raise FeedFaceError(f"{name}: expected a tensor (H, W, 3) of floats in 0..1, found {type(image).__name__}")
    if not image.is_floating_point():
        raise FeedFaceError(f"{name}: expected floats in 0..1, found {image.dtype}; divide by 255")
    if image.ndim == 2:
        image = image.unsqueeze(-1)
    if image.ndim != 3 or image.shape[-1] not in (1, 2, 3, 4) or 0 in image.shape:
        raise FeedFaceError(f"{name}: expected the shape (H, W, 3) with 1 to 4 channels, found {tuple(image.shape)}")
    image = image.float()
    low, high = (v.item() for v in torch.aminmax(image))
    # A NaN anywhere makes both of them NaN.
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FeedFaceError(f"{name}: holds NaN or infinite values")
    if low < -0.5 or high > 1.5:
        raise FeedFaceError(f"{name}: expected values in 0..1, found {low:.3g} to {high:.3g}")
    if low < 0 or high > 1:
        image = image.clamp(0, 1)
    channels = image.shape[-1]
    if channels in (2, 4):
        alpha = image[..., -1:]
        image = image[..., :-1] * alpha + FILL * (1 - alpha)
    return image if image.shape[-1] == 3 else image.expand(*image.shape[:2], 3)


def square_box(box: Box, scale: float = CROP_SCALE) -> Box:
    """The square around the same centre whose side is the longer side of ``box`` times ``scale``; it may
    reach past the border.

    Raises:
        FeedFaceError: if the box is not usable or the scale is not a positive number.
    """
    x0, y0, x1, y1 = check_box(box)
    if not (math.isfinite(scale) and scale > 0):
        raise FeedFaceError(f"the crop scale must be a positive number, found {scale}")
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
    """Resample any box of a photo with an antialiased bicubic filter (a = −0.5, the one of Pillow's
    ``BICUBIC``).

    The filter is separable and linear, so with R_y and R_x the matrices of its weights the result is

        out = fill + R_y · (image − fill) · R_xᵀ

    where the weights are normalised as if the photo went on forever: what lies past the border counts as
    ``fill``.

    Args:
        image: ``(H, W, C)`` floats in 0..1.
        box: ``(x0, y0, x1, y1)`` in pixels, fractions allowed, may reach past the border.
        height: of the result, in pixels.
        width: of the result, in pixels.
        fill: value past the border.

    Returns:
        ``(height, width, C)`` in 0..1.
    """
    x0, y0, x1, y1 = check_box(box)
    rows, top = _filter_weights(y0, y1, height, image.shape[0], image)
    columns, left = _filter_weights(x0, x1, width, image.shape[1], image)
    part = image[top : top + rows.shape[1], left : left + columns.shape[1]] - fill  # (h, w, C)
    out = torch.einsum("yh,hwc->ywc", rows, part)
    out = torch.einsum("xw,ywc->yxc", columns, out)
    return (out + fill).clamp(0, 1)


def _filter_weights(start: float, stop: float, size: int, length: int, like: Tensor) -> tuple[Tensor, int]:
    """Weights ``(size, n)`` of the n pixels from the returned first one on, for ``size`` samples between
    start and stop."""
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
    weights = weights[:, inside]
    begin = int(grid[inside][0]) if bool(inside.any()) else first
    return weights.to(like), begin


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
        box: the face, ``(x0, y0, x1, y1)`` in pixels.
        size: side of the crop, the encoder's image size.
        scale: side of the square over the longer side of the box.
        fill: value where the square reaches past the border.
        border: ``pad`` fills up there, ``clamp`` moves and shrinks the square until it lies inside the photo.

    Raises:
        FeedFaceError: for a bad photo, box or border, or a box that lies outside the photo.
    """
    image = check_image(image)
    if size < 1:
        raise FeedFaceError(f"the crop size must be at least 1 pixel, found {size}")
    height, width = image.shape[:2]
    x0, y0, x1, y1 = check_box(box)
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise FeedFaceError(f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} lies outside the photo of {width} × {height} px")
    if max(x1 - x0, y1 - y0) * scale > LARGEST_SQUARE * max(width, height):
        raise FeedFaceError(
            f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} times {scale:g} is more than {LARGEST_SQUARE} times as large"
            f" as the photo of {width} × {height} pixels"
        )
    if border not in BORDERS:
        raise FeedFaceError(f"the border of the crop is {border!r}, expected one of {', '.join(BORDERS)}")
    square = square_box(box, scale)
    return resample(image, clamp_square(square, width, height) if border == "clamp" else square, size, size, fill)


def image_from_pil(picture: Image) -> Tensor:
    """A Pillow picture as ``(H, W, 3)`` floats in 0..1, turned upright by its EXIF orientation.

    Transparency is composited on grey (:data:`FILL`); greyscale, 16 bit, palette and CMYK pictures are
    converted. Of an animation this is the frame that the picture stands at.
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


def load_image(path: str | Path) -> Tensor:
    """Read a photo file as ``(H, W, 3)`` floats in 0..1, upright.

    Raises:
        FeedFaceError: if the file is missing, not a picture, or broken.
    """
    from PIL import Image as PillowImage

    try:
        with PillowImage.open(path) as picture:
            return image_from_pil(picture)
    except FileNotFoundError as error:
        raise FeedFaceError(f"{path}: no such photo") from error
    except Exception as error:  # the decoders of a dozen formats raise all kinds for broken files
        raise FeedFaceError(f"{path}: not a photo that can be read ({error})") from error


def mask_boxes(mask: Tensor, threshold: float = 0.5) -> list[Box]:
    """One box for every connected region of a mask ``(H, W)``, largest region first; specks under 1 % of the
    largest are left out.

    Raises:
        FeedFaceError: if the mask has another shape or holds NaN.
    """
    from scipy import ndimage

    if mask.ndim != 2:
        raise FeedFaceError(f"mask: expected the shape (H, W), found {tuple(mask.shape)}")
    if not torch.isfinite(mask.float()).all():
        raise FeedFaceError("mask: holds NaN or infinite values")
    labels, _ = ndimage.label((mask > threshold).cpu().numpy())
    areas = torch.bincount(torch.from_numpy(labels).flatten())[1:].tolist()
    regions = [
        (area, (float(xs.start), float(ys.start), float(xs.stop), float(ys.stop)))
        for area, (ys, xs) in zip(areas, ndimage.find_objects(labels), strict=True)
    ]
    regions.sort(key=lambda region: -region[0])
    return [box for area, box in regions if area >= 0.01 * regions[0][0]]
