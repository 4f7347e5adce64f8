"""Encoded faces on disk: safetensors with the hidden states and how they are combined."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..conditioning import Face
from ..errors import FeedFaceError
from .atomic import write_safetensors

FORMAT = "feedface-face"


class FaceFileError(FeedFaceError):
    """The file is not a saved face."""


def save_face(path: str | os.PathLike, face: Face) -> Path:
    """Writes a face, under a temporary name first. Hidden states are stored as they are."""
    metadata = {
        "format": FORMAT,
        "format_version": "1",
        "encoder": face.encoder,
        "combination": face.combination,
        "weights": json.dumps(face.weights),
    }
    return write_safetensors(Path(path), {"face.hidden": face.hidden.detach().cpu().contiguous()}, metadata)


def load_face(path: str | os.PathLike) -> Face:
    """Reads a face. Raises :class:`FaceFileError` that says what the file is instead."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FaceFileError(
                    f"{path} is not a saved face: expected format={FORMAT!r} in its metadata, found "
                    f"{metadata.get('format')!r}"
                )
            hidden = file.get_tensor("face.hidden")
        return Face(hidden, tuple(json.loads(metadata["weights"])), metadata["combination"], metadata["encoder"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise FaceFileError(
            f"{path} cannot be read as a saved face ({error}); it is truncated or of another kind. Save the face again."
        ) from error
