"""The manifest: one row a photo, in JSONL or Parquet.

=============== ===========================================================================================
column          meaning
=============== ===========================================================================================
path            the photo; relative to the manifest's folder unless it is absolute
caption         text, may be empty
width, height   of the photo in pixels, after its EXIF orientation
bbox            face box ``[x0, y0, x1, y1]`` in pixels
square_bbox     the square around it (1.1 × the longer side); may reach past the border
mask_path       picture of the photo's shape whose pixels are 0 outside the face and hair
crop_path       the face crop, or null
crop_scale      side of the square over the longer side of the box; 1.1 if it is not said
crop_border     ``pad`` or ``clamp``: whether squares may reach past the border; ``pad`` if it is not said
crop_fill       grey value past the border; 0.5 if it is not said
identity        name of the person, or null
photo_hash      64-bit perceptual hash of the photo, hexadecimal, or null
crop_hash       the same of the face crop
=============== ===========================================================================================

Rows of the released format (path, caption, width, height, bbox, square_bbox, mask_path) are read as well.
Further columns are kept out of training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from feedface_core.config import EncoderConfig
from feedface_core.faces import CROP_SCALE, FILL, square_box

from ..errors import TrainerError
from .jsonl import read_lines

Box = tuple[float, float, float, float]
_SHOWN = 5


class ManifestError(TrainerError):
    """A manifest that cannot be used."""


class CropRule(NamedTuple):
    """How face boxes became crops; nodes have to do the same. See ``feedface_core.config.EncoderConfig``."""

    scale: float = CROP_SCALE
    border: str = "pad"
    fill: float = FILL


DEFAULT_RULE = CropRule()


@dataclass(frozen=True)
class Record:
    """One photo to train on.

    Args:
        id: stable name of the sample: all its random draws derive from it.
        path: the photo.
        caption: may be empty.
        box: the face in pixels of the upright photo.
        square: the square face crop, in pixels; may reach past the border.
        mask: picture with the face and hair, or None to train without a mask.
        crop: the face crop made in advance, or None.
        identity: the person, or None.
        photo_hash, crop_hash: 64-bit perceptual hashes, or None.
        rule: how the square came from the box.
    """

    id: str
    path: Path
    caption: str
    box: Box
    square: Box
    mask: Path | None = None
    crop: Path | None = None
    identity: str | None = None
    photo_hash: int | None = None
    crop_hash: int | None = None
    rule: CropRule = DEFAULT_RULE


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL or Parquet manifest as plain dicts.

    Raises:
        ManifestError: a file that is missing, empty, of another kind, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"manifest {path}: no such file; python -m trainer.prepare makes one")
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        rows = _read_jsonl(path)
    else:
        raise ManifestError(f"manifest {path}: expected .jsonl or .parquet, found {path.suffix or 'no suffix'}")
    if not rows:
        raise ManifestError(f"manifest {path}: holds no rows")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"manifest {path}: not a Parquet file ({error})") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        for number, line in read_lines(path):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(f"manifest {path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ManifestError(f"manifest {path}, line {number}: expected an object, found {line[:60]!r}")
            rows.append(row)
    except UnicodeDecodeError as error:
        raise ManifestError(f"manifest {path}: not UTF-8 text ({error})") from error
    return rows


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a manifest in one piece: a reader sees the old file or the new one, never a part.

    Raises:
        ManifestError: for a name that ends neither in .jsonl nor in .parquet.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), partial)
    elif path.suffix == ".jsonl":
        with open(partial, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    else:
        raise ManifestError(f"manifest {path}: expected .jsonl or .parquet, found {path.suffix or 'no suffix'}")
    os.replace(partial, path)


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
        ManifestError: rows that cannot be used (a file that is missing, no face box, …): says how many, and
            lists the first ones with their reasons; or no row that can be used.
    """
    if isinstance(manifests, (str, Path)):
        manifests = [manifests]
    records, problems = [], []
    taken: dict[str, int] = {}
    for manifest in manifests:
        folder = Path(root) if root is not None else Path(manifest).parent
        for number, row in enumerate(read_rows(manifest), 1):
            try:
                record = parse_row(row, folder)
            except ManifestError as error:
                problems.append(f"{manifest}, row {number}: {error}")
                continue
            # The same photo may come twice, with two captions.
            taken[record.id] = taken.get(record.id, 0) + 1
            if taken[record.id] > 1:
                record = Record(**{**record.__dict__, "id": f"{record.id}#{taken[record.id]}"})
            records.append(record)
    if problems and (not drop_missing or not records):
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        hint = "" if drop_missing else "\nRepair the manifest, or leave such rows out with data.drop_missing=true"
        raise ManifestError(
            f"{len(problems)} of {len(problems) + len(records)} manifest rows cannot be used:\n  {shown}{more}{hint}"
        )
    return records, problems


