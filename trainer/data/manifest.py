"""The manifest: one row a photo, in JSONL or Parquet, and the same rows checked (:mod:`trainer.data.record`).

Rows of the released format (path, caption, width, height, bbox, square_bbox, mask_path) are read as well.
Further columns are kept out of training.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from feedface_core.errors import shorten
from feedface_core.files.atomic import replacing
from feedface_core.files.json_file import regular_file

from ..config.fields import as_path
from ..errors import TrainerError, first_of
from .jsonl import read_objects
from .record import (  # the names under which others know them
    DEFAULT_RULE,
    Box,
    Coordinates,
    CropRule,
    Record,
    parse_row,
    parse_rows,
)

__all__ = ["DEFAULT_RULE", "Box", "Coordinates", "CropRule", "Record", "parse_row"]


def each_row(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL or Parquet manifest as plain dicts, one after the other.

    Raises:
        TrainerError: a file that is missing, empty, of another kind, or not what its name says.
    """
    path, found = as_path(path, "manifest"), False
    if not os.path.exists(path):
        raise TrainerError(f"manifest {path}: no such file; python -m trainer.prepare makes one")
    rows = _parquet_rows(path) if _is_parquet(path) else read_objects(path)
    try:
        regular_file(path)
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
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the column {shorten(twice[0])} is there twice")
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
                records = parse_rows(row, folder)
            except TrainerError as error:
                yield f"{manifest}, row {number}, {shorten(row.get('path'))}: {error}"
                continue
            for record in records:
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
