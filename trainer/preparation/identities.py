"""Who is in the photo: given, read off the file's name or folder, or found by comparing faces.

A sub-folder is a person only if that was asked for, or if the faces in it agree: photos are as often sorted by number
or date, and strangers taken for one person would be each other's references.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import regex

from ..config.preparation import IdentitySettings
from ..errors import TrainerError
from .neighbours import neighbour_groups
from .photo import Photo

PATTERN_SECONDS = 1.0
MOST_CLUSTERED = 20_000
"""Average linkage keeps all pairwise distances: 1.6 GB at this number of photos."""


@dataclass
class People:
    """Who is in which photo.

    Args:
        names: the person by photo id; None for a photo that is its own person.
        origins: where the names come from, counted in photos.
        notes: what the user should know, a sentence each.
    """

    names: dict[str, str | None] = field(default_factory=dict)
    origins: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, photo: Photo, name: str | None, origin: str) -> None:
        """Note the person of a photo."""
        self.names[photo.id] = name
        self.origins[origin if name is not None else "none"] += 1


def identify(photos: Sequence[Photo], settings: IdentitySettings, distance: float | None, why_not: str = "") -> People:
    """The people of all photos; those of further faces go into their columns.

    Args:
        photos: those that are kept; where faces are compared, with their vectors.
        settings: say how.
        distance: largest mean distance of the vectors within one person; None if no face was looked at.
        why_not: why that was not done.

    Raises:
        TrainerError: see :func:`named_identity` and :func:`cluster`.
    """
    people, folders = People(), defaultdict(list)
    others = {
        (photo.id, number): Photo(f"{photo.id}/{number + 2}", photo.path, vector=vector)
        for photo in photos
        for number, vector in enumerate(photo.vectors)
        if vector
    }
    names = cluster([*photos, *others.values()], distance) if settings.source == "cluster" else {}
    for photo in photos:
        given = photo.given.get("faces", ())
        for number, face in enumerate(photo.row.get("faces", ())):
            same = others.get((photo.id, number))
            named = given[number].get("identity") if given and settings.source in ("auto", "given") else None
            face["identity"] = named if same is None or same.id not in names else names[same.id]
    for photo in photos:
        if photo.id in names:
            people.add(photo, names[photo.id], "cluster")
        elif compares_faces(photo, settings):
            folders[folder_of(photo)].append(photo)
        else:
            people.add(photo, *named_identity(photo, settings))
    if folders:
        _compare_folders(people, folders, distance, why_not)
    return people


def _compare_folders(people: People, folders: dict[str, list[Photo]], distance: float | None, why_not: str) -> None:
    """A folder's name for those of its photos that more than half of it agree with, no name for the others."""
    mixed, alone, unlike = [], 0, []
    for folder, photos in folders.items():
        alike = set() if distance is None else _majority(photos, distance)
        for photo in photos:
            people.add(photo, folder if photo.id in alike else None, "folder")
        unlike += [photo.id for photo in photos if alike and photo.id not in alike]
        if len(photos) > 1 and not alike:
            mixed.append(folder)
            alone += len(photos)
    if distance is None:
        people.notes.append(
            f"{sum(map(len, folders.values()))} photos lie in {len(folders)} sub-folder(s), and nothing says whether "
            f"each is one person ({why_not}): every photo is its own person. identity.source=folder takes each "
            "sub-folder for a person"
        )
    elif mixed:
        people.notes.append(
            f"{len(mixed)} sub-folder(s) hold several people ({_some(mixed)}): each of their {alone} photos is its own "
            "person. identity.source=folder takes each sub-folder for a person, identity.source=cluster finds people"
        )
    if unlike:
        people.notes.append(
            f"{len(unlike)} photo(s) are not of the person of their sub-folder ({_some(unlike)}): each is its own "
            "person"
        )


