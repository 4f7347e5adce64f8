"""A row of a manifest, checked: :class:`Record`. A row with several people becomes one for each of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass

from feedface_core.errors import shorten
from feedface_core.faces import CROP_SCALE, FILL, check_box, square_box

from ..config.fields import MOST_FACES, Name, PathText, Positive, Probability, Text
from ..errors import TrainerError, explain
from . import pictures


class CropRule(NamedTuple):
    """How face boxes became crops; nodes have to do the same. See ``feedface_core.config.EncoderConfig``."""

    scale: float = CROP_SCALE
    border: str = "pad"
    fill: float = FILL


DEFAULT_RULE = CropRule()


_PATH = TypeAdapter(PathText)
LARGEST_COORDINATE = 1e7
"""Of a box, in pixels."""
LARGEST_SQUARE = 16
"""Side of a face crop over the longer side of its photo: cutting it takes memory for every pixel."""


def _file(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, Path):  # of a record
        return value
    path = Path(_PATH.validate_python(value))
    if info.context is not None and not os.path.isfile(path := info.context / path.expanduser()):
        raise ValueError(f"{shorten(str(path))[1:-1]}: no such file")
    return path


def _four(value: Any) -> list[float]:
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    if len(numbers) != 4 or any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in numbers):
        raise ValueError(f"a box is four numbers x0, y0, x1, y1 in pixels, found {shorten(str(value))}")
    if any(abs(one) > LARGEST_COORDINATE and one not in (math.inf, -math.inf) for one in numbers):
        raise ValueError(f"a box must lie in a photo, found {shorten(str(value))}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"a box must hold finite numbers, found {', '.join(str(float(one)) for one in numbers)}")
    return [float(one) for one in numbers]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # a column with gaps, in Parquet


def _hash(value: Any) -> Any:
    return int(value, 16) if isinstance(value, str) else value


Coordinates = Annotated[list[float], BeforeValidator(_four)]
Box = Annotated[tuple[float, float, float, float], BeforeValidator(check_box), BeforeValidator(_four)]
File = Annotated[Path, BeforeValidator(_file)]
Pixels = Annotated[Positive, BeforeValidator(_whole)]
Hash = Annotated[int, Field(strict=True, ge=0, lt=2**64), BeforeValidator(_hash)]


@dataclass(frozen=True, slots=True, kw_only=True, config={"allow_inf_nan": False})
class Record:
    """One photo to train on: a row of a manifest. Columns that are null or empty have their defaults.

    Args:
        id: stable name of the sample, the path by default: all its random draws derive from it.
        path: the photo; relative to the manifest's folder unless it is absolute.
        caption: may be empty.
        width, height: of the photo in pixels, after its EXIF orientation.
        bbox: the face ``(x0, y0, x1, y1)`` in pixels of the upright photo.
        square_bbox: the square around it; may reach past the border. By default ``crop_scale`` × the longer side.
        mask_path: picture of the photo's shape whose pixels are 0 outside the face and hair, or None to train without.
        crop_path: the face crop made in advance, or None.
        crop_scale: side of the square over the longer side of the box.
        crop_border: whether squares may reach past the border.
        crop_fill: grey value 0…1 past the border.
        identity: the person, or None.
        photo_hash, crop_hash: 64-bit perceptual hashes (hexadecimal in the manifest), or None.
        face_number, face_count: which of the people of a photo with several it is, from 0, and how many there are;
            their records follow one another.
        other_masks: of the other people in the photo.
    """

    id: Name
    path: File
    caption: Annotated[Text, AfterValidator(str.strip)] = ""
    width: Pixels | None = None
    height: Pixels | None = None
    bbox: Box
    square_bbox: Box | None = None
    mask_path: File | None = None
    crop_path: File | None = None
    crop_scale: Annotated[float, Field(strict=True, gt=0, le=16)] = DEFAULT_RULE.scale
    crop_border: Literal["pad", "clamp"] = DEFAULT_RULE.border
    crop_fill: Probability = DEFAULT_RULE.fill
    identity: Name | None = None
    photo_hash: Hash | None = None
    crop_hash: Hash | None = None
    face_number: int = 0
    face_count: int = 1
    other_masks: tuple[Path, ...] = ()

    @property
    def square(self) -> tuple[float, float, float, float]:
        """The square of the face crop, in pixels."""
        return square_box(self.square_bbox, 1.0) if self.square_bbox else square_box(self.bbox, self.crop_scale)

    @property
    def rule(self) -> CropRule:
        """How the square came from the box."""
        return CropRule(self.crop_scale, self.crop_border, self.crop_fill)

    def check_place(self, width: int, height: int) -> None:
        """Raises ``TrainerError`` unless the photo has the size of the row, and box and square meet it.

        Args:
            width, height: of the upright photo, in pixels.
        """
        if (self.width or width, self.height or height) != (width, height):
            raise TrainerError(
                f"width, height: {self.path} has {width} × {height} pixels, but the manifest says "
                f"{self.width} × {self.height}"
            )
        for name, box in (("bbox", self.bbox), ("square_bbox", self.square_bbox)):
            if box is not None and not (box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0):
                found = ", ".join(f"{value:g}" for value in box)
                raise TrainerError(f"{name}: {found} lies outside the photo of {width} × {height} pixels")
        side = self.square[2] - self.square[0]
        if side > LARGEST_SQUARE * max(width, height):
            name = "square_bbox" if self.square_bbox else "bbox"
            raise TrainerError(f"{name}: makes a crop of {side:g} pixels of a photo of {width} × {height}")


_RECORD = TypeAdapter(Record)
_OWN = ("face_number", "face_count", "other_masks")
"""Fields that are no columns."""
_OF_A_FACE = ("id", "bbox", "square_bbox", "identity", "crop_path", "crop_hash")
"""Columns that a row's further faces do not share with it."""


