"""How alike the faces of pictures are to a person's photos, by a recogniser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FeedFaceError, listing
from .box import NoFaceError
from .detectors.base import Detector
from .recognisers import Recogniser

NO_FACE = -1.0
"""The similarity of a picture in which no face was found."""


@dataclass(frozen=True)
class Likeness:
    """What a recogniser says of one picture.

    Args:
        score: −1…1, mean similarity of the picture's most similar face to the references; :data:`NO_FACE` without one.
        faces: how many faces were found.
    """

    score: float
    faces: int


def known_vectors(
    photos: Sequence[Tensor], detector: Detector, recogniser: Recogniser
) -> tuple[Tensor, tuple[int, ...]]:
    """The vectors ``(R, D)`` of the largest face of each photo ``(H, W, 3)`` in 0…1, and the places of the photos that
    were left out since none was found.

    Raises:
        NoFaceError: no face in any of the photos.
    """
    vectors, without = [], []
    for place, photo in enumerate(photos):
        faces = sorted(detector.detect(photo), key=lambda face: -face.area)[:1]
        found = recogniser.vectors(photo, faces)
        if found and found[0] is not None:
            vectors.append(found[0])
        else:
            without.append(place)
    if not vectors:
        raise NoFaceError(
            f"references: no face found in any of {len(photos)} photo(s) (by {detector.name}). Use other photos or "
            "another detector"
        )
    return torch.stack(vectors), tuple(without)


def likeness(picture: Tensor, known: Tensor, detector: Detector, recogniser: Recogniser) -> Likeness:
    """How alike the most similar face of a picture ``(H, W, 3)`` in 0…1 is to the known vectors ``(R, D)``."""
    faces = detector.detect(picture)
    vectors = [vector for vector in recogniser.vectors(picture, faces) if vector is not None]
    if not vectors:
        return Likeness(NO_FACE, len(faces))
    similarity = recogniser.similarity(torch.stack(vectors), known)  # (faces, R)
    return Likeness(float(similarity.mean(1).max()), len(faces))


def best_of(scores: Sequence[float], count: int, minimum: float = NO_FACE) -> list[int]:
    """The places of the best ``count`` scores, best first and equal ones in their order; none below ``minimum``."""
    ranked = sorted(range(len(scores)), key=lambda place: -scores[place])
    return [place for place in ranked if scores[place] >= minimum][:count]


def describe(
    found: Sequence[Likeness], detector: Detector, recogniser: Recogniser, used: int, without: Sequence[int] = ()
) -> str:
    """A few lines for people: who judged, on how many references, and what of each picture."""
    limit = "" if recogniser.same != recogniser.same else f"; one person from about {recogniser.same:g} on"
    lines = [f"recogniser: {recogniser.name} [{recogniser.licence}]{limit}", f"detector: {detector.description}"]
    left_out = f"; no face in {listing(place + 1 for place in without)}" if without else ""
    lines.append(f"references: {used}{left_out}")
    for number, one in enumerate(found, 1):
        seen = f"{one.score:.3f}" if one.score != NO_FACE else f"{NO_FACE:g} (no face found)"
        several = f", the most similar of {one.faces} faces" if one.faces > 1 and one.score != NO_FACE else ""
        lines.append(f"picture {number}: {seen}{several}")
    return "\n".join(lines)


def check_count(pictures: int, others: int, what: str) -> None:
    """Raises :class:`FeedFaceError` unless there are as many of something as pictures."""
    if pictures != others:
        raise FeedFaceError(f"{what}: {others} for {pictures} pictures; give one for each")
