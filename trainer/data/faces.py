"""Where the faces of a sample are in its training square."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from feedface_core.faces.background import largest_rectangle
from feedface_core.faces.box import Box

from ..errors import TrainerError
from . import pictures
from .buckets import Buckets, photo_size
from .record import Record

if TYPE_CHECKING:
    from ..config import DataSettings

LARGEST = 4
"""Side of a face's square over the picture's, up to which the square says where the face is."""


class Place(NamedTuple):
    """A face of a sample.

    Args:
        square: of its crop, in pixels of the training picture; may reach past the border. None when its middle lies
            outside, or it is so large that nothing but skin would be seen.
        box: of the face alone, likewise.
        identity: the person; the record's id where nobody said who it is.
    """

    square: Box | None
    box: Box
    identity: str


def place_face(record: Record, frame: pictures.Frame, size: pictures.Size, flip: bool) -> Place:
    """Where a record's face comes to lie in the training picture.

    Args:
        frame: the training picture, in pixels of the photo.
        size: of the training picture.
        flip: whether that is mirrored.
    """
    left, top, width, height = frame
    scales = (size[0] / width, size[1] / height) * 2

    def placed(box: Box) -> Box:
        x0, y0, x1, y1 = ((one - start) * by for one, start, by in zip(box, (left, top) * 2, scales, strict=True))
        return (size[0] - x1, y0, size[0] - x0, y1) if flip else (x0, y0, x1, y1)

    crop, face = placed(record.square), placed(record.bbox)
    inside = all(0 <= box[axis] + box[axis + 2] <= 2 * size[axis] for box in (crop, face) for axis in (0, 1))
    shown = inside and crop[2] - crop[0] <= LARGEST * min(size)
    return Place(crop if shown else None, face, record.identity or record.id)


def place_faces(records: Iterable[Record], settings: DataSettings, flip: bool) -> list[Place]:
    """Where the faces of one photo come to lie; the first one's box says where the training picture is.

    Args:
        records: one for each face.
        settings: what says the training picture's size and place.
        flip: whether the training picture is mirrored.

    Raises:
        TrainerError: the photo's size is neither in the manifest nor in the file.
    """
    first, *others = records
    photo, size = photo_size(first), Buckets.of(settings).size_of(first)
    if photo is None:
        raise TrainerError(f"{first.path}: not a readable picture")
    frame = largest_rectangle(*photo, size, first.square if settings.crop == "face" else None)
    return [place_face(one, frame, size, flip) for one in (first, *others)]
