"""The manifest: one row a photo, in JSONL or Parquet, and the same rows checked: :class:`Record`.

Rows of the released format (path, caption, width, height, bbox, square_bbox, mask_path) are read as well.
Further columns are kept out of training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic.dataclasses import dataclass

from feedface_core.faces import CROP_SCALE, FILL, check_box, square_box
from feedface_core.files.atomic import replacing

from ..errors import TrainerError, explain, first_of
from .jsonl import read_objects


class CropRule(NamedTuple):
    """How face boxes became crops; nodes have to do the same. See ``feedface_core.config.EncoderConfig``."""

    scale: float = CROP_SCALE
    border: str = "pad"
    fill: float = FILL


DEFAULT_RULE = CropRule()


def _existing(path: Path, info: ValidationInfo) -> Path:
    path = path if info.context is None else info.context / path.expanduser()
    if info.context is not None and not path.is_file():
        raise ValueError(f"{path}: no such file")
    return path


Box = Annotated[tuple[float, float, float, float], BeforeValidator(check_box)]
File = Annotated[Path, AfterValidator(_existing)]
Hash = Annotated[
    int, Field(ge=0, lt=2**64), BeforeValidator(lambda value: int(value, 16) if isinstance(value, str) else value)
]
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]


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

    id: Text
    path: File
    caption: Annotated[str, AfterValidator(str.strip)] = ""
    width: Annotated[int, Field(gt=0)] | None = None
    height: Annotated[int, Field(gt=0)] | None = None
    bbox: Box
    square_bbox: Box | None = None
    mask_path: File | None = None
    crop_path: File | None = None
    crop_scale: Annotated[float, Field(gt=0)] = DEFAULT_RULE.scale
    crop_border: Literal["pad", "clamp"] = DEFAULT_RULE.border
    crop_fill: Annotated[float, Field(ge=0, le=1)] = DEFAULT_RULE.fill
    identity: Text | None = None
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


_RECORD = TypeAdapter(Record)


def parse_row(row: Mapping[str, Any], folder: Path) -> Record:
    """One row as a record whose files exist.

    Args:
        row: its columns.
        folder: that relative paths start from.

    Raises:
        TrainerError: names each column and what was found.
    """
    row = {name: value for name, value in row.items() if value is not None and value != ""}
    try:
        return _RECORD.validate_python({"id": row.get("path", ""), **row}, context=folder)
    except ValidationError as error:
        problems = {problem["loc"][0]: explain(problem) for problem in error.errors()}  # one for each column
        raise TrainerError("; ".join(problems.values())) from error


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or Parquet manifest as plain dicts.

    Raises:
        TrainerError: a file that is missing, empty, of another kind, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise TrainerError(f"manifest {path}: no such file; python -m trainer.prepare makes one")
    is_parquet = _is_parquet(path)
    try:
        if is_parquet:
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            rows = list(read_objects(path))
    except (ValueError, OSError) as error:  # of JSON, UTF-8 or Arrow
        raise TrainerError(f"manifest {path}: cannot be read: {error}") from error
    if not rows:
        raise TrainerError(f"manifest {path}: holds no rows")
    return rows


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".parquet", ".jsonl", ".json", ".ndjson"):
        raise TrainerError(f"manifest {path}: expected .jsonl or .parquet, found {path.suffix or 'no suffix'}")
    return path.suffix == ".parquet"


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest in one piece: a reader sees the old file or the new one, never a part.

    Raises:
        TrainerError: for a name that ends neither in .jsonl nor in .parquet.
    """
    with replacing(Path(path)) as partial:
        if _is_parquet(Path(path)):
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), partial)
        else:
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())


def read_manifest(
    manifests: str | Path | Sequence[str | Path], root: str | Path | None = None, drop_missing: bool = False
) -> tuple[list[Record], list[str]]:
    """The photos of one or several manifests.

    Args:
        manifests: JSONL or Parquet files.
        root: folder that relative paths start from; None takes each manifest's own folder.
        drop_missing: leave out rows that cannot be used instead of stopping.

    Returns:
        The records in the order of the files, and one line for each row left out.

    Raises:
        TrainerError: rows that cannot be used (a file that is missing, no face box, …): says how many, and
            lists the first ones with their reasons; or no row that can be used.
    """
    records, problems, times = [], [], Counter()
    for manifest in [manifests] if isinstance(manifests, (str, Path)) else manifests:
        folder = Path(manifest).parent if root is None else Path(root)
        for number, row in enumerate(read_rows(manifest), 1):
            try:
                record = parse_row(row, folder)
            except TrainerError as error:
                problems.append(f"{manifest}, row {number}, {row.get('path')}: {error}")
                continue
            times[record.id] += 1  # the same photo may come twice, with two captions
            if times[record.id] > 1:
                record = replace(record, id=f"{record.id}#{times[record.id]}")
            records.append(record)
    if problems and (not drop_missing or not records):
        hint = "" if drop_missing else "\nRepair the manifest, or leave such rows out with data.drop_missing=true"
        count = f"{len(problems)} of {len(problems) + len(records)}"
        raise TrainerError(f"{count} manifest rows cannot be used:{first_of(problems)}{hint}")
    return records, problems


def common_rule(records: Sequence[Record]) -> CropRule:
    """How the crops of all records were made.

    Raises:
        TrainerError: when they were made in several ways, so that no setting of the nodes would fit the adapter.
    """
    counts = Counter(record.rule for record in records)
    if len(counts) > 1:
        listed = ", ".join(
            f"{count} with {rule.scale:g}, {rule.border}, fill {rule.fill:g}" for rule, count in counts.most_common()
        )
        raise TrainerError(
            f"the photos' face crops were made in {len(counts)} ways ({listed}: scale, border and fill), but an "
            "adapter is used with one. Prepare all of them with the same crop.scale and crop.border"
        )
    return next(iter(counts), DEFAULT_RULE)


def fingerprint(records: Sequence[Record]) -> str:
    """Sixteen hex digits over what training takes from the records, in their order; not over where the files lie."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        values = {name: getattr(record, name) for name in ("id", "caption", "square", "identity", "rule")}
        values |= {"box": record.bbox, "mask": record.mask_path is not None, "crop": record.crop_path is not None}
        values |= {"photo_hash": record.photo_hash, "crop_hash": record.crop_hash}
        digest.update(json.dumps(values, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
