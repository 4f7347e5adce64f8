"""Where photos come from: a folder, a glob, or a table."""

from __future__ import annotations

import csv
import glob
import os
from pathlib import Path
from typing import Any

from ..data.manifest import read_rows
from ..errors import TrainerError
from .photo import Photo

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".gif")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
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
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() in TABLES:
        return _from_table(path), path.parent
    if path.is_dir():
        root, files = path, [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    else:
        files = [Path(name) for name in glob.glob(os.path.expanduser(source), recursive=True)]
        if not files:
            raise TrainerError(f"{source}: no such folder or table, and no file matches it as a glob")
        root = Path(os.path.commonpath([file.parent for file in files]))
    own = [] if output is None else [Path(output).resolve()]  # pictures that an earlier run wrote
    if own == [root.resolve()]:
        own = [own[0] / name for name in ("masks", "crops", "contact_sheet.png")]
    photos = sorted(
        file
        for file in files
        if file.suffix.lower() in SUFFIXES
        and not file.name.startswith(".")
        and not any(file.resolve().is_relative_to(folder) for folder in own)
    )
    if not photos:
        raise TrainerError(
            f"{source}: no photos among {len(files)} file(s); looked for {', '.join(SUFFIXES)} with sub-folders"
        )
    return [Photo(file.relative_to(root).as_posix(), file, _caption_beside(file)) for file in photos], root


def _caption_beside(photo: Path) -> dict[str, str]:
    beside = photo.with_suffix(".txt")
    if not beside.is_file():
        return {}
    try:
        return {"caption": " ".join(beside.read_text(encoding="utf-8-sig").split())}
    except UnicodeDecodeError as error:
        raise TrainerError(f"{beside}: the caption is not UTF-8 text ({error})") from error


def _from_table(path: Path) -> list[Photo]:
    photos, seen = [], {}
    for number, row in enumerate(_read_csv(path) if path.suffix.lower() in DELIMITERS else read_rows(path), 1):
        where, name, given = f"{path}, row {number}", row.get("path"), {}
        if not isinstance(name, str) or not name.strip():
            raise TrainerError(f"{where}: no path; the columns are {', '.join(map(str, row)) or 'none'}")
        name = name.strip()
        if name in seen:
            raise TrainerError(f"{where}: {name} was in row {seen[name]} already")
        seen[name] = number
        for column in ("caption", "identity", "bbox", "mask_path"):
            value = row.get(column)
            if value not in (None, "") and column in ("caption", "identity"):
                if not isinstance(value, (str, int)):
                    raise TrainerError(f"{where}: {column} is {value!r}, expected text")
                value = " ".join(str(value).split())
            if value not in (None, ""):
                given[column] = value
        photos.append(Photo(str(row.get("id") or name), path.parent / Path(name).expanduser(), given))
    return photos


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=DELIMITERS[path.suffix.lower()]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise TrainerError(f"{path}: not a CSV table in UTF-8 ({error})") from error
    if not rows:
        raise TrainerError(f"{path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise TrainerError(f"{path}, row {number}: more fields than the header has; quote captions with commas")
        box = row.get("bbox") or ""
        try:
            row["bbox"] = [float(value) for value in box.strip("[] ").replace(",", " ").split()] or None
        except ValueError as error:
            raise TrainerError(f"{path}, row {number}: bbox is {box!r}, expected x0, y0, x1, y1 in pixels") from error
    return rows
