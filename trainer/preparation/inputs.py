"""Where photos come from: a folder, a glob, or a table."""

from __future__ import annotations

import csv
import glob
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from feedface_core.errors import shorten
from feedface_core.files.json_file import regular_file

from ..config.fields import MOST_FACES, MOST_TEXT, Name, PathText, Text, as_path, writable
from ..data.manifest import Coordinates, read_rows
from ..errors import TrainerError, explain
from .photo import Photo

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".gif")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
Sentence = Annotated[Name, AfterValidator(lambda text: " ".join(text.split()))]
_CAPTION = TypeAdapter(Text)
TABLES = (*DELIMITERS, ".jsonl", ".ndjson", ".parquet")


def find_photos(source: str, output: str | Path | None = None) -> tuple[list[Photo], Path]:
    """The photos that the user named, in a stable order, and the folder their names are relative to.

    A text file of the same name beside a photo (``a.jpg``, ``a.txt``) is its caption.

    Args:
        source: a folder, a glob, or a table.
        output: the output folder: what lies in it is no photo.

    Raises:
        TrainerError: nothing there, or no photo in it, or a table without a path column.
    """
    path = as_path(source, "photos")
    if os.path.exists(path) and not os.path.isdir(path) and path.suffix.lower() in TABLES:
        return _from_table(path), path.parent
    if os.path.isdir(path):
        root, files = path, [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not files:
            raise TrainerError(f"photos {source}: no such folder or table, and no file matches it as a glob")
        root = Path(os.path.commonpath([file.parent for file in files]))
    own = [] if output is None else [Path(output).resolve()]  # pictures that an earlier run wrote
    if own == [root.resolve()]:
        own = [own[0] / name for name in ("masks", "crops", "contact_sheet.png")]
    photos = sorted(
        file
        for file in files
        if file.suffix.lower() in SUFFIXES
        and not file.name.startswith(".")
        and not any(Path(os.path.realpath(file)).is_relative_to(folder) for folder in own)
    )
    if not photos:
        raise TrainerError(
            f"{source}: no photos among {len(files)} file(s); looked for {', '.join(SUFFIXES)} with sub-folders"
        )
    try:
        names = [writable(file.relative_to(root).as_posix()) for file in photos]
    except ValueError as error:
        raise TrainerError(f"photos {source}: a file's name is not UTF-8: {error}") from error
    return [Photo(name, file, _caption_beside(file)) for name, file in zip(names, photos, strict=True)], root


def _caption_beside(photo: Path) -> dict[str, str]:
    beside = photo.with_suffix(".txt")
    if not beside.is_file():
        return {}
    try:
        with open(beside, encoding="utf-8-sig") as file:
            return {"caption": _CAPTION.validate_python(" ".join(file.read(4 * MOST_TEXT).split()))}
    except ValidationError as error:
        raise TrainerError(f"{beside}: the caption cannot be used: {explain(error.errors()[0])}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(f"{beside}: the caption is not UTF-8 text ({error})") from error


def _from_table(path: Path) -> list[Photo]:
    photos, seen = [], {}
    for number, values in enumerate(_read_csv(path) if path.suffix.lower() in DELIMITERS else read_rows(path), 1):
        where = f"{path}, row {number}"
        if not values.get("path"):
            raise TrainerError(f"{where}: no path; the columns are {', '.join(map(str, values))[:200] or 'none'}")
        try:
            row = _Row.model_validate({name: value for name, value in values.items() if value not in (None, "")})
        except ValidationError as error:
            raise TrainerError(f"{where}: {'; '.join(map(explain, error.errors()[:5]))}") from error
        name = row.path.strip()
        given = row.model_dump(exclude={"id", "path"}, exclude_none=True)
        photo = Photo(row.id or name, path.parent / Path(name).expanduser(), given)
        for one in (name, f"id {photo.id}"):
            if one in seen:
                raise TrainerError(f"{where}: {one} was in row {seen[one]} already")
            seen[one] = number
        photos.append(photo)
    return photos


class _Face(BaseModel):
    """A further face of a photo with several people."""

    bbox: Coordinates
    identity: Sentence | None = None


class _Row(BaseModel):
    """What a table says of a photo; further columns are left out."""

    path: PathText
    id: Name | None = None
    caption: Sentence | None = None
    identity: Sentence | None = None
    bbox: Coordinates | None = None
    mask_path: PathText | None = None
    consent: Text | None = None
    faces: Annotated[list[_Face], Field(max_length=MOST_FACES - 1)] | None = None


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        regular_file(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
            names = [name.strip() for name in table.fieldnames or []]  # a space after a comma is no part of it
            table.fieldnames = names
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainerError(f"{path}: not a CSV table in UTF-8 ({error})") from error
    if len(set(names)) < len(names):
        raise TrainerError(f"{path}: a column is there twice; the columns are {', '.join(names)[:200]}")
    if not rows:
        raise TrainerError(f"{path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise TrainerError(f"{path}, row {number}: more fields than the header has; quote captions with commas")
        box = row.get("bbox") or ""
        try:
            if not box.isascii() or "_" in box:  # Python reads both as digits
                raise ValueError
            row["bbox"] = [float(value) for value in box.strip("[] ").replace(",", " ").split()] or None
        except ValueError as error:
            raise TrainerError(
                f"{path}, row {number}: bbox is {shorten(box)}, expected x0, y0, x1, y1 in pixels"
            ) from error
    return rows
