"""Types of values that come from outside: numbers are finite and bounded, texts can be written, paths can be asked for.

Settings, manifests, tables and the progress file are pydantic models of these, in strict mode: nothing is taken for a
number or a switch that is none.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from feedface_core.errors import shorten

from ..errors import TrainerError

MOST_TEXT = 10_000
MOST_PATH = 2000
"""Bytes of a path: with the folder that it is relative to, it stays below what systems take (4096)."""

MOST_FACES = 16
"""Of one photo."""

Count = Annotated[int, Field(strict=True, ge=0, le=10**6)]
Positive = Annotated[int, Field(strict=True, gt=0, le=10**6)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, le=1e6)]
NotNegative = Annotated[float, Field(strict=True, ge=0, le=1e6)]
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def writable(text: str) -> str:
    """The text. Raises ``ValueError`` if no file in UTF-8 can hold it."""
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"a text cannot hold NUL or lone surrogates, found {shorten(text)}")
    return text


def _path(text: str) -> str:
    if not text.strip():
        raise ValueError(f"expected a path, found {text!r}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no such user's home folder: {shorten(text)}")
    if len(path.encode()) > MOST_PATH or any(len(part.encode()) > 255 for part in Path(path).parts):
        raise ValueError(f"longer than a path can be: {shorten(text)}")
    return text


def _device(name: str) -> str:
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"torch has no device {shorten(name)} here ({shorten(str(error))})") from error
    return name


def _no_number(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else value


Text = Annotated[str, Field(strict=True, max_length=MOST_TEXT), AfterValidator(writable)]
PathText = Annotated[Text, AfterValidator(_path)]
Device = Annotated[Text, AfterValidator(_device)]
Name = Annotated[Text, Field(pattern=r"\S"), BeforeValidator(_no_number)]
"""What somebody or something is called; tables may have numbers for it."""


def as_path(path: str | Path, what: str) -> Path:
    """A path as it was given, with the home folder in place of ``~``.

    Raises:
        TrainerError: names what it is the path of, if no file can have it.
    """
    try:
        return Path(_path(writable(str(path)))).expanduser()
    except ValueError as error:
        raise TrainerError(f"{what}: {error}") from error


def make_folder(path: str | Path, setting: str) -> Path:
    """A folder to write to, made if it is not there.

    Raises:
        TrainerError: names the setting, if nothing can be written there.
    """
    folder = as_path(path, setting)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        why = error.strerror or error
        raise TrainerError(f"{setting} {folder}: cannot be written: {why}; give another folder") from error


def check_buckets(step: int, resolution: int, weights: object, shards: object) -> None:
    """Raises ``ValueError`` where ``data.bucket_step`` does not go with the other settings of the data."""
    if resolution % step:
        raise ValueError(f"data.resolution ({resolution}) has to divide by data.bucket_step ({step})")
    for name, value in {"weights": weights, "shards": shards}.items():
        if value is not None:
            raise ValueError(f"data.bucket_step does not go with data.{name}: set one of them to null")
