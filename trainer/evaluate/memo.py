"""What was found before: a line a finding, appended as the work goes on, so that a killed run loses one at most."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from feedface_core.files.json_file import regular_file

from ..data.jsonl import keep_lines
from ..errors import TrainerError


class Memo:
    """Findings by key in a JSONL file.

    Args:
        path: the file; a last line that a crash cut off goes.

    Raises:
        TrainerError: a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            lines = keep_lines(path, lambda line: isinstance(line, dict) and isinstance(line.get("key"), str))
        except OSError as error:
            raise TrainerError(f"{path}: cannot be read: {error.strerror}; delete it to look again") from error
        self._found: dict[str, dict[str, Any]] = {line["key"]: line for line in lines}

    def get(self, key: str) -> dict[str, Any] | None:
        """What is known of a key, or None."""
        return self._found.get(key)

    def put(self, key: str, **finding: Any) -> dict[str, Any]:
        """Note a finding, and return it."""
        line = {"key": key, **finding}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._found[key] = line
        return line


def key_of(*parts: Any) -> str:
    """A short name of JSON values that any change of them changes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest_of(path: Path) -> str:
    """Of a file's content. Raises ``TrainerError`` if it cannot be read."""
    try:
        regular_file(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainerError(f"{path}: cannot be read: {error.strerror}") from error


def to_text(vector: np.ndarray | None) -> str | None:
    """A float32 vector as text, exactly; None stays None."""
    return None if vector is None else base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def from_text(text: str | None) -> np.ndarray | None:
    """The inverse of :func:`to_text`."""
    return None if text is None else np.frombuffer(base64.b64decode(text), "<f4")
