"""Shards: records and features that training reads instead of photos, on a disk or by http(s) or s3.

A set of shards is a folder::

    header.json                    models, tokenizer, crop and code they were made with; written last
    index/records.arrow, people.arrow, places.arrow
    shard-000000.safetensors …     the features of some hundred photos each, a person's photos side by side

``places.arrow`` says for each photo which shard has it and in which rows. A shard is an ordinary safetensors file; for
each of its tensors it has a second one, ``crc.<name>``, with a check sum a row. A row is a range of bytes, so that any
sample can be read from anywhere without the others: the order of the samples is that of training on photos.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedface_core.files.json_file import regular_file

from ..errors import TrainerError
from .manifest_index import IndexedRecords
from .references import Reference

FORMAT = "feedface-shards-1"
HEADER, INDEX = "header.json", ("records.arrow", "people.arrow", "places.arrow")
PLACES = ("shard", "row", "text", "face")
"""Columns of ``places.arrow``: a photo's shard, its place there, the row of its caption, the first row of its face."""
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_HEAD_BYTES = 2**16
_TRIES = 3


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:06d}.safetensors"


class DamagedShard(TrainerError):
    """A shard, or a row of it, that cannot be read."""

    def __init__(self, shard: str, why: str) -> None:
        super().__init__(f"{shard}: {why}")
        self.shard = shard


class Folder:
    """A folder by its path or address, as fsspec knows them; its files are read in ranges.

    Args:
        address: ``dataset/shards``, ``https://…``, ``s3://bucket/…``.

    Raises:
        TrainerError: an address of a kind that fsspec does not know, or whose package is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = os.path.expanduser(address).rstrip("/")
        self._system: tuple[int, Any, str] | None = None
        self._files()

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return "://" not in self.address

    def _files(self, name: str = "") -> tuple[Any, str]:
        if name and self.is_local:
            regular_file(os.path.join(self.address, name))
        if self._system is None or self._system[0] != os.getpid():  # its threads do not live on in a forked worker
            from fsspec.core import url_to_fs

            try:
                self._system = os.getpid(), *url_to_fs(self.address)
            except (ImportError, ValueError) as error:
                raise TrainerError(f"data.shards {self.address}: {error}; pip install 'feedface[scale]'") from error
        return self._system[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_system": None}

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Ranges of bytes of a file; shorter where it ends. Tried again where the network fails."""
        files, root = self._files(name)
        starts, stops = [first for first, _ in ranges], [last for _, last in ranges]
        for attempt in range(_TRIES):
            try:
                parts = files.cat_ranges([f"{root}/{name}"] * len(ranges), starts, stops, on_error="raise")
                break
            except Exception as error:  # of a dozen libraries below fsspec
                if self.is_local or attempt == _TRIES - 1 or isinstance(error, FileNotFoundError):
                    raise
                time.sleep(0.2 * 4**attempt)
        # A server that knows no ranges sends the whole file.
        pairs = zip(parts, ranges, strict=True)
        return [part if len(part) <= last - first else part[first:last] for part, (first, last) in pairs]

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to this machine."""
        files, root = self._files()
        files.get_file(f"{root}/{name}", str(target))

    def content(self, name: str) -> bytes:
        """All of a small file."""
        files, root = self._files(name)
        return files.cat_file(f"{root}/{name}")


class Shard:
    """One shard, of which only the beginning is read here.

    Raises:
        DamagedShard: if that is not the beginning of a shard.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        (head,) = self._read([(0, _HEAD_BYTES)])
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > 2**27:
            raise DamagedShard(name, "not the beginning of a safetensors file")
        self._start = 8 + length
        head = self._up_to(head, self._start)
        try:
            self.tensors: dict[str, Any] = json.loads(head[8 : self._start])
            self.metadata: dict[str, str] = self.tensors.pop("__metadata__")
            if self.metadata["format"] != FORMAT:
                raise ValueError("of another format")
            # The check sums are the widest numbers, which safetensors puts first: one request brings them along.
            places = {key[4:]: own["data_offsets"] for key, own in self.tensors.items() if key.startswith("crc.")}
            head = self._up_to(head, self._start + min(max(last for _, last in places.values()), 2**24))
            self._checks = {
                key: np.frombuffer(head[self._start + first : self._start + last], "<i8")
                for key, (first, last) in places.items()
            }
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedShard(name, f"not a shard ({error})") from error

    def _up_to(self, head: bytes, end: int) -> bytes:
        return head if len(head) >= end else head + self._read([(len(head), end)])[0]

    def _read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        try:
            return self.folder.read(self.name, ranges)
        except Exception as error:
            raise DamagedShard(self.name, f"cannot be read ({type(error).__name__}: {str(error)[:200]})") from error

    def rows(self, wanted: Sequence[tuple[str, int]]) -> list[Tensor]:
        """Rows of tensors, by name and number.

        Raises:
            DamagedShard: a row that is not there, or whose check sum is another.
        """
        ranges, forms = [], []
        for name, row in wanted:
            try:
                entry = self.tensors[name]
                kind, (count, *shape), (first, last) = TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                size = (last - first) // count
                if not 0 <= row < count == len(self._checks[name]) or size * count != last - first:
                    raise ValueError(f"row {row} of {count}")
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise DamagedShard(self.name, f"has no row {row} of {name} ({error})") from error
            start = self._start + first + row * size
            ranges.append((start, start + size))
            forms.append((kind, shape))
        found, parts = [], zip(self._read(ranges), wanted, ranges, forms, strict=True)
        for data, (name, row), (first, last), (kind, shape) in parts:
            if len(data) != last - first or zlib.crc32(data) != self._checks[name][row]:
                raise DamagedShard(self.name, f"row {row} of {name} is damaged")
            found.append(torch.frombuffer(bytearray(data), dtype=kind).reshape(shape))
        return found