def parse_row(row: Mapping[str, Any], folder: Path) -> Record:
    """One row as a record whose files exist.

    Raises:
        ManifestError: names the column and what was found.
    """
    name = row.get("path")
    if not isinstance(name, str) or not name:
        raise ManifestError(f"path is {name!r}, expected the name of a photo")
    caption = row.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise ManifestError(f"{name}: caption is {caption!r}, expected text")
    box = _box(row, "bbox", name)
    square = _box(row, "square_bbox", name) if row.get("square_bbox") is not None else None
    identity = row.get("identity")
    rule = _rule(row, name)
    return Record(
        id=str(row.get("id") or name),
        path=_existing(folder, name, "path"),
        caption=(caption or "").strip(),
        box=box,
        square=square_box(box, rule.scale) if square is None else square_box(square, 1.0),
        mask=_existing(folder, row["mask_path"], "mask_path") if row.get("mask_path") else None,
        crop=_existing(folder, row["crop_path"], "crop_path") if row.get("crop_path") else None,
        identity=None if identity is None or identity == "" else str(identity),
        photo_hash=_hash(row, "photo_hash", name),
        crop_hash=_hash(row, "crop_hash", name),
        rule=rule,
    )


def _rule(row: Mapping[str, Any], name: str) -> CropRule:
    rule = CropRule(
        *(
            default if row.get(f"crop_{field}") is None else row[f"crop_{field}"]
            for field, default in DEFAULT_RULE._asdict().items()
        )
    )
    try:
        EncoderConfig(crop_scale=rule.scale, crop_border=rule.border, crop_fill=rule.fill)
    except (ValueError, TypeError) as error:
        raise ManifestError(f"{name}: {error}") from error
    return rule


def common_rule(records: Sequence[Record]) -> CropRule:
    """How the crops of all records were made.

    Raises:
        ManifestError: when they were made in several ways, so that no setting of the nodes would fit the adapter.
    """
    counts = Counter(record.rule for record in records)
    if len(counts) > 1:
        listed = ", ".join(
            f"{count} with {rule.scale:g}, {rule.border}, fill {rule.fill:g}" for rule, count in counts.most_common()
        )
        raise ManifestError(
            f"the photos' face crops were made in {len(counts)} ways ({listed}: scale, border and fill), but an "
            "adapter is used with one. Prepare all of them with the same crop.scale and crop.border"
        )
    return next(iter(counts), DEFAULT_RULE)


def fingerprint(records: Sequence[Record]) -> str:
    """Sixteen hex digits over what training takes from the records, in their order; not over where the files lie."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        values = dataclasses.asdict(record)
        values |= {name: values[name] is not None for name in ("mask", "crop")}
        del values["path"]
        digest.update(json.dumps(values, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _existing(folder: Path, name: str, column: str) -> Path:
    path = folder / Path(name).expanduser()
    if not path.is_file():
        raise ManifestError(f"{column} {path}: no such file")
    return path


def _box(row: Mapping[str, Any], column: str, name: str) -> Box:
    value = row.get(column)
    try:
        box = tuple(float(number) for number in value)
    except (TypeError, ValueError):
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
        raise ManifestError(f"{name}: {column} is {value!r}, expected x0, y0, x1, y1 of the face in pixels")
    return box


def _hash(row: Mapping[str, Any], column: str, name: str) -> int | None:
    value = row.get(column)
    if value is None:
        return None
    try:
        return int(value, 16)
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{name}: {column} is {value!r}, expected 16 hexadecimal digits") from error
