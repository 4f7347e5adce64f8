"""Which of the faces found in a photo are taken: order, index, minimum size, and what to do when there is
none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import FeedFaceError, listing, located, shorten
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
    """The outcome for one photo, ``"chosen"``, ``"skipped"`` or ``"whole image"``: the faces that are large enough, the
    places in them of those that were taken, and those left out for their size."""

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
    """Faces of one photo sorted by one of :data:`ORDERS`; equal ones by their place in the photo, so that the result
    does not depend on the detector.

    Args:
        image_size: width and height of the photo in pixels.

    Raises:
        FeedFaceError: if the order is unknown.
    """
    if order not in ORDERS:
        raise FeedFaceError(f"order: found {shorten(order)}, expected one of {', '.join(ORDERS)}")
    if order == "as found":
        return list(faces)
    return sorted(faces, key=lambda face: (ORDERS[order](face, *image_size), face.box))


def parse_indexes(text: str) -> tuple[int, ...] | None:
    """The indexes of ``"0"``, ``"0, 2"`` or ``"1-3"`` in the order given, or None for ``"all"``. Raises
    :class:`FeedFaceError` for another text."""
    if text.strip().lower() == ALL:
        return None
    indexes: list[int] = []
    for part in re.split(r"[,;\s]+", re.sub(r"\s*-\s*", "-", text.strip())):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span or len(indexes) > 9999:
            expected = f'numbers such as "0", "0, 2", "1-3", or "{ALL}"'
            raise FeedFaceError(f"indexes: expected {expected}, found {shorten(text)}")
        indexes.extend(span)
    return tuple(indexes)


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
    """Detect the faces of one photo ``(H, W, 3)``, order them and take some of them.

    Args:
        order: one of :data:`ORDERS`; it numbers the faces.
        indexes: numbers of the faces to take; None takes all.
        min_size: faces whose longer side has fewer pixels are left out and get no number.
        when_none: one of :data:`WHEN_NONE`. It decides about photos without a face that is large enough.
        name: what to call the photo in errors.

    Raises:
        NoFaceError: if no face is found or all are too small.
        FeedFaceError: if a number is asked for that is not there, a choice is unknown, or no index is given.
    """
    with located(name):
        if when_none not in WHEN_NONE:
            raise FeedFaceError(f"when_none: found {shorten(when_none)}, expected one of {', '.join(WHEN_NONE)}")
        found = order_faces(detector.detect(image), order, (image.shape[1], image.shape[0]))
        faces = tuple(face for face in found if face.size >= min_size)
        too_small = tuple(face for face in found if face.size < min_size)
        if not faces and when_none == "error":
            text = "no face found"
            if too_small:
                largest = max(face.size for face in too_small)
                text = f"of {len(too_small)} face(s) the largest has {largest:.0f} pixels and min_size is {min_size:g}"
            advice = "Use another photo or detector, a lower min_size, or another when_none"
            raise NoFaceError(f"{text} (by {detector.name}). {advice}")
        if not faces:
            whole = tuple(WholeImage().detect(image)) if when_none == "whole image" else ()
            return Selection(whole, tuple(range(len(whole))), too_small, when_none if whole else "skipped")
        chosen = tuple(range(len(faces)) if indexes is None else indexes)
        if not chosen:
            raise FeedFaceError("no index given; expected the numbers of the faces to take")
        if missing := [index for index in chosen if not 0 <= index < len(faces)]:
            small = f" ({len(too_small)} more under the min_size of {min_size:g} pixels)" if too_small else ""
            raise FeedFaceError(
                f"face {listing(missing)} was asked for, but {len(faces)} face(s) were found{small}, numbered from 0 "
                f"to {len(faces) - 1} by {order}"
            )
        return Selection(faces, chosen, too_small)


def crop_scale_of(face: DetectedFace, scale: float = CROP_SCALE) -> float:
    """The scale of the crop: as asked for, but 1 for a whole photo, which has nothing around it."""
    return 1.0 if face.source == WHOLE_IMAGE else scale
