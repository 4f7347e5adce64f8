"""Encoded faces on disk: safetensors with the hidden states and how they are combined."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..conditioning import Face
from ..errors import FeedFaceError
from ..state_dict import describe, read_state_dict
from .atomic import write_safetensors

FORMAT = "feedface-face"
FORMAT_VERSION = "1"


def save_face(path: str | os.PathLike, face: Face) -> Path:
    """Writes a face, under a temporary name first. Hidden states are stored as they are."""
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "encoder": face.encoder,
        "combination": face.combination,
        "weights": json.dumps(face.weights),
    }
    return write_safetensors(Path(path), {"face.hidden": face.hidden.detach().cpu()}, metadata)


def load_face(path: str | os.PathLike) -> Face:
    """Reads a face.

    Raises:
        FileNotFoundError: the path does not exist.
        FeedFaceError: says what the file is instead, or what in it cannot be used.
    """
    tensors, metadata = read_state_dict(path)
    if metadata.get("format") != FORMAT or "face.hidden" not in tensors:
        found = f"format={metadata['format']!r}" if metadata.get("format") else describe(tensors)
        raise FeedFaceError(f"{path} is not a saved face: expected format={FORMAT!r} in its metadata, found {found}")
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise FeedFaceError(f"{path}: face format version {version!r}; this version of FeedFace reads '1'. Update it.")
    try:
        weights = json.loads(metadata["weights"])
        if not isinstance(weights, list):
            raise FeedFaceError(f"weights are {weights!r}, expected a list with one number for each reference")
        return Face(tensors["face.hidden"], tuple(weights), metadata["combination"], metadata["encoder"])
    except KeyError as error:
        raise FeedFaceError(f"{path}: the saved face lacks {error} in its metadata. Save the face again.") from None
    except (ValueError, RecursionError) as error:
        raise FeedFaceError(f"{path}: {error}. Save the face again.") from error
