"""Small JSON files beside weights, read as a type."""

from __future__ import annotations

import os
from typing import Any

from pydantic import TypeAdapter

from ..errors import FeedFaceError, located, shorten, typed

_LONGEST = 1 << 20  # characters


def read_json(path: str | os.PathLike, kind: Any) -> Any:
    """A file's content as a pydantic model or any other type.

    Raises :class:`FeedFaceError` that begins with the path: no UTF-8, no JSON, more than a megabyte, or another type.
    """
    with located(path):
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_LONGEST + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise FeedFaceError(f"cannot be read as UTF-8 text ({shorten(error)})") from error
        if len(text) > _LONGEST:
            raise FeedFaceError(f"longer than {_LONGEST} characters, no settings of a model")
        return typed(TypeAdapter(kind), text)
