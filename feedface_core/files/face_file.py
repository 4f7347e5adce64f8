"""Encoded faces on disk: safetensors with the hidden states and how they are combined."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, Json, TypeAdapter
from safetensors import SafetensorError

from ..conditioning import Face
from ..errors import FeedFaceError, located, shorten, typed
from ..state_dict import describe, read_state_dict
from .atomic import write_safetensors

FORMAT = "feedface-face"
FORMAT_VERSION = "1"
LONGEST_NOTE = 2000
"""Characters of a note on consent."""


class _Metadata(BaseModel, strict=True):
    encoder: str
    combination: str
    weights: Json[Annotated[list[float], Field(min_length=1)]]
    consent: str = ""


def save_face(path: str | os.PathLike, face: Face, consent: str = "") -> Path:
    """Writes a face, under a temporary name first. Hidden states are stored as they are.

    Args:
        consent: a note on who agreed to what, and when; at most :data:`LONGEST_NOTE` characters.

    Raises:
        FeedFaceError: the path cannot be a file's, the disk is full, or the note is too long.
    """
    if len(consent) > LONGEST_NOTE:
        raise FeedFaceError(f"consent: {len(consent)} characters, at most {LONGEST_NOTE} go into a face's file")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "encoder": face.encoder,
        "combination": face.combination,
        "weights": json.dumps(face.weights),
        **({"consent": consent.strip()} if consent.strip() else {}),
    }
    try:
        return write_safetensors(Path(path), {"face.hidden": face.hidden.detach().cpu()}, metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise FeedFaceError(f"{str(path)[:400]!r}: cannot be written ({shorten(error)})") from error


def load_face(path: str | os.PathLike) -> Face:
    """Reads a face. Raises as :func:`read_face`."""
    return read_face(path)[0]


def read_face(path: str | os.PathLike) -> tuple[Face, str]:
    """Reads a face and the note on the person's consent, empty where the file has none.

    Raises:
        MissingFile: the path does not exist.
        FeedFaceError: says what the file is instead, or what in it cannot be used.
    """
    tensors, metadata = read_state_dict(path)
    with located(path):
        if metadata.get("format") != FORMAT or "face.hidden" not in tensors:
            found = f"format={shorten(metadata['format'])}" if metadata.get("format") else describe(tensors)
            raise FeedFaceError(f"not a saved face: expected format={FORMAT!r} in its metadata, found {found}")
        if (version := metadata.get("format_version")) != FORMAT_VERSION:
            raise FeedFaceError(
                f"face format version {shorten(version)}; this version of FeedFace reads {FORMAT_VERSION!r}. Update it."
            )
        known = typed(TypeAdapter(_Metadata), metadata)
        return Face(tensors["face.hidden"], known.weights, known.combination, known.encoder), known.consent
