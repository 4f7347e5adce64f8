"""What has been done already: one line a photo, appended as the work goes on.

A run that is killed loses at most the photos of one batch. A line whose photo, settings or files have changed since
is void, and the photo is worked on again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from ..config.fields import Name, Positive, Probability, Text
from ..data.jsonl import keep_lines
from ..data.manifest import Box
from ..errors import TrainerError, explain, first_of
from .photo import Photo

logger = logging.getLogger(__name__)
_Crop = Annotated[str, Field(pattern=r"^crops/[0-9a-f]{2}/[0-9a-f]{32}\.png$")]
_Hexadecimal = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]

NAME = "progress.jsonl"
FINDINGS = ("reason", "detail", "vector", "vectors", "row")


class _Face(BaseModel):
    """The same of a further face."""

    bbox: Box
    square_bbox: Box
    crop_hash: _Hexadecimal
    crop_path: _Crop


class _Row(BaseModel):
    """What the stages found of a photo that is kept; see the manifest."""

    bbox: Box
    square_bbox: Box
    width: Positive
    height: Positive
    photo_hash: _Hexadecimal
    crop_hash: _Hexadecimal
    mask_path: Annotated[str, Field(pattern=r"^masks/[0-9a-f]{2}/[0-9a-f]{32}\.png$")]
    crop_path: _Crop
    mask_kind: Text
    mask_area: Probability
    detector: Text
    confidence: Probability
    caption: Text = ""
    faces: list[_Face] = []


class _Entry(BaseModel):
    id: Name
    key: list[Any]
    recogniser: Text | None = None
    reason: Text
    detail: Text
    vector: list[FiniteFloat] | None
    vectors: list[list[FiniteFloat]] = []
    row: dict[str, Any]


def _problem(entry: Any) -> str:
    """What is wrong with an entry; empty if nothing is."""
    try:
        found = _Entry.model_validate(entry, strict=True)
        if not found.reason:
            _Row.model_validate(found.row)
    except ValidationError as error:
        return explain(error.errors()[0])
    return ""


class Journal:
    """The progress file of an output folder. A last line that was cut off by a crash is cut off for good.

    Args:
        output: the folder.
        settings: text that changes with every setting the stages depend on.
        recogniser: name of the recogniser that vectors have to be of; None if faces are not compared.
    """

    def __init__(self, output: Path, settings: str, recogniser: str | None = None) -> None:
        self.output, self.settings, self.recogniser = output, settings, recogniser
        self.path = output / NAME
        damaged: list[str] = []
        try:
            entries = keep_lines(self.path, lambda entry: not (problem := _problem(entry)) or damaged.append(problem))
        except OSError as error:
            raise TrainerError(f"{self.path}: cannot be read ({error.strerror})") from error
        if damaged:
            count = len(damaged)
            logger.warning("%s: %d damaged lines, their photos are done again:%s", self.path, count, first_of(damaged))
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in entries}

    def restore(self, photo: Photo, needs_caption: bool, vector: Literal["no", "looked for", "found"]) -> bool:
        """Fill a photo with what was found before; False if that has to be done (again)."""
        entry = self.entries.get(photo.id)
        if entry is None or entry["key"] != self._key(photo):
            return False
        row, has_caption = entry["row"], photo.given.get("caption") or "caption" in entry["row"]
        if not entry["reason"] and (
            (needs_caption and not has_caption)
            or (vector != "no" and (entry["vector"] is None or entry.get("recogniser") != self.recogniser))
            or (vector == "found" and not entry["vector"])
            or not all((self.output / row[column]).is_file() for column in ("mask_path", "crop_path"))
            or not all((self.output / face["crop_path"]).is_file() for face in row.get("faces", ()))
        ):
            return False
        for name in FINDINGS:
            setattr(photo, name, entry.get(name, []))  # of before there were several people: no vectors
        return True

    def add(self, photo: Photo) -> None:
        """Note a photo that has been through all stages."""
        entry = {"id": photo.id, "key": self._key(photo), "recogniser": self.recogniser}
        entry |= {name: getattr(photo, name) for name in FINDINGS}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _key(self, photo: Photo) -> list[Any]:
        try:
            status = photo.path.stat()
            state = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = None
        # Without several people the key is that of earlier versions.
        given = [photo.given["faces"]] if "faces" in photo.given else []
        return [self.settings, str(photo.path), state, photo.given.get("bbox"), photo.given.get("mask_path"), *given]
