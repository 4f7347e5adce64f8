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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .dataset import DataError

logger = logging.getLogger(__name__)

FORMAT = "feedface-cache-1"
SHARD_BYTES = 256 * 2**20


class CacheError(DataError):
    """A cache that is missing, stale, broken or cannot be written."""


def key_of(*parts: Any) -> str:
    """Thirty-two hexadecimal digits that any change of any part changes."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class FileHashes:
    """Hashes of files' contents; a file whose size and time of change are the same is not read again.

    Args:
        path: JSON file that keeps them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = {}
        try:
            self.known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass  # not there yet, or cut off: the files are read again

    def of(self, file: Path) -> str:
        """The hash of a file.

        Raises:
            CacheError: if it cannot be read.
        """
        name = str(file.resolve())
        try:
            status = file.stat()
            state = [status.st_size, status.st_mtime_ns]
            if name in self.known and self.known[name][:2] == state:
                return self.known[name][2]
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "blake2b") if hasattr(hashlib, "file_digest") else None
                text = digest.hexdigest() if digest else hashlib.blake2b(opened.read()).hexdigest()
        except OSError as error:
            raise CacheError(f"{file}: cannot be read ({error.strerror})") from error
        self.known[name] = [*state, text[:32]]
        return text[:32]

    def save(self) -> None:
        """Write the file in one piece."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(self.known), encoding="utf-8")
        os.replace(partial, self.path)


class FeatureStore:
    """All features of one kind in a folder.

    Args:
        folder: of the cache.
        kind: ``picture``, ``text`` or ``face``.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.places: dict[str, tuple[str, int]] = {}
        self.about: list[dict[str, Any]] = []
        self._handles: dict[str, Any] = {}
        self._waiting: list[tuple[str, Mapping[str, Tensor]]] = []
        self._waiting_bytes = 0
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            logger.warning("%s: not a whole shard, ignored (%s)", path, error)
            return
        if metadata.get("format") != FORMAT:
            logger.warning("%s: of another format, ignored", path)
            return
        self.about.append(json.loads(metadata["about"]))
        for row, key in enumerate(json.loads(metadata["keys"])):
            self.places[key] = (path.name, row)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not there, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self.places]

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of one key, without batch dimension.

        Raises:
            CacheError: a shard that is gone or broken.
        """
        name, row = self.places[key]
        try:
            if name not in self._handles:
                self._handles[name] = safe_open(self.folder / name, "pt")
            handle = self._handles[name]
            return {tensor: handle.get_slice(tensor)[row] for tensor in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CacheError(f"{self.folder / name}: cannot be read ({error}); run trainer.cache again") from error

    def add(self, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep a feature; it is written with the next shard."""
        self._waiting.append((key, {name: tensor.cpu() for name, tensor in tensors.items()}))
        self._waiting_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush(about)

    def flush(self, about: Mapping[str, Any]) -> None:
        """Write what waits as one shard.

        Raises:
            CacheError: if the disk is full or the folder cannot be written.
        """
        if not self._waiting:
            return
        keys = [key for key, _ in self._waiting]
        path = self.folder / f"{self.kind}-{key_of(keys)[:16]}.safetensors"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        names = self._waiting[0][1]
        stacked = {name: torch.stack([row[name] for _, row in self._waiting]).contiguous() for name in names}
        metadata = {"format": FORMAT, "keys": json.dumps(keys), "about": json.dumps(dict(about), sort_keys=True)}
        try:
            save_file(stacked, partial, metadata=metadata)
            partial.chmod(0o644)  # safetensors makes it private, but other users' training may share a cache
            _sync(partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
            why = "the disk is full" if full else str(error)
            raise CacheError(f"{path}: cannot be written: {why}. What was written before is kept") from error
        self._waiting, self._waiting_bytes = [], 0
        self._index(path)

    def unused(self, keys: Iterable[str]) -> list[Path]:
        """Shards none of whose features is among these keys."""
        used = {self.places[key][0] for key in keys if key in self.places}
        return [path for path in sorted(self.folder.glob(f"{self.kind}-*.safetensors")) if path.name not in used]

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in their process; each worker opens its own.
        return {**self.__dict__, "_handles": {}}


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def differences(about: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> list[str]:
    """In which of its settings what is there differs from what is wanted, if no shard agrees in all."""
    if not about or any(all(entry.get(name) == value for name, value in wanted.items()) for entry in about):
        return []
    return [
        f"{name} is {value}, in the cache {about[-1].get(name)}"
        for name, value in wanted.items()
        if about[-1].get(name) != value
    ]