def parse_row(row: Mapping[str, Any], folder: Path) -> Record:
    """One row as a record whose files exist, and whose box lies in the photo.

    Args:
        row: its columns.
        folder: that relative paths start from.

    Raises:
        TrainerError: names each column and what was found.
    """
    row = {name: value for name, value in row.items() if value is not None and value != "" and name not in _OWN}
    try:
        record = _RECORD.validate_python({"id": row.get("path", ""), **row}, context=folder)
    except ValidationError as error:
        found = [one for one in error.errors() if "id" in row or one["loc"] != ("id",)]  # else the path is the id
        problems = {problem["loc"][0]: explain(problem) for problem in found}  # one for each column
        raise TrainerError("; ".join([*problems.values()][:5])) from error
    size = (record.width, record.height) if record.width and record.height else pictures.size_of(record.path)
    if size is not None:
        record.check_place(*size)
    return record


def parse_rows(row: Mapping[str, Any], folder: Path) -> list[Record]:
    """The records of one row: one, and one more for each of its further ``faces``, of the same photo and caption.

    Args:
        row: its columns; ``faces`` is a list of dicts with the columns that a further face has of its own: bbox,
            square_bbox, identity, mask_path, crop_path, crop_hash. Without a mask of its own, the row's shows it too.
        folder: that relative paths start from.

    Raises:
        TrainerError: as :func:`parse_row`; for a face, ``faces.<number>`` comes first.
    """
    first, faces = parse_row(row, folder), row.get("faces")
    if faces is None or faces == "" or faces == []:
        return [first]
    if not isinstance(faces, (list, tuple)) or not all(isinstance(face, Mapping) for face in faces):
        raise TrainerError(f"faces: expected a list of faces with a bbox each, found {shorten(faces)}")
    if len(faces) >= MOST_FACES:
        raise TrainerError(f"faces: {len(faces)} further ones, at most {MOST_FACES - 1} of a photo")
    shared, records = {name: value for name, value in row.items() if name not in _OF_A_FACE}, [first]
    for number, face in enumerate(faces):
        own = {name: value for name, value in face.items() if value is not None and value != ""}
        try:
            records.append(parse_row({**shared, "id": f"{first.id}/{number + 2}", **own}, folder))
        except TrainerError as error:
            raise TrainerError(f"faces.{number}: {error}") from error
    return [of_several(record, number, records) for number, record in enumerate(records)]


def of_several(record: Record, number: int, records: Iterable[Record]) -> Record:
    """A record as one of those of a photo with several people."""
    every = list(records)
    masks = dict.fromkeys(one.mask_path for one in every if one.mask_path is not None)
    others = tuple(mask for mask in masks if mask != record.mask_path)
    return replace(record, face_number=number, face_count=len(every), other_masks=others)
