"""The photos of a run as a sequence, and which of them show the same person: arrays, not an object for each.

:class:`Records` holds those of a list; :class:`~trainer.data.manifest_index.IndexedRecords` reads each from a file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TrainerError
from .manifest import DEFAULT_RULE, CropRule, Record

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class People:
    """Who is in which of N photos, of which P show somebody who is known.

    Args:
        start, stop: ``(N,)`` int64: where the photos of each photo's person stand in the arrays below; the same number
            twice for a photo of nobody known.
        order: ``(P,)`` int64, the photos, person by person and by id.
        file: ``(P,)`` int64, the same for photos of one file.
        photo_hash, crop_hash: ``(P,)`` uint64, perceptual hashes; 0 where there is none.
        has_photo_hash, has_crop_hash: ``(P,)`` uint8, whether there is one.
    """

    start: np.ndarray
    stop: np.ndarray
    order: np.ndarray
    file: np.ndarray
    photo_hash: np.ndarray
    crop_hash: np.ndarray
    has_photo_hash: np.ndarray
    has_crop_hash: np.ndarray

    @classmethod
    def of(cls, table: pyarrow.Table) -> People:
        """The people of a table with the columns identity, id, path, photo_hash and crop_hash."""
        from pyarrow import compute

        known = compute.is_valid(table["identity"]).combine_chunks().to_numpy(zero_copy_only=False)
        # Nulls come last.
        keys = [("identity", "ascending"), ("id", "ascending")]
        order = compute.sort_indices(table, sort_keys=keys).to_numpy()
        order = order[: int(known.sum())].astype(np.int64)
        person = _codes(table["identity"])[order]
        # Where another person begins, and how many photos each of them has.
        starts = np.flatnonzero(np.diff(person, prepend=-1))
        counts = np.diff(starts, append=len(order))
        start, stop = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
        start[order] = np.repeat(starts, counts)
        stop[order] = np.repeat(starts + counts, counts)
        arrays = {"start": start, "stop": stop, "order": order, "file": _codes(table["path"])[order]}
        for name in ("photo_hash", "crop_hash"):
            arrays[f"has_{name}"] = compute.is_valid(table[name]).to_numpy()[order].astype(np.uint8)
            arrays[name] = compute.fill_null(table[name], 0).to_numpy()[order]
        return cls(**arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def others(self, index: int, distance: int) -> list[int]:
        """Other photos of the same person that are not the same picture, by id.

        Args:
            index: of the photo.
            distance: pictures whose photos or crops have hashes that differ in at most so many bits are the same.
        """
        place = slice(int(self.start[index]), int(self.stop[index]))
        photos = self.order[place]
        if len(photos) < 2:
            return []
        own = np.flatnonzero(photos == index)
        if len(own) != 1 or photos.min() < 0 or photos.max() >= len(self.start):
            raise TrainerError(f"the manifest's index is damaged: photo {index} is not among its person's. Delete it")
        file = self.file[place]
        same = file == file[own]
        for name in ("photo_hash", "crop_hash"):
            value, there = getattr(self, name)[place], getattr(self, f"has_{name}")[place]
            if there[own]:
                same = same | ((there == 1) & (_bits(value ^ value[own]) <= distance))
        return photos[~same].tolist()


def _codes(column: pyarrow.ChunkedArray) -> np.ndarray:
    """A number for each value, ``(N,)`` int64; −1 for null."""
    from pyarrow import compute

    encoded = column.dictionary_encode().unify_dictionaries()
    parts = [compute.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _bits(values: np.ndarray) -> np.ndarray:
    """How many bits of each 64-bit number are set."""
    return np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8), axis=1).sum(1)


class Records(Sequence[Record]):
    """The photos of a run.

    Args:
        records: all of them.

    Attributes:
        dropped: the first rows of the manifest that were left out, a line each.
        dropped_count: how many were.
    """

    dropped: Sequence[str] = ()
    dropped_count: int = 0

    def __init__(self, records: Iterable[Record]) -> None:
        self._list = list(records)

    @staticmethod
    def of(records: Sequence[Record]) -> Records:
        """The same photos, as this class."""
        return records if isinstance(records, Records) else Records(records)

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, index: Any) -> Any:
        return self._list[index]

    def photo_sizes(self) -> np.ndarray:
        """Width and height of each photo as the manifest says them, ``(N, 2)`` int64; 0 where it does not."""
        sizes = [(record.width or 0, record.height or 0) for record in self]
        return np.array(sizes, np.int64).reshape(-1, 2)

    def faces_of(self, index: int) -> list[int]:
        """The records of all people in a photo, that of ``index`` first; those that may teach beside it."""
        record = self[index]
        first = index - record.face_number
        return [index, *(other for other in range(first, first + record.face_count) if other != index)]

    @cached_property
    def people(self) -> People:
        """Who is in which photo."""
        import pyarrow

        columns = {
            "identity": pyarrow.array([record.identity for record in self], pyarrow.string()),
            "id": pyarrow.array([record.id for record in self], pyarrow.string()),
            "path": pyarrow.array([str(record.path) for record in self], pyarrow.string()),
            "photo_hash": pyarrow.array([record.photo_hash for record in self], pyarrow.uint64()),
            "crop_hash": pyarrow.array([record.crop_hash for record in self], pyarrow.uint64()),
        }
        return People.of(pyarrow.table(columns))

    @cached_property
    def fingerprint(self) -> str:
        """See :func:`fingerprint`."""
        return fingerprint(self)

    @cached_property
    def rules(self) -> Mapping[CropRule, int]:
        """How face boxes became crops, and of how many photos each."""
        return Counter(record.rule for record in self)


def common_rule(records: Sequence[Record]) -> CropRule:
    """How the crops of all records were made.

    Raises:
        TrainerError: when they were made in several ways, so that no setting of the nodes would fit the adapter.
    """
    counts = Counter(Records.of(records).rules)
    if len(counts) > 1:
        ways = [f"{n} with {rule.scale:g}, {rule.border}, fill {rule.fill:g}" for rule, n in counts.most_common()]
        raise TrainerError(
            f"the photos' face crops were made in {len(ways)} ways ({', '.join(ways)}: scale, border and fill), but "
            "an adapter is used with one. Prepare all of them with the same crop.scale and crop.border"
        )
    return next(iter(counts), DEFAULT_RULE)


def fingerprint(records: Iterable[Record]) -> str:
    """Sixteen hex digits over what training takes from the records, in their order; not over where the files lie."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        digest.update(fingerprint_line(record))
    return digest.hexdigest()


def fingerprint_line(record: Record) -> bytes:
    """What one record adds to :func:`fingerprint`."""
    values = {name: getattr(record, name) for name in ("id", "caption", "square", "identity", "rule")}
    values |= {"box": record.bbox, "photo_hash": record.photo_hash, "crop_hash": record.crop_hash}
    values |= {"mask": record.mask_path is not None, "crop": record.crop_path is not None}
    if record.face_count > 1:
        values["faces"] = [record.face_number, record.face_count, len(record.other_masks)]
    return json.dumps(values, sort_keys=True).encode() + b"\n"
