"""A face in a photo: its box and what else a detector says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, model_validator
from torch import Tensor

from ..errors import FeedFaceError, located, shorten, typed

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels of the original photo; x to the right, y down, the far edge exclusive."""
LARGEST_COORDINATE = 1e7
"""Pixels; no photo that Pillow opens comes near."""


def check_box(box: Any) -> Box:
    """The box as four floats. Raises :class:`FeedFaceError` unless it is a list or tuple of four finite numbers of a
    photo's size, and has an area."""
    if not (isinstance(box, (list, tuple)) and len(box) == 4 and all(map(_is_coordinate, box))):
        raise FeedFaceError(
            f"a box is four numbers x0, y0, x1, y1 in pixels, finite and at most {LARGEST_COORDINATE:g}, found "
            f"{shorten(box)}"
        )
    x0, y0, x1, y1 = map(float, box)
    if x1 <= x0 or y1 <= y0:
        raise FeedFaceError(
            f"a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1, found {x0:g}, {y0:g}, {x1:g}, {y1:g} (width and height "
            "in the last two places?)"
        )
    return x0, y0, x1, y1


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= LARGEST_COORDINATE


_Pixels = Annotated[float, Field(strict=True, ge=-LARGEST_COORDINATE, le=LARGEST_COORDINATE)]
_Point = tuple[_Pixels, _Pixels]


class _Record(BaseModel, allow_inf_nan=False):
    """A face as JSON; a bare list is its box."""

    box: Annotated[Box, BeforeValidator(check_box)]
    confidence: Annotated[float, Field(strict=True, ge=0, le=1)] = 1.0
    landmarks: tuple[_Point, _Point, _Point, _Point, _Point] | None = None
    source: Annotated[str, Field(max_length=40)] = "box"

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, record: Any) -> Any:
        return {"box": record} if isinstance(record, list) else record


_RECORDS = TypeAdapter(list[_Record])


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
        record = {
            "box": [round(v, 2) for v in self.box],
            "confidence": round(self.confidence, 4),
            "source": self.source,
        }
        if self.landmarks is not None:
            record["landmarks"] = [[round(v, 2) for v in point] for point in self.landmarks.tolist()]
        return record


def faces_to_json(faces: Sequence[Sequence[DetectedFace]]) -> str:
    """Faces of several photos as JSON: one list a photo, in the order of the photos."""
    return json.dumps([[face.to_json() for face in photo] for photo in faces])


def faces_from_json(text: str, photos: int) -> list[list[DetectedFace]]:
    """One list of faces a photo, from what :func:`faces_to_json` writes or a shorter form of it: a face may be its bare
    box ``[40, 30, 120, 130]``, and for one photo the outer lists may be left out.

    Raises:
        FeedFaceError: if the text is not JSON, does not describe boxes, or is for another number of photos.
    """
    with located("boxes"):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FeedFaceError(f"not JSON ({shorten(error)}); expected for example [[40, 30, 120, 130]]") from error
        if _is_face(data):
            data = [[data]]
        elif isinstance(data, list) and data and all(map(_is_face, data)):
            data = [data]
        if not isinstance(data, list) or len(data) != photos:
            found = f"there are {len(data)} lists" if isinstance(data, list) else f"found {shorten(data)}"
            raise FeedFaceError(f"{found} for {photos} photo(s), expected one list of boxes for each photo")
        faces = []
        for number, photo in enumerate(data, start=1):
            with located(f"photo {number} of {photos}"):
                faces.append([_face(record) for record in typed(_RECORDS, photo)])
        return faces


def _is_face(data: Any) -> bool:
    """Whether JSON is one face, a dict or a bare box."""
    numbers = isinstance(data, list) and len(data) > 0 and all(isinstance(value, (int, float)) for value in data)
    return isinstance(data, Mapping) or numbers


def _face(record: _Record) -> DetectedFace:
    landmarks = None if record.landmarks is None else torch.tensor(record.landmarks)
    return DetectedFace(record.box, record.confidence, landmarks, source=record.source)
