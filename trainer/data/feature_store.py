"""Features on disk, addressed by what they were made of.

A key is a hash of everything a feature depends on: model weights, contents of the photo, box, resolution. So nothing
can be stale: after any change the key is another one, and the feature is simply not there. A shard is one safetensors
file with the keys of its rows in its metadata; it appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from feedface_core.files.atomic import replacing
from feedface_core.files.json_file import regular_file

from ..errors import TrainerError

logger = logging.getLogger(__name__)

FORMAT = "feedface-cache-1"
SHARD_BYTES = 256 * 2**20


HashOf = Callable[["Path | None"], "str | None"]


def key_of(*parts: Any) -> str:
    """Thirty-two hexadecimal digits that any change of any part changes."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


_KNOWN = TypeAdapter(dict[str, tuple[int, int, Annotated[str, Field(pattern="^[0-9a-f]{32}$")]]])
_KEYS = TypeAdapter(list[Annotated[str, Field(strict=True, min_length=1)]])
_HEADER = (_KEYS, "keys"), (TypeAdapter(dict[str, Any]), "about")


class FileHashes:
    """Hashes of files' contents, kept in a JSON file: one whose size and time of change are the same is not read again.

    Args:
        path: the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, tuple[int, int, str]] = {}
        try:
            regular_file(path)
            self.known = _KNOWN.validate_json(path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("%s: damaged, so the files are read again (%s)", path, str(error)[:200])

    def of(self, file: Path) -> str:
        """The hash of a file, 32 hexadecimal digits. Raises ``TrainerError`` if it cannot be read."""
        try:
            name, status = str(file.resolve()), file.stat()
            state = status.st_size, status.st_mtime_ns
            regular_file(file)
            if self.known.get(name, ())[:2] != state:
                self.known[name] = (*state, hashlib.blake2b(file.read_bytes()).hexdigest()[:32])
        except (OSError, ValueError, RuntimeError) as error:
            raise TrainerError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        return self.known[name][2]

    def asked_once(self) -> HashOf:
        """:meth:`of`, or None for None; each file is looked at once, however often it is asked for."""
        return cache(lambda file: None if file is None else self.of(file))

    def save(self) -> None:
        """Write the file in one piece. Raises ``TrainerError`` if the folder cannot be written."""
        try:
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(self.known), encoding="utf-8")
        except OSError as error:
            raise TrainerError(f"{self.path}: cannot be written: {error.strerror}") from error


class FeatureStore:
    """The features of one kind that a run needs, as far as they are in a folder.

    Args:
        folder: of the cache.
        kind: ``picture``, ``text`` or ``face``; begins the names of the shards.
        settings: what all of these features depend on; the shards say it.
        keys: item → key; an item says what a feature is of.
    """

    def __init__(self, folder: Path, kind: str, settings: Mapping[str, Any], keys: Mapping[Any, str]) -> None:
        self.folder, self.kind, self.settings, self.keys = folder, kind, dict(settings), keys
        self._files: dict[str, Any] = {}
        self._pending: dict[str, Mapping[str, Tensor]] = {}
        self.read_index()

    def read_index(self) -> None:
        """Look up what is in the folder by now."""
        self._rows: dict[str, tuple[str, int]] = {}
        self._found: list[dict[str, Any]] = []
        self.shards = sorted(self.folder.glob(f"{self.kind}-*.safetensors"))
        for path in self.shards:
            self._read_index_of(path)

    def _read_index_of(self, path: Path) -> None:
        try:
            regular_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                rows = {name: file.get_slice(name).get_shape()[:1] for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                logger.warning("%s: of another format, ignored", path)
                return
            keys, about = (adapter.validate_json(metadata.get(name, "")) for adapter, name in _HEADER)
            if len(set(keys)) < len(keys) or any(count != [len(keys)] for count in rows.values()):
                raise ValueError(f"{len(set(keys))} keys for rows of {rows}")
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s: not a whole shard, ignored (%s)", path, str(error)[:200])
            return
        self._found.append(about)
        self._rows |= {key: (path.name, row) for row, key in enumerate(keys)}

    def name(self, item: Any) -> str:
        """What messages call an item."""
        return str(item)

    def missing(self) -> dict[str, Any]:
        """Key → item of the features that are not there."""
        return {key: item for item, key in self.keys.items() if key not in self._rows}

    def get(self, item: Any) -> dict[str, Tensor]:
        """The tensors of one item, without batch dimension.

        Raises:
            TrainerError: a shard that is gone or broken.
        """
        name, row = self._rows[self.keys[item]]
        try:
            if name not in self._files:
                regular_file(self.folder / name)
                self._files[name] = safe_open(self.folder / name, "pt")
            file = self._files[name]
            tensors = {tensor: file.get_slice(tensor)[row] for tensor in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, IndexError) as error:
            raise TrainerError(f"{self.folder / name}: cannot be read ({error}); run trainer.cache again") from error
        if not _finite(tensors):
            raise TrainerError(
                f"{self.folder / name}: the feature of {self.name(item)} holds NaN or infinity. Delete the file and "
                "run trainer.cache again"
            )
        return tensors

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a feature; it is written with the next shard.

        Raises:
            TrainerError: NaN or infinity, or as :meth:`flush`.
        """
        self.require_finite(key, tensors)
        self._pending[key] = {name: tensor.cpu() for name, tensor in tensors.items()}
        row_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if row_bytes * len(self._pending) >= SHARD_BYTES:  # all rows are of about one size
            self.flush()

    def require_finite(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises ``TrainerError`` for NaN or infinity."""
        if not _finite(tensors):
            name = next((self.name(item) for item, own in self.keys.items() if own == key), key)
            raise TrainerError(
                f"{self.kind} feature of {name}: the frozen model gave NaN or infinity. The photo was read: see to the "
                "model's weights and number format"
            )

    def flush(self) -> None:
        """Write what waits, as one shard for rows of the same shapes.

        Raises:
            TrainerError: if the disk is full or the folder cannot be written.
        """
        alike: dict[tuple, dict[str, Mapping[str, Tensor]]] = {}
        for key, row in self._pending.items():
            alike.setdefault(tuple((name, one.shape) for name, one in row.items()), {})[key] = row
        for group in alike.values():
            self._write(group)
        self._pending = {}

    def _write(self, pending: Mapping[str, Mapping[str, Tensor]]) -> None:
        keys, rows = list(pending), list(pending.values())
        path = self.folder / f"{self.kind}-{key_of(keys)[:16]}.safetensors"
        about = json.dumps(self.settings, sort_keys=True)
        try:
            with replacing(path) as partial:
                stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
                save_file(stacked, partial, {"format": FORMAT, "keys": json.dumps(keys), "about": about})
                partial.chmod(0o644)  # safetensors makes it private, but other users' training may share a cache
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError, RuntimeError) as error:  # the last for rows of several number formats
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
            why = "the disk is full" if full else str(error)
            raise TrainerError(f"{path}: cannot be written: {why}. What was written before is kept") from error

    def unused(self) -> list[Path]:
        """Shards none of whose features is among the keys."""
        used = {self._rows[key][0] for key in self.keys.values() if key in self._rows}
        return [path for path in self.shards if path.name not in used]

    def differences(self) -> list[str]:
        """In what the settings differ from those of the last shard, if no shard has the same."""
        if not self._found or any(self.settings.items() <= found.items() for found in self._found):
            return []
        last = self._found[-1]
        changed = {name: value for name, value in self.settings.items() if last.get(name) != value}
        return [f"{name} is {value}, in the cache {last.get(name)}" for name, value in changed.items()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files stay in their process; each worker opens its own


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())
