"""The manifest: one row a photo, in JSONL or Parquet, and the same rows checked: :class:`Record`.

Rows of the released format (path, caption, width, height, bbox, square_bbox, mask_path) are read as well.
Further columns are kept out of training.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass

from feedface_core.errors import shorten
from feedface_core.faces import CROP_SCALE, FILL, check_box, square_box
from feedface_core.files.atomic import replacing

from ..config.fields import Name, PathText, Positive, Probability, Text, as_path
from ..errors import TrainerError, explain, first_of
from . import pictures
from .jsonl import read_objects


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


def parse_row(row: Mapping[str, Any], folder: Path) -> Record:
    """One row as a record whose files exist, and whose box lies in the photo.

    Args:
        row: its columns.
        folder: that relative paths start from.

    Raises:
        TrainerError: names each column and what was found.
    """
    row = {name: value for name, value in row.items() if value is not None and value != ""}
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


def each_row(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL or Parquet manifest as plain dicts, one after the other.

    Raises:
        TrainerError: a file that is missing, empty, of another kind, or not what its name says.
    """
    path, found = as_path(path, "manifest"), False
    if not os.path.isfile(path):
        raise TrainerError(f"manifest {path}: no such file; python -m trainer.prepare makes one")
    rows = _parquet_rows(path) if _is_parquet(path) else read_objects(path)
    try:
        for row in rows:
            found = True
            yield row
    except Exception as error:  # of JSON, UTF-8, or one of Arrow's dozen
        raise TrainerError(f"manifest {path}: cannot be read: {str(error)[:400]}") from error
    if not found:
        raise TrainerError(f"manifest {path}: holds no rows")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(4096):
            yield from batch.to_pylist()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a manifest; see :func:`each_row`."""
    return list(each_row(path))


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".parquet", ".jsonl", ".json", ".ndjson"):
        raise TrainerError(f"manifest {path}: expected .jsonl or .parquet, found {path.suffix or 'no suffix'}")
    return path.suffix == ".parquet"


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest in one piece: a reader sees the old file or the new one, never a part.

    Raises:
        TrainerError: for another suffix, values that such a file cannot hold, or a folder that cannot be written to.
    """
    path, rows = Path(path), [dict(row) for row in rows]
    is_parquet = _is_parquet(path)
    try:
        with replacing(path) as partial, open(partial, "wb") as file:
            if is_parquet:
                import pyarrow
                from pyarrow import parquet

                parquet.write_table(pyarrow.Table.from_pylist(rows), file)
            else:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError, TypeError) as error:  # of the disk, or of what JSON and Arrow have no form for
        raise TrainerError(f"{path}: cannot be written: {error}") from error


def check_rows(manifests: str | Path | Sequence[str | Path], root: str | Path | None = None) -> Iterator[Record | str]:
    """Each row of one or several manifests as a record, or as the line that says why it cannot be used.

    Args:
        manifests: JSONL or Parquet files.
        root: folder that relative paths start from; None takes each manifest's own folder.

    Raises:
        TrainerError: a manifest that cannot be read, or a folder that is missing.
    """
    times, ids = Counter(), set()
    if root is not None and not os.path.isdir(root := as_path(root, "data.root")):
        raise TrainerError(f"data.root {root}: no such folder")
    for manifest in [manifests] if isinstance(manifests, (str, Path)) else manifests:
        folder = root or as_path(manifest, "manifest").parent
        for number, row in enumerate(each_row(manifest), 1):
            try:
                record = parse_row(row, folder)
            except TrainerError as error:
                yield f"{manifest}, row {number}, {shorten(row.get('path'))}: {error}"
                continue
            name = record.id
            while name in ids:  # the same photo may come twice, with two captions
                times[record.id] += 1
                name = f"{record.id}#{times[record.id] + 1}"
            ids.add(name)
            yield record if name == record.id else replace(record, id=name)


def check_counts(records: int, problems: Sequence[str], count: int, drop_missing: bool) -> None:
    """Raises ``TrainerError`` if ``count`` rows, the first of them named in ``problems``, cannot be used and may not be
    left out, or if there are no others."""
    if not records and not count:
        raise TrainerError("data.manifest is an empty list: name a manifest")
    if count and (not drop_missing or not records):
        hint = "" if drop_missing else "\nRepair the manifest, or leave such rows out with data.drop_missing=true"
        listed = first_of(problems, count)
        raise TrainerError(f"{count} of {count + records} manifest rows cannot be used:{listed}{hint}")


def read_manifest(
    manifests: str | Path | Sequence[str | Path], root: str | Path | None = None, drop_missing: bool = False
) -> tuple[list[Record], list[str]]:
    """The photos of one or several manifests as a list; :func:`~trainer.data.manifest_index.open_manifest` is for many.

    Args:
        manifests, root: as of :func:`check_rows`.
        drop_missing: leave out rows that cannot be used instead of stopping.

    Returns:
        The records in the order of the files, and one line for each row left out.

    Raises:
        TrainerError: rows that cannot be used (a file that is missing, no face box, …): says how many, and
            lists the first ones with their reasons; or no row that can be used.
    """
    records, problems = [], []
    for row in check_rows(manifests, root):
        (problems if isinstance(row, str) else records).append(row)
    check_counts(len(records), problems, len(problems), drop_missing)
    return records, problems
