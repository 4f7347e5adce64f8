"""Records of JSON, JSONL and CSV files, each with the place where it stands."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FeedFaceError, shorten

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_SURROGATE = re.compile(r"\\u[dD]")  # what may be half a sign, as JSON writes it


@dataclass(frozen=True)
class Where:
    """A file, and the row or entry in it, if it has several."""

    file: Path
    row: str = ""

    def __str__(self) -> str:
        return f"{self.file}, {self.row}" if self.row else str(self.file)


def read_records(path: Path) -> Iterator[tuple[Where, Any]]:
    """Each record of a file, or of the files in a folder.

    Raises:
        FeedFaceError: not there, of another kind, broken, or empty.
    """
    if os.path.isdir(path):  # a path that is too long for the system is none, and no error
        try:
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in KINDS)
        except OSError as problem:
            raise FeedFaceError(f"{path}: cannot be read: {problem.strerror}") from None
        if not files:
            raise FeedFaceError(f"{path}: no {', '.join(KINDS)} file in this folder")
        for file in files:
            yield from read_records(file)
        return
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise FeedFaceError(f"{str(path)[:400]}: expected a file that ends in {', '.join(KINDS)}, or a folder of them")
    records = csv_records if kind in (".csv", ".tsv") else json_records if kind == ".json" else jsonl_records
    count = 0
    for record in records(path, read_text(path)):
        count += 1
        yield record
    if not count:
        raise FeedFaceError(f"{path}: nothing in it")


def read_text(path: Path) -> str:
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe waits for ever, and a device has no end
            raise FeedFaceError(f"{path}: not a file that can be read to its end: expected a text file")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FeedFaceError(f"{path}: there is no such file") from None
    except OSError as problem:
        raise FeedFaceError(f"{str(path)[:400]}: cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        raise FeedFaceError(f"{path}, line {line}: not UTF-8: save it as UTF-8 (in a spreadsheet: CSV UTF-8)") from None


def parse_json(text: str, where: Where) -> Any:
    """A JSON text. Raises ``FeedFaceError``, for ``NaN``, ``Infinity``, a name twice in one object and half a sign
    (a lone surrogate, which no file in UTF-8 can hold) as well."""

    def constant(name: str) -> None:
        raise FeedFaceError(f"{where}: {name} is no JSON number: give a finite one, or leave it out")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = first_repeated([name for name, _ in pairs])
        if twice is not None:
            raise FeedFaceError(f"{where}: {shorten(twice)} is there twice in one object: keep one")
        return dict(pairs)

    try:
        value = json.loads(text, parse_constant=constant, object_pairs_hook=once)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as problem:
        half = f"\\u{ord(problem.object[problem.start]):04x}"
        raise FeedFaceError(f"{where}: {half} is half of a sign: write the sign itself, or both halves") from None
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, column {problem.colno}" if "\n" in text.strip() else f"column {problem.colno}"
        raise FeedFaceError(f"{where}: broken JSON at {place}: {problem.msg}") from None
    except (RecursionError, ValueError) as problem:
        if isinstance(problem, FeedFaceError):
            raise
        raise FeedFaceError(f"{where}: broken JSON: {str(problem) or 'nested too deep'}") from None


def first_repeated(names: Sequence[str]) -> str | None:
    """The first of some names that was among those before it, or None."""
    known: set[str] = set()
    return next((name for name in names if name in known or known.add(name)), None)


def json_records(path: Path, text: str) -> Iterator[tuple[Where, Any]]:
    value = parse_json(text, Where(path))
    if isinstance(value, list):
        yield from ((Where(path, f"entry {number}"), entry) for number, entry in enumerate(value, 1))
    else:
        yield Where(path), value


def jsonl_records(path: Path, text: str) -> Iterator[tuple[Where, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would break at signs that a prompt may hold
        if line.strip():
            where = Where(path, f"line {number}")
            yield where, parse_json(line, where)


def csv_records(path: Path, text: str) -> Iterator[tuple[Where, Any]]:
    """Rows as objects without their empty cells. Columns are separated by comma, semicolon or tabulator."""
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count) if path.suffix.lower() == ".csv" else "\t"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for number, cells in enumerate(reader, 1):
            where = Where(path, f"row {number}")
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = header_names(cells, where)
                continue
            if len(cells) > len(names):
                extra = shown(cells[len(names) :])
                raise FeedFaceError(
                    f"{where}: {len(cells)} cells under {len(names)} names, left over: {extra}. "
                    'Put a text that holds the separator into "quotes".'
                )
            yield where, {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    except csv.Error as problem:
        raise FeedFaceError(f"{path}, line {reader.line_num}: broken CSV: {problem}") from None


def header_names(cells: list[str], where: Where) -> list[str]:
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    twice = first_repeated(names)
    if "" in names or twice is not None:
        wrong = f"the name {shorten(twice)} is there twice" if twice else f"column {names.index('') + 1} has no name"
        raise FeedFaceError(f"{where}: {wrong}: the first row holds a name for each column")
    return names


def shown(cells: list[str]) -> str:
    return ", ".join(repr(cell[:40]) for cell in cells[:3])