class ShardedFeatures:
    """The features of a run from shards, see :class:`~trainer.data.dataset.CachedFeatures`.

    Args:
        folder: of the shards.
        index: the folder on this machine with ``places.arrow``.
        header: what :func:`read_header` returned.
    """

    def __init__(self, folder: Folder, index: Path, header: Mapping[str, Any]) -> None:
        import pyarrow as pa

        self.folder, self.index, self.header = folder, index, dict(header)
        try:
            regular_file(index / "places.arrow")
            batch = pa.ipc.open_file(pa.memory_map(str(index / "places.arrow"))).get_batch(0)
            self._places = [batch.column(name).to_numpy(zero_copy_only=True) for name in PLACES]
            if kinds := {str(column.dtype) for column in self._places} - {"int64", "int32"}:
                raise KeyError(f"a column of {kinds}, expected whole numbers")
        except (pa.ArrowException, OSError, KeyError) as error:
            raise TrainerError(f"{index / 'places.arrow'}: damaged ({error}); copy or make the shards again") from error
        self._shard = lru_cache(256)(self._open)

    def _open(self, number: int) -> Shard:
        return Shard(self.folder, shard_name(number))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardedFeatures, (self.folder, self.index, self.header)

    def sample(
        self, index: int, caption: str, flip: bool, references: Sequence[Reference], background: bool = False
    ) -> dict[str, Any]:
        """The features of one visit of a photo, read from one shard, or two where a person's photos lie in two.

        Raises:
            DamagedShard: names the shard.
        """
        number, place, text, _ = (int(column[index]) for column in self._places)
        texts = self.header["texts"]
        picture = place * (2 if self.header["made with"]["drawn"]["flip"] else 1) + flip
        beside, asked = [("background.hidden", picture)] if background else [], []
        own = [("moments", picture), ("mask", picture), *((name, text if caption else 0) for name in texts), *beside]
        wanted = {number: own}
        for one in references:
            shard, face = int(self._places[0][one.index]), int(self._places[3][one.index])
            rows = wanted.setdefault(shard, [])
            asked.append((shard, len(rows)))
            rows.append(("hidden", face + (int(one.flip) if one.variant is None else one.variant)))
        found = {shard: self._shard(shard).rows(rows) for shard, rows in wanted.items()}
        moments, mask, *states = found[number]
        sample = {"moments": moments.float(), "mask": mask.float()}
        sample["hidden"] = [found[shard][row] for shard, row in asked]
        sample["text"] = {name.removeprefix("text."): row for name, row in zip(texts, states, strict=False)}
        return sample | ({"background_hidden": states[len(texts)]} if background else {})


def read_header(folder: Folder) -> dict[str, Any]:
    """What a set of shards says of itself.

    Raises:
        TrainerError: there is none, or it cannot be read.
    """
    try:
        header = json.loads(folder.content(HEADER))
        if header["format"] != FORMAT:
            raise ValueError(f"of the format {header['format']}, expected {FORMAT}")
        for kind in ("picture", "text", "face", "drawn"):
            dict(header["made with"][kind])
        list(map(str, header["texts"]))
    except FileNotFoundError as error:
        raise TrainerError(
            f"data.shards {folder.address}: holds no {HEADER}. Make the shards with python -m trainer.cache CONFIG "
            "--shards FOLDER, to its end"
        ) from error
    except Exception as error:  # of JSON, or of a library below fsspec
        raise TrainerError(f"data.shards {folder.address}: {HEADER} cannot be read: {str(error)[:300]}") from error
    return header


def open_records(address: str, copies: Path) -> IndexedRecords:
    """The records of a set of shards. An index elsewhere is copied once, by one process of a machine.

    Args:
        address: of the shards.
        copies: folder for the copy.

    Raises:
        TrainerError: no shards there, or an index that is damaged.
    """
    from filelock import FileLock

    folder = Folder(address)
    header = read_header(folder)
    if folder.is_local:
        return IndexedRecords(Path(folder.address) / "index")
    copies.mkdir(parents=True, exist_ok=True)
    target = copies / f"shards-{blake2b(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]}"
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            partial = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                for name in INDEX:
                    folder.fetch(f"index/{name}", partial / name)
                IndexedRecords(partial)
                partial.rename(target)
            except TrainerError:
                raise
            except Exception as error:
                raise TrainerError(f"data.shards {address}: its index cannot be copied: {str(error)[:300]}") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return IndexedRecords(target)
