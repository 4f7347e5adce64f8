"""Which of the faces found in a photo are taken: order, index, minimum size, and what to do when there is
none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import FeedFaceError
from .box import DetectedFace, NoFaceError
from .crop import CROP_SCALE
from .detectors.base import WHOLE_IMAGE, Detector, WholeImage

ALL = "all"
WHEN_NONE = ("error", "skip", "whole image")
"""What to do with a photo without a face: stop, leave the photo out, or take the whole photo as the face."""

ORDERS: dict[str, Callable[[DetectedFace, float, float], float]] = {
    "size": lambda face, width, height: -face.area,
    "left to right": lambda face, width, height: face.centre[0],
    "right to left": lambda face, width, height: -face.centre[0],
    "top to bottom": lambda face, width, height: face.centre[1],
    "confidence": lambda face, width, height: -face.confidence,
    "centre": lambda face, width, height: math.dist(face.centre, (width / 2, height / 2)),
    "as found": lambda face, width, height: 0.0,
}
"""Sort keys by name: face, width and height of the photo; the lowest comes first."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The outcome for one photo.

    Args:
        faces: the faces that are large enough, numbered by their place in this list.
        chosen: numbers of the faces that were taken.
        too_small: faces left out for their size.
        outcome: ``"chosen"``, ``"skipped"`` or ``"whole image"``.
    """

    faces: tuple[DetectedFace, ...]
    chosen: tuple[int, ...]
    too_small: tuple[DetectedFace, ...] = ()
    outcome: str = "chosen"

    @property
    def chosen_faces(self) -> list[DetectedFace]:
        return [self.faces[index] for index in self.chosen]

    def describe(self) -> str:
        """What was found and taken, in one line."""
        left_out = f", {len(self.too_small)} left out as too small" if self.too_small else ""
        if self.outcome != "chosen":
            action = "photo skipped" if self.outcome == "skipped" else "the whole photo is taken"
            return f"no face found{left_out}: {action}"
        parts = [
            f"{number} ({face.width:.0f} × {face.height:.0f} px at {face.box[0]:.0f}, {face.box[1]:.0f},"
            f" confidence {face.confidence:.2f})"
            for number, face in zip(self.chosen, self.chosen_faces, strict=True)
        ]
        return f"{len(self.faces)} face(s) found{left_out}; taken: {', '.join(parts)}"


def order_faces(faces: Sequence[DetectedFace], order: str, image_size: tuple[float, float]) -> list[DetectedFace]:
    """Sort faces; equal ones by their place in the photo, so that the result does not depend on the detector.

    Args:
        faces: of one photo.
        order: one of :data:`ORDERS`.
        image_size: width and height of the photo in pixels.

    Raises:
        FeedFaceError: if the order is unknown.
    """
    if order not in ORDERS:
        raise FeedFaceError(f"no order {order!r}; there are: {', '.join(ORDERS)}")
    if order == "as found":
        return list(faces)
    key = ORDERS[order]
    return sorted(faces, key=lambda face: (key(face, *image_size), face.box))


def parse_indexes(text: str) -> tuple[int, ...] | None:
    """Read ``"0"``, ``"0, 2"``, ``"1-3"`` or ``"all"``.

    Returns:
        The indexes in the order given, or None for all.

    Raises:
        FeedFaceError: if the text is something else or empty.
    """
    text = text.strip().lower()
    if text == ALL:
        return None
    indexes: list[int] = []
    for part in re.split(r"[,;\s]+", re.sub(r"\s*-\s*", "-", text)):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last > 9999:
            raise FeedFaceError(f'indexes: expected numbers such as "0", "0, 2", "1-3", or "{ALL}", found {text!r}')
        indexes.extend(range(first, last + 1))
    return tuple(indexes)


def select_faces(
    faces: Sequence[DetectedFace],
    image_size: tuple[float, float],
    *,
    order: str = "size",
    indexes: Sequence[int] | None = (0,),
    min_size: float = 0,
    name: str = "photo",
) -> Selection:
    """Order the faces of one photo and take some of them.

    Args:
        faces: what the detector found.
        image_size: width and height of the photo in pixels.
        order: one of :data:`ORDERS`; it numbers the faces.
        indexes: numbers of the faces to take; None takes all.
        min_size: faces whose longer side has fewer pixels are left out and get no number.
        name: what to call the photo in errors.

    Raises:
        NoFaceError: if no face is found or all are too small.
        FeedFaceError: if a number is asked for that is not there.
        FeedFaceError: if the order is unknown or no index is given.
    """
    ordered = order_faces(faces, order, image_size)
    usable = tuple(face for face in ordered if face.size >= min_size)
    too_small = tuple(face for face in ordered if face not in usable)
    if not usable:
        if not too_small:
            raise NoFaceError(f"{name}: no face found")
        largest = max(face.size for face in too_small)
        raise NoFaceError(
            f"{name}: {len(too_small)} face(s) found, but the largest has {largest:.0f} pixels and"
            f" min_size is {min_size:g}"
        )
    if indexes is None:
        return Selection(usable, tuple(range(len(usable))), too_small)
    if len(indexes) == 0:
        raise FeedFaceError(f"{name}: no index given; expected the numbers of the faces to take")
    missing = [index for index in indexes if not 0 <= index < len(usable)]
    if missing:
        small = f" ({len(too_small)} more under the min_size of {min_size:g} pixels)" if too_small else ""
        raise FeedFaceError(
            f"{name}: face {', '.join(map(str, missing))} was asked for, but {len(usable)} face(s) were"
            f" found{small}, numbered from 0 to {len(usable) - 1} by {order}"
        )
    return Selection(usable, tuple(indexes), too_small)


def select_from_photo(
    image: Tensor,
    detector: Detector,
    *,
    order: str = "size",
    indexes: Sequence[int] | None = (0,),
    min_size: float = 0,
    when_none: str = "error",
    name: str = "photo",
) -> Selection:
    """Detect the faces of one photo ``(H, W, 3)`` and take some; see :func:`select_faces`.

    Args:
        when_none: one of :data:`WHEN_NONE`. It decides about photos without a face that is large enough; an
            index that is out of range is an error in any case.
    """
    if when_none not in WHEN_NONE:
        raise FeedFaceError(f"no policy {when_none!r}; there are: {', '.join(WHEN_NONE)}")
    try:
        found = detector.detect(image)
    except FeedFaceError as error:
        raise type(error)(f"{name}: {error}") from error
    size = (image.shape[1], image.shape[0])
    try:
        return select_faces(found, size, order=order, indexes=indexes, min_size=min_size, name=name)
    except NoFaceError as error:
        if when_none == "error":
            raise NoFaceError(
                f"{error} (by {detector.name}). Use another photo or detector, a lower min_size, or another when_none"
            ) from error
        too_small = tuple(order_faces(found, order, size))
    if when_none == "skip":
        return Selection((), (), too_small, "skipped")
    return Selection(tuple(WholeImage().detect(image)), (0,), too_small, "whole image")


def crop_scale_of(face: DetectedFace, scale: float = CROP_SCALE) -> float:
    """The scale of the crop: as asked for, but 1 for a whole photo, which has nothing around it."""
    return 1.0 if face.source == WHOLE_IMAGE else scale