def _majority(photos: Sequence[Photo], distance: float) -> set[str]:
    """The ids of the photos that are of one person, if these are more than half of all; else none."""
    seen = [photo for photo in photos if photo.vector]
    if not 2 <= len(seen) <= MOST_CLUSTERED:
        return set()
    names = cluster(seen, distance)
    name, count = Counter(names.values()).most_common(1)[0]
    return {id_ for id_, own in names.items() if own == name} if 2 * count > len(photos) else set()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def compares_faces(photo: Photo, settings: IdentitySettings) -> bool:
    """Whether the face of a photo has to be compared with others to say who it is."""
    if settings.source == "auto" and settings.pattern is None:
        return not photo.given.get("identity") and folder_of(photo) is not None
    return settings.source == "cluster"


def named_identity(photo: Photo, settings: IdentitySettings) -> tuple[str | None, str]:
    """The person as given, by the pattern, or if that was asked for by the sub-folder, and which of the three.

    Raises:
        TrainerError: for a pattern that takes too long.
    """
    source = settings.source
    if source in ("auto", "given") and photo.given.get("identity"):
        return str(photo.given["identity"]), "given"
    if source == "pattern" or (source == "auto" and settings.pattern is not None):
        try:
            found = regex.search(settings.pattern, photo.path.name, timeout=PATTERN_SECONDS)
        except TimeoutError as error:
            raise TrainerError(
                f"identity.pattern {settings.pattern!r}: takes more than {PATTERN_SECONDS:g} s for {photo.path.name}; "
                "a repeat inside a repeat, such as (a+)+, tries every way to part the name"
            ) from error
        return (found.group(1) or None if found else None), "pattern"
    return (folder_of(photo), "folder") if source == "folder" else (None, "none")


def folder_of(photo: Photo) -> str | None:
    """The photo's sub-folder of the input folder, or None."""
    parent = PurePosixPath(photo.id).parent
    return None if parent == PurePosixPath(".") or parent.is_absolute() else str(parent)


def cluster(photos: Sequence[Photo], distance: float) -> dict[str, str]:
    """Names of persons by photo id: average linkage of the vectors, cut at a mean distance.

    More than :data:`MOST_CLUSTERED` photos are clustered in the groups of :func:`~.neighbours.neighbour_groups`, which
    gives the same persons as far as faiss finds the neighbours. Persons are numbered by their number of photos, then by
    their first photo.

    Raises:
        TrainerError: many photos and no faiss, or a group that is too large for all of its pairwise distances.
    """
    vectors = np.array([photo.vector for photo in photos])
    if len(photos) <= MOST_CLUSTERED:
        labels = _linked(vectors, distance).tolist()
    else:
        labels = _in_groups(vectors, distance).tolist()
    # Counter keeps the order of first photos, and so does most_common among equals.
    numbers = {label: number for number, (label, _) in enumerate(Counter(labels).most_common(), 1)}
    return {photo.id: f"person-{numbers[label]:04d}" for photo, label in zip(photos, labels, strict=True)}


def _linked(vectors: np.ndarray, distance: float) -> np.ndarray:
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(vectors) < 2:
        return np.ones(len(vectors), np.int64)
    return fcluster(linkage(vectors, "average"), distance, "distance")


def _in_groups(vectors: np.ndarray, distance: float) -> np.ndarray:
    groups = neighbour_groups(vectors, distance)
    order = np.argsort(groups, kind="stable")
    labels, taken = np.zeros(len(vectors), np.int64), 0
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(members) > MOST_CLUSTERED:
            raise TrainerError(
                f"identity.source=cluster: {len(members)} of {len(vectors)} photos form one chain of similar faces; at "
                f"most {MOST_CLUSTERED} can be compared with one another. Lower identity.distance ({distance:g}), give "
                "identities (a folder a person, or a column of the table), or prepare parts"
            )
        own = _linked(vectors[members], distance)
        labels[members] = taken + own
        taken += int(own.max())
    return labels
