"""A face in a photo: its box and what else a detector says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FeedFaceError

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels of the original photo; x to the right, y down, the far edge exclusive."""
LARGEST_COORDINATE = 1e7
"""Pixels; no photo that Pillow opens comes near."""


class NoFaceError(FeedFaceError):
    """No face was found, or none was left after filtering."""


@dataclass(frozen=True, eq=False)
class DetectedFace:
    """One face in one photo.

    Args:
        box: ``(x0, y0, x1, y1)`` in pixels of the original photo. It may reach past the border.
        confidence: probability in 0..1 as the detector reports it; 1 for a box that somebody drew.
        landmarks: ``(5, 2)`` pixels, in the order left eye, right eye, nose, left and right corner of the mouth (left
            as seen in the picture), or None.
        embedding: ``(E,)`` identity vector of unit length, or None.
        source: name of the detector.
    """

    box: Box
    confidence: float = 1.0
    landmarks: Tensor | None = None
    embedding: Tensor | None = None
    source: str = "box"

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", check_box(self.box))
        if self.landmarks is not None and tuple(self.landmarks.shape) != (5, 2):
            raise FeedFaceError(f"landmarks must have the shape (5, 2), found {tuple(self.landmarks.shape)}")

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def size(self) -> float:
        """The longer side in pixels, which is the side of the square crop before its margin."""
        return max(self.width, self.height)

    @property
    def area(self) -> float:
        return self.width * self.height

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def to_json(self) -> dict[str, Any]:
        """A plain dict; the embedding is left out, since it identifies a person."""
        record: dict[str, Any] = {
            "box": [round(v, 2) for v in self.box],
            "confidence": round(self.confidence, 4),
            "source": self.source,
        }
        if self.landmarks is not None:
            record["landmarks"] = [[round(v, 2) for v in point] for point in self.landmarks.tolist()]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any] | Sequence[float]) -> DetectedFace:
        """Read ``{"box": [x0, y0, x1, y1], …}`` or a bare ``[x0, y0, x1, y1]``.

        Raises:
            FeedFaceError: if the record is neither, or its box is not usable.
        """
        if not isinstance(record, Mapping):
            return cls(box=record)
        if "box" not in record:
            raise FeedFaceError(f'a face needs the key "box", found the keys {sorted(map(str, record))}')
        landmarks = record.get("landmarks")
        try:
            return cls(
                box=record["box"],
                confidence=float(record.get("confidence", 1.0)),
                landmarks=None if landmarks is None else torch.tensor(landmarks, dtype=torch.float32),
                source=str(record.get("source", "box")),
            )
        except FeedFaceError:
            raise
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise FeedFaceError(f"not a face: {json.dumps(record)[:200]} ({error})") from error


def check_box(box: Any) -> Box:
    """Return the box as four floats.

    Raises:
        FeedFaceError: if it does not hold four finite numbers of a photo's size, or has no area.
    """
    try:
        x0, y0, x1, y1 = (float(v) for v in box)
    except (TypeError, ValueError, OverflowError) as error:
        found = repr(str(box)[:100])
        raise FeedFaceError(f"a box is four numbers x0, y0, x1, y1 in pixels, found {found}") from error
    if not all(math.isfinite(v) for v in (x0, y0, x1, y1)):
        raise FeedFaceError(f"a box must hold finite numbers, found {x0}, {y0}, {x1}, {y1}")
    if max(abs(v) for v in (x0, y0, x1, y1)) > LARGEST_COORDINATE:
        raise FeedFaceError(f"a box must lie in a photo, found {x0:g}, {y0:g}, {x1:g}, {y1:g} pixels")
    if x1 <= x0 or y1 <= y0:
        raise FeedFaceError(
            f"a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1, found {x0:g}, {y0:g}, {x1:g}, {y1:g} (width"
            " and height in the last two places?)"
        )
    return x0, y0, x1, y1


def faces_to_json(faces: Sequence[Sequence[DetectedFace]]) -> str:
    """Faces of several photos as JSON: one list a photo, in the order of the photos."""
    return json.dumps([[face.to_json() for face in photo] for photo in faces])


def faces_from_json(text: str, photos: int) -> list[list[DetectedFace]]:
    """Read what :func:`faces_to_json` writes, and shorter forms of it.

    For one photo the outer list may be left out, and a single box may be written bare: ``[40, 30, 120, 130]``.

    Args:
        text: JSON.
        photos: how many photos the boxes are for.

    Returns:
        One list of faces a photo.

    Raises:
        FeedFaceError: if the text is not JSON, does not describe boxes, or is for another number of photos.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FeedFaceError(f"boxes: not JSON ({error}); expected for example [[40, 30, 120, 130]]") from error
    if isinstance(data, Mapping) or _is_bare_box(data):
        data = [[data]]
    elif not isinstance(data, list):
        raise FeedFaceError(f"boxes: expected a list, found {str(data)[:60]!r}")
    elif data and all(isinstance(entry, Mapping) or _is_bare_box(entry) for entry in data):
        data = [data]
    if len(data) != photos:
        raise FeedFaceError(
            f"boxes: there are {len(data)} lists for {photos} photo(s); expected one list of boxes for each photo"
        )
    faces = []
    for number, photo in enumerate(data, start=1):
        try:
            if not isinstance(photo, list):
                raise FeedFaceError(f"expected a list of boxes, found {str(photo)[:60]!r}")
            faces.append([DetectedFace.from_json(record) for record in photo])
        except FeedFaceError as error:
            raise FeedFaceError(f"boxes: photo {number} of {photos}: {error}") from error
    return faces


def _is_bare_box(data: Any) -> bool:
    return isinstance(data, list) and len(data) > 0 and all(isinstance(v, (int, float)) for v in data)
