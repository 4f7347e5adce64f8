"""Lines of JSON. A line ends with a line feed and nowhere else: U+2028, U+2029, U+0085 and the like, at which
``str.splitlines`` breaks, are ordinary characters of a caption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from feedface_core.errors import shorten
from feedface_core.files.atomic import replacing
from feedface_core.files.json_file import regular_file


def read_lines(path: Path, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """The lines that hold something, with their numbers from 1; a byte order mark is skipped."""
    regular_file(path)
    with open(path, encoding="utf-8-sig", errors=errors) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"not text in UTF-8 ({error})") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shorten(next(name for name in names if names.count(name) > 1))} is there twice")
    return values


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file. Raises ``ValueError`` with the number of a line that is none."""
    for number, line in read_lines(path):
        try:
            value = json.loads(line, object_pairs_hook=_without_repeats)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: not JSON ({error})") from error
        except (ValueError, RecursionError) as error:  # a key twice; endless digits or levels
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"line {number}: expected an object, found {shorten(line)}")
        yield value


def keep_lines(path: Path, wanted: Callable[[Any], bool]) -> list[Any]:
    """The values of a log's lines that are wanted; the other lines are deleted from the file, in one piece.

    A line that is no JSON, as a crash leaves it at the end, goes as well. Afterwards the file can be appended to. A
    file that is not there has none.
    """
    kept, values, count = [], [], 0
    for _, line in read_lines(path, errors="replace") if path.exists() else ():
        count += 1
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if wanted(value):
            kept.append(line)
            values.append(value)
    if len(kept) < count or (kept and not path.read_bytes().endswith(b"\n")):
        with replacing(path) as partial:
            partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return values
