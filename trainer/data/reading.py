"""What a sample is made of, read from a record's files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedface_core.faces.background import largest_rectangle, largest_square

from . import pictures
from .augmentation import Augmentation, augmented_crop
from .manifest import Record

if TYPE_CHECKING:
    from PIL.Image import Image

OpenPhoto = Callable[[Path], "Image"]


def read_picture(
    record: Record, size: pictures.Size, crop: str, cell: int, open_photo: OpenPhoto = pictures.open_photo
) -> tuple[Tensor, Tensor]:
    """Read a photo and its mask and cut the training picture out of both.

    Args:
        size: of the training picture, W and H.
        crop: ``face`` or ``centre``.
        cell: side of a latent cell in pixels.

    Returns:
        Pixels ``(3, H, W)`` in −1…1 and the mask ``(1, h, w)`` over latent cells, of all people who have one.

    Raises:
        TrainerError: a photo or mask that cannot be read, or a mask of another shape than its photo.
    """
    photo = open_photo(record.path)
    record.check_place(*photo.size)
    frame = largest_rectangle(*photo.size, size, record.square if crop == "face" else None)
    cells = size[0] // cell, size[1] // cell
    mask = torch.ones(1, *cells[::-1])
    if record.mask_path is not None:
        read = [pictures.read_mask(path, photo.size) for path in (record.mask_path, *record.other_masks)]
        mask = torch.stack([pictures.cut_mask(one, photo.size, frame, cells) for one in read]).amax(0)
    return pictures.cut_pixels(photo, frame, size), mask


def read_crop(record: Record, size: int, open_photo: OpenPhoto = pictures.open_photo) -> Tensor:
    """The face crop ``(size, size, 3)`` in 0…1: the one made in advance if it has that size, else cut anew.

    Raises:
        TrainerError: a file that cannot be read.
    """
    if record.crop_path is not None:
        crop = pictures.open_photo(record.crop_path)
        if crop.size == (size, size):
            return pictures.to_tensor(crop)
    photo = open_photo(record.path)
    record.check_place(*photo.size)
    return pictures.cut_box(photo, record.square, size, record.crop_fill)


def read_reference(
    record: Record,
    size: int,
    flip: bool,
    augmentation: Augmentation | None,
    open_photo: OpenPhoto = pictures.open_photo,
) -> Tensor:
    """The face crop ``(size, size, 3)`` of a reference: the plain one, mirrored or not, or the augmented one.

    Raises:
        TrainerError: a file that cannot be read.
    """
    if augmentation is None:
        crop = read_crop(record, size, open_photo)
        return crop.flip(1) if flip else crop
    photo, mask = open_photo(record.path), None
    record.check_place(*photo.size)
    if record.mask_path is not None and not augmentation.background:
        mask = pictures.read_mask(record.mask_path, photo.size)
    return augmented_crop(photo, record.square, size, augmentation, mask)


def read_background(record: Record, size: int, crop: str, open_photo: OpenPhoto = pictures.open_photo) -> Tensor:
    """The training square without its face, ``(size, size, 3)`` in 0…1, as FeedFace Encode Background makes it.

    Raises:
        TrainerError: a file that cannot be read.
    """
    photo = open_photo(record.path)
    record.check_place(*photo.size)
    left, top, side = largest_square(*photo.size, record.square if crop == "face" else None)
    x0, y0, x1, y1 = record.square
    blank = photo.copy()
    grey = (round(255 * record.crop_fill),) * 3
    blank.paste(grey, (max(math.floor(x0), 0), max(math.floor(y0), 0), math.ceil(x1), math.ceil(y1)))
    return pictures.cut_box(blank, (left, top, left + side, top + side), size, record.crop_fill)
