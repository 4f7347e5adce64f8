"""What has been done already: one line a photo, appended as the work goes on.

A run that is killed loses at most the photos of one batch. A line whose photo, settings or files have changed since
is void, and the photo is worked on again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ..data.jsonl import keep_lines
from .photo import Photo

NAME = "progress.jsonl"
FINDINGS = ("reason", "detail", "vector", "row")


class Journal:
    """The progress file of an output folder. A last line that was cut off by a crash is cut off for good.

    Args:
        output: the folder.
        settings: text that changes with every setting the stages depend on.
        recogniser: name of the recogniser that vectors have to be of; None if faces are not compared.
    """

    def __init__(self, output: Path, settings: str, recogniser: str | None = None) -> None:
        self.output, self.settings, self.recogniser = output, settings, recogniser
        self.path = output / NAME
        entries = keep_lines(self.path, lambda entry: isinstance(entry, dict) and "id" in entry)
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in entries}

    def restore(self, photo: Photo, needs_caption: bool, vector: Literal["no", "looked for", "found"]) -> bool:
        """Fill a photo with what was found before; False if that has to be done (again)."""
        entry = self.entries.get(photo.id)
        if entry is None or entry["key"] != self._key(photo):
            return False
        row, has_caption = entry["row"], photo.given.get("caption") or "caption" in entry["row"]
        if not entry["reason"] and (
            (needs_caption and not has_caption)
            or (vector != "no" and (entry["vector"] is None or entry.get("recogniser") != self.recogniser))
            or (vector == "found" and not entry["vector"])
            or not all((self.output / row[column]).is_file() for column in ("mask_path", "crop_path"))
        ):
            return False
        for name in FINDINGS:
            setattr(photo, name, entry[name])
        return True

    def add(self, photo: Photo) -> None:
        """Note a photo that has been through all stages."""
        entry = {"id": photo.id, "key": self._key(photo), "recogniser": self.recogniser}
        entry |= {name: getattr(photo, name) for name in FINDINGS}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _key(self, photo: Photo) -> list[Any]:
        try:
            status = photo.path.stat()
            state = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = None
        return [self.settings, str(photo.path), state, photo.given.get("bbox"), photo.given.get("mask_path")]
