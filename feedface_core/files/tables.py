"""Records of JSON, JSONL and CSV files, each with the place where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FeedFaceError

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")


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
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in KINDS)
        if not files:
            raise FeedFaceError(f"{path}: no {', '.join(KINDS)} file in this folder")
        for file in files:
            yield from read_records(file)
        return
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise FeedFaceError(f"{path}: expected a file that ends in {', '.join(KINDS)}, or a folder of them")
    records = csv_records if kind in (".csv", ".tsv") else json_records if kind == ".json" else jsonl_records
    count = 0
    for record in records(path, read_text(path)):
        count += 1
        yield record
    if not count:
        raise FeedFaceError(f"{path}: nothing in it")


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FeedFaceError(f"{path}: there is no such file") from None
    except OSError as problem:
        raise FeedFaceError(f"{path}: cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        raise FeedFaceError(f"{path}, line {line}: not UTF-8: save it as UTF-8 (in a spreadsheet: CSV UTF-8)") from None


def parse_json(text: str, where: Where) -> Any:
    """A JSON text. Raises ``FeedFaceError``, for ``NaN``, ``Infinity`` and a name twice in one object as well."""

    def constant(name: str) -> None:
        raise FeedFaceError(f"{where}: {name} is no JSON number: give a finite one, or leave it out")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise FeedFaceError(f"{where}: {twice!r} is there twice in one object: keep one")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=once)
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, column {problem.colno}" if "\n" in text.strip() else f"column {problem.colno}"
        raise FeedFaceError(f"{where}: broken JSON at {place}: {problem.msg}") from None
    except (RecursionError, ValueError) as problem:
        if isinstance(problem, FeedFaceError):
            raise
        raise FeedFaceError(f"{where}: broken JSON: {str(problem) or 'nested too deep'}") from None


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
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if "" in names or twice is not None:
        wrong = f"the name {twice!r} is there twice" if twice else f"column {names.index('') + 1} has no name"
        raise FeedFaceError(f"{where}: {wrong}: the first row holds a name for each column")
    return names


def shown(cells: list[str]) -> str:
    return ", ".join(repr(cell[:40]) for cell in cells[:3])
