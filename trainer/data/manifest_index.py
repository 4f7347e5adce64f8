"""The index of a manifest: its rows, checked once, in Arrow files that every process opens by memory map.

A start then costs the same for a thousand rows as for millions: nothing is read but what is asked for, and what is
read is shared by all processes of a machine. An index is two files in a folder:

- ``records.arrow``: the fields of each :class:`~trainer.data.manifest.Record`, in the order of the manifest;
- ``people.arrow``: the arrays of :class:`~trainer.data.records.People`; in its metadata what the index was made of.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feedface_core.files.json_file import regular_file

from ..config.fields import as_path, make_folder
from ..errors import TrainerError
from .manifest import CropRule, Record, check_counts, check_rows
from .records import People, Records, fingerprint_line

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

FORMAT = "feedface-manifest-index-2"
"""Changes with what is written, and with what is checked of a row."""
BATCH = 1024
"""Rows read at once."""
_PATHS = ("path", "mask_path", "crop_path")
_BOXES = ("bbox", "square_bbox")
_CACHED = 64


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    box = pa.list_(pa.float64(), 4)
    types = dict.fromkeys(_PATHS, pa.binary()) | dict.fromkeys(_BOXES, box)  # a path may be no text
    types |= {"width": pa.int32(), "height": pa.int32(), "crop_scale": pa.float64(), "crop_fill": pa.float64()}
    types |= {"photo_hash": pa.uint64(), "crop_hash": pa.uint64(), "face_number": pa.int32(), "face_count": pa.int32()}
    types["other_masks"] = pa.list_(pa.binary())
    return pa.schema([(field.name, types.get(field.name, pa.string())) for field in fields(Record)])


def _row(record: Record) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    row["other_masks"] = [os.fsencode(path) for path in record.other_masks]
    return row | {name: None if row[name] is None else os.fsencode(row[name]) for name in _PATHS}


class IndexedRecords(Records):
    """The photos of an index, each read when it is asked for.

    Args:
        folder: of the index.

    Raises:
        TrainerError: a folder that holds no whole index.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self.folder = folder
        try:
            alone = pa.ipc.IpcReadOptions(use_threads=False)  # workers are forked from this process
            for name in ("people.arrow", "records.arrow"):
                regular_file(folder / name)
            self._people = pa.ipc.open_file(pa.memory_map(str(folder / "people.arrow")), options=alone)
            self.header: dict[str, Any] = json.loads((self._people.schema.metadata or {})[b"feedface"])
            self._rows = pa.ipc.open_file(pa.memory_map(str(folder / "records.arrow")), options=alone)
            if self.header["format"] != FORMAT or self._rows.schema != _schema():
                raise ValueError("of another format")
            if os.path.getsize(folder / "records.arrow") != self.header["bytes"]:
                raise ValueError("records.arrow belongs to another index")
            self._count = int(self.header["count"])
            self.dropped, self.dropped_count = self.header["dropped"], self.header["dropped_count"]
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise TrainerError(f"{folder}: not a whole index of a manifest ({str(error)[:200]})") from error
        self._batch = lru_cache(_CACHED)(self._rows.get_batch)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        import pyarrow as pa

        try:
            row = self._batch(number // BATCH).slice(number % BATCH, 1)
            row.validate(full=True)  # what a damaged disk gives must not be followed as an address
            (values,) = row.to_pylist()
            values |= {name: None if values[name] is None else Path(os.fsdecode(values[name])) for name in _PATHS}
            values["other_masks"] = tuple(Path(os.fsdecode(path)) for path in values["other_masks"])
            return Record(**values)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise TrainerError(
                f"{self.folder}: row {number + 1} of the index is damaged ({str(error)[:200]}). Delete the folder and "
                "start again: it is made anew from the manifest"
            ) from error

    def photo_sizes(self) -> np.ndarray:
        from pyarrow import compute

        parts = []
        for number in range(self._rows.num_record_batches):
            batch = self._rows.get_batch(number)
            columns = [compute.fill_null(batch.column(name), 0).to_numpy() for name in ("width", "height")]
            parts.append(np.stack(columns, 1).astype(np.int64))
        return np.concatenate([np.zeros((0, 2), np.int64), *parts])

    @cached_property
    def people(self) -> People:
        arrays = {}
        for part in range(self._people.num_record_batches):
            batch = self._people.get_batch(part)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                size = len(self) if name in ("start", "stop") else self.header["known"]
                arrays[name] = column.to_numpy(zero_copy_only=True)[:size]
        return People(**arrays)

    @property
    def fingerprint(self) -> str:
        return self.header["fingerprint"]

    @property
    def rules(self) -> Mapping[CropRule, int]:
        return {CropRule(*rule): count for rule, count in self.header["rules"]}

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedRecords, (self.folder,)  # a worker that is spawned opens the files itself


def open_manifest(
    manifests: str | Path | Sequence[str | Path], root: str | Path | None, drop_missing: bool, folders: Sequence[Path]
) -> IndexedRecords:
    """The photos of one or several manifests, by their index; it is made where it is missing, stale or damaged.

    One process makes it, the others on the same disk wait for it.

    Args:
        manifests, root, drop_missing: as of :func:`~trainer.data.manifest.read_manifest`.
        folders: where an index is looked for; the first one that can be written gets a new one.

    Raises:
        TrainerError: as :func:`~trainer.data.manifest.read_manifest`, or none of the folders can be written.
    """
    from filelock import FileLock

    paths = [manifests] if isinstance(manifests, (str, Path)) else list(manifests)
    source = _source(paths, root, drop_missing)
    name = "index-" + blake2b(json.dumps([source["manifests"], source["root"], drop_missing]).encode()).hexdigest()[:16]
    for folder in folders:
        if (found := _find(folder / name, source)) is not None:
            return found
    folder = _writable(folders)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire()
    except OSError as error:
        raise TrainerError(f"{lock.lock_file}: the index cannot be locked ({error.strerror})") from error
    with lock:
        lock.release()  # of the two times that it is held by now
        found = _find(folder / name, source)  # made while this process waited
        if found is None:
            found = _make(folder / name, source, paths, root, drop_missing)
    return found


def _source(paths: Sequence[str | Path], root: str | Path | None, drop_missing: bool) -> dict[str, Any]:
    """What an index is made of: while this stays the same, so does the index."""
    manifests, states = [], []
    for path in paths:
        path = as_path(path, "manifest")
        manifests.append([str(path), os.path.abspath(path)])
        status = os.stat(path) if os.path.isfile(path) else None
        states.append(status and [status.st_size, status.st_mtime_ns])
    root = None if root is None else str(as_path(root, "data.root"))
    where = root and os.path.abspath(root)
    return {"manifests": manifests, "states": states, "root": [root, where], "drop_missing": drop_missing}


def _find(folder: Path, source: Mapping[str, Any]) -> IndexedRecords | None:
    if not folder.is_dir():
        return None
    try:
        found = IndexedRecords(folder)
    except TrainerError as error:
        logger.warning("%s; it is made anew", error)
        return None
    return found if found.header.get("source") == source else None


def _writable(folders: Sequence[Path]) -> Path:
    for folder in folders[:-1]:
        if os.path.isdir(folder) and os.access(folder, os.W_OK):
            return folder
    return make_folder(folders[-1], "folder of the manifest's index")


def _make(
    folder: Path, source: Mapping[str, Any], paths: Sequence[str | Path], root: str | Path | None, drop_missing: bool
) -> IndexedRecords:
    from tqdm import tqdm

    rows = tqdm(check_rows(paths, root), "manifest", unit="row", delay=5, disable=None)
    return write_index(folder, source, rows, drop_missing)


def write_index(
    folder: Path, source: Mapping[str, Any], rows: Iterable[Record | str], drop_missing: bool
) -> IndexedRecords:
    """Write an index in one piece; the arrays of the people come from what was written.

    Args:
        folder: of the index.
        source: what it is made of, JSON values.
        rows: records, and lines that say why a row is none.
        drop_missing: whether there may be such lines.

    Raises:
        TrainerError: rows that cannot be used, or a folder that cannot be written.
    """
    import pyarrow as pa

    partial = folder.with_name(f".{folder.name}.tmp")
    digest, rules, count = blake2b(digest_size=8), Counter(), 0
    dropped, dropped_count, waiting = [], 0, []
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        records = partial / "records.arrow"
        with pa.OSFile(str(records), "wb") as file, pa.ipc.new_file(file, _schema()) as writer:
            for row in rows:
                if isinstance(row, str):
                    dropped_count += 1
                    dropped += [row] if dropped_count <= 5 else []
                    continue
                digest.update(fingerprint_line(row))
                rules[row.rule] += 1
                count += 1
                waiting.append(_row(row))
                if len(waiting) == BATCH:
                    writer.write(pa.RecordBatch.from_pylist(waiting, _schema()))
                    waiting = []
            check_counts(count, dropped, dropped_count, drop_missing)
            if waiting:
                writer.write(pa.RecordBatch.from_pylist(waiting, _schema()))
        header = {"format": FORMAT, "source": source, "count": count, "bytes": os.path.getsize(records)}
        header |= {"dropped": dropped, "dropped_count": dropped_count, "fingerprint": digest.hexdigest()}
        header["rules"] = list(rules.items())
        _write_people(partial, header)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except (pa.ArrowException, OSError) as error:
        raise TrainerError(f"{folder}: the index of the manifest cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return IndexedRecords(folder)


def _write_people(folder: Path, header: dict[str, Any]) -> None:
    import pyarrow as pa

    with pa.memory_map(str(folder / "records.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
        people = People.of(table.select(["identity", "id", "path", "photo_hash", "crop_hash"]))
        del table
    header["known"] = len(people.order)
    arrays = people.arrays()
    rows = max(len(own) for own in arrays.values())
    padded = {name: np.concatenate([own, np.zeros(rows - len(own), own.dtype)]) for name, own in arrays.items()}
    batch = pa.record_batch(padded)
    schema = batch.schema.with_metadata({"feedface": json.dumps(header)})
    with pa.OSFile(str(folder / "people.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
