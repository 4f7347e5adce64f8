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
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_COLUMNS = ("caption", "identity", "bbox", "mask_path")


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
    made = _made_here(root, output)
    photos = sorted(
        file
        for file in files
        if file.suffix.lower() in SUFFIXES
        and not file.name.startswith(".")
        and not any(file.resolve().is_relative_to(place) for place in made)
    )
    if not photos:
        raise TrainerError(
            f"{source}: no photos among {len(files)} file(s); looked for {', '.join(SUFFIXES)} with sub-folders"
        )
    return [_with_caption_file(Photo(file.relative_to(root).as_posix(), file)) for file in photos], root


def _made_here(root: Path, output: str | Path | None) -> list[Path]:
    """Where pictures are that an earlier run wrote: the output folder, which may be the one with the photos."""
    if output is None:
        return []
    folder = Path(output).resolve()
    if folder != root.resolve():
        return [folder]
    return [folder / "masks", folder / "crops", folder / "contact_sheet.png"]


def _with_caption_file(photo: Photo) -> Photo:
    beside = photo.path.with_suffix(".txt")
    if beside.is_file():
        try:
            photo.given["caption"] = " ".join(beside.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise TrainerError(f"{beside}: the caption is not UTF-8 text ({error})") from error
    return photo


def _from_table(path: Path) -> list[Photo]:
    rows = _read_csv(path) if path.suffix.lower() in (".csv", ".tsv") else read_rows(path)
    photos, seen = [], {}
    for number, row in enumerate(rows, 1):
        name = row.get("path")
        if not isinstance(name, str) or not name.strip():
            columns = ", ".join(map(str, row)) or "none"
            raise TrainerError(f"{path}, row {number}: no path; the columns are {columns}")
        for column in ("caption", "identity"):
            if row.get(column) is not None and not isinstance(row[column], (str, int)):
                raise TrainerError(f"{path}, row {number}: {column} is {row[column]!r}, expected text")
        name = name.strip()
        if name in seen:
            raise TrainerError(f"{path}, row {number}: {name} was in row {seen[name]} already")
        seen[name] = number
        given = {column: row[column] for column in _COLUMNS if row.get(column) not in (None, "")}
        for column in ("caption", "identity"):
            if column in given:
                given[column] = " ".join(str(given[column]).split())
        photos.append(Photo(str(row.get("id") or name), path.parent / Path(name).expanduser(), given))
    return photos


def _numbers(text: str, where: str) -> list[float]:
    try:
        return [float(part) for part in text.strip("[] ").replace(",", " ").split()]
    except ValueError as error:
        raise TrainerError(f"{where}: bbox is {text!r}, expected x0, y0, x1, y1 in pixels") from error


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows = [dict(row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TrainerError(f"{path}: not a CSV table in UTF-8 ({error})") from error
    if not rows:
        raise TrainerError(f"{path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise TrainerError(f"{path}, row {number}: more fields than the header has; quote captions with commas")
        if row.get("bbox"):
            row["bbox"] = _numbers(row["bbox"], f"{path}, row {number}")
        else:
            row.pop("bbox", None)
    return rows
