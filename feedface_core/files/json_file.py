"""Small JSON files beside weights, read as a type."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from pydantic import TypeAdapter

from ..errors import FeedFaceError, located, shorten, typed

_LONGEST = 1 << 20  # characters


def regular_file(path: str | os.PathLike) -> None:
    """Raises ``OSError``, as ``open`` does, for what is missing or no file. A pipe is waited for without end, and a
    device has none."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise OSError(errno.EINVAL, f"is a {kind}, expected a file", os.fspath(path))


def read_json(path: str | os.PathLike, kind: Any) -> Any:
    """A file's content as a pydantic model or any other type.

    Raises :class:`FeedFaceError` that begins with the path: no UTF-8, no JSON, more than a megabyte, or another type.
    """
    with located(path):
        try:
            regular_file(path)
            with open(path, encoding="utf-8") as file:
                text = file.read(_LONGEST + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise FeedFaceError(f"cannot be read as UTF-8 text ({shorten(error)})") from error
        if len(text) > _LONGEST:
            raise FeedFaceError(f"longer than {_LONGEST} characters, no settings of a model")
        return typed(TypeAdapter(kind), text)
