"""Photos, masks and the training square: from files to tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from feedface_core.faces import FILL, image_from_pil, resample
from feedface_core.faces.box import Box
from feedface_core.files.json_file import regular_file

from ..errors import TrainerError

if TYPE_CHECKING:
    from PIL.Image import Image

Frame = tuple[int, int, int, int]
"""Left, top, width and height of the training picture (a square without buckets) in pixels of the upright photo."""
Size = tuple[int, int]
"""Width and height in pixels."""

VERSION = 1
"""Raise it when the training square, its pixels or its mask come out otherwise: cached ones are then made anew."""
MASK_THRESHOLD = 11
"""Pixels above it belong to the face. Masks hold class × 23 (0 is background) or 0 and 255."""
MASK_SHAPE_TOLERANCE = 0.02


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
"""Whatever the file is called: Pillow would start Ghostscript for an EPS."""


def open_picture(path: str | Path) -> Image:
    """``PIL.Image.open`` for photos and masks, as far as the plugins are there. Raises ``OSError`` for a pipe, a
    device or a folder, and whatever the decoder raises."""
    from PIL import Image, UnidentifiedImageError

    regular_file(path)
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"expected one of {', '.join(formats)}") from error


def size_of(path: str | Path) -> tuple[int, int] | None:
    """Width and height of an upright photo by its header, or None if it has none."""
    from PIL import ExifTags

    try:
        with open_picture(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return file.size[::-1] if turned else file.size
    except Exception:  # as below; why, is said where the photo is read
        return None


def open_photo(path: str | Path) -> Image:
    """An upright RGB photo, as :func:`feedface_core.faces.load_image` reads it, but left in 8 bits.

    Raises:
        TrainerError: a file that is missing, no picture, or cut off.
    """
    from PIL import ImageOps

    try:
        with open_picture(path) as file:
            if file.mode in ("RGB", "L") and "transparency" not in file.info:
                return ImageOps.exif_transpose(file).convert("RGB")
            return to_picture(image_from_pil(file))
    except FileNotFoundError as error:
        raise TrainerError(f"{path}: no such file") from error
    except OSError as error:
        raise TrainerError(f"{path}: not a readable picture ({error.strerror or error})") from error
    except Exception as error:  # the decoders of a dozen formats raise all kinds for broken files
        raise TrainerError(f"{path}: not a readable picture ({error or type(error).__name__})") from error


def to_tensor(picture: Image) -> Tensor:
    """An RGB picture → ``(H, W, 3)`` floats in 0…1."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).float() / 255


def to_picture(image: Tensor) -> Image:
    """``(H, W, 3)`` or ``(H, W)`` floats in 0…1 → an 8-bit picture."""
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def cut_pixels(photo: Image, frame: Frame, size: Size) -> Tensor:
    """The training picture of a photo as pixels ``(3, H, W)`` in −1…1.

    Args:
        frame: see :func:`~feedface_core.faces.background.largest_rectangle`.
        size: W and H.
    """
    from PIL import Image

    left, top, width, height = frame
    box = (left, top, left + width, top + height)
    resized = photo.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    values = torch.from_numpy(np.array(resized, dtype=np.uint8)).permute(2, 0, 1)  # (3, H, W)
    return values.float() / 127.5 - 1.0


def cut_box(photo: Image, box: Box, size: int, fill: float = FILL) -> Tensor:
    """Any square of a photo, ``(size, size, 3)`` in 0…1, as :func:`feedface_core.faces.resample` cuts it.

    Only the pixels that count are unpacked: a large photo would take hundreds of megabytes as floats.
    """
    reach = math.ceil(2 * max((box[2] - box[0]) / size, (box[3] - box[1]) / size, 1.0)) + 2
    left, top = (max(math.floor(value) - reach, 0) for value in box[:2])
    right = min(math.ceil(box[2]) + reach, photo.width)
    bottom = min(math.ceil(box[3]) + reach, photo.height)
    if left >= right or top >= bottom:
        return torch.full((size, size, 3), fill)
    part = to_tensor(photo.crop((left, top, right, bottom)))
    return resample(part, (box[0] - left, box[1] - top, box[2] - left, box[3] - top), size, size, fill)


def read_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A mask file as ``(H, W)`` floats 0 or 1, upright, at the file's own size.

    Args:
        path: a picture whose pixels are 0 outside the face and hair.
        size: width and height of its upright photo, whose shape the mask must have.

    Raises:
        TrainerError: a file that is no picture, or of another shape than the photo.
    """
    from PIL import ImageOps

    try:
        with open_picture(path) as file:
            upright = ImageOps.exif_transpose(file)  # a mask made from a turned photo may keep its turn
            values = np.asarray(upright.convert("L") if upright.mode not in ("L", "I;16", "I") else upright)
    except OSError as error:
        raise TrainerError(f"{path}: not a readable mask ({error.strerror or error})") from error
    except Exception as error:  # as above
        raise TrainerError(f"{path}: not a readable mask ({error or type(error).__name__})") from error
    height, width = values.shape
    if abs(width / height / (size[0] / size[1]) - 1) > MASK_SHAPE_TOLERANCE:
        raise TrainerError(
            f"{path}: the mask is {width} × {height}, which is not the shape of its photo, {size[0]} × {size[1]}"
        )
    return torch.from_numpy((values > MASK_THRESHOLD).astype(np.float32))


def cut_mask(mask: Tensor, size: Size, frame: Frame, cells: Size) -> Tensor:
    """The training picture of a mask, ``(1, h, w)``: the share of each latent cell that it covers.

    Args:
        mask: ``(H, W)`` of the photo's shape, at any scale.
        size: width and height of the photo, which the frame refers to.
        frame: see :func:`~feedface_core.faces.background.largest_rectangle`.
        cells: w and h, latent cells.
    """
    left, top, width, height = frame
    scale_x, scale_y = mask.shape[1] / size[0], mask.shape[0] / size[1]
    rows = _overlaps(top * scale_y, (top + height) * scale_y, cells[1], mask.shape[0])  # (h, H)
    columns = _overlaps(left * scale_x, (left + width) * scale_x, cells[0], mask.shape[1])  # (w, W)
    return (rows @ mask @ columns.T).clamp(0, 1).unsqueeze(0)


def _overlaps(start: float, stop: float, cells: int, length: int) -> Tensor:
    """Which share of each cell between start and stop each of ``length`` pixels covers, ``(cells, length)``."""
    edges = start + (stop - start) / cells * torch.arange(cells + 1, dtype=torch.float64)
    pixels = torch.arange(length, dtype=torch.float64)
    common = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (common.clamp(min=0) * (cells / (stop - start))).float()


def perceptual_hash(picture: Image) -> int:
    """A 64-bit hash that survives scaling, recompression and small changes of colour.

    The signs of the 8 × 8 lowest frequencies of the cosine transform of the picture at 32 × 32, against their
    median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions").
    """
    from PIL import Image

    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    steps = np.arange(32)
    cosines = np.cos(np.pi * (2 * steps[None, :] + 1) * np.arange(8)[:, None] / 64)  # (8, 32)
    low = (cosines @ grey @ cosines.T).ravel()  # (64,)
    bits = low > np.median(low[1:])  # the first one is the mean brightness
    return int("".join("1" if bit else "0" for bit in bits), 2)


def hash_distance(first: int, second: int) -> int:
    """Number of bits in which two hashes differ."""
    return (first ^ second).bit_count()
