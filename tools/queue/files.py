"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from feedface_core.files.atomic import replacing


def write_whole(path: Path, content: bytes) -> None:
    """A file that is whole and on the disk, or not there at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
