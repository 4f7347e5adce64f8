"""Files of adapters: the error when one cannot be used, and writing so that a file is either whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import FeedFaceError


class AdapterFileError(FeedFaceError):
    """The file is not an adapter this version can use; the message says what it is instead."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place at the end, unless an error came first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_readable(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """``safetensors.torch.save_file`` with the usual permissions and the metadata in order: by itself it writes for the
    owner alone, and the metadata in another order each time, so that equal contents would not give equal files.
    """
    save_file(dict(tensors), str(path), metadata=dict(metadata))
    _sort_metadata(path)
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a safetensors file in the order of its keys; the header keeps its length."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # another way of writing a sign could make it longer: then it stays as it is
            file.seek(8)
            file.write(text.ljust(length))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    with replacing(path) as temporary:
        save_readable(tensors, temporary, metadata)
    return path
