"""Retrieval: the reference is another photo of the same person.

A reference cut from the target itself teaches the adapter to paste. Taken from another photo, pose, light and
expression have to come from the text (J. Pinkney, Face Mixer Diffusion). Near-duplicates are the target
again, so they are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from . import randomness
from .manifest import Record
from .pictures import hash_distance


class References:
    """Draws the references of a sample.

    Args:
        records: all photos.
        most: largest number of references.
        retrieval: False takes the sample's own face crop, always.
        duplicate_distance: photos or crops whose hashes differ in at most so many bits are the same picture.
    """

    def __init__(self, records: Sequence[Record], most: int, retrieval: bool, duplicate_distance: int) -> None:
        self.records, self.most, self.duplicate_distance = records, most, duplicate_distance
        self.members: dict[str, list[int]] = defaultdict(list)
        if retrieval:
            for index, record in enumerate(records):
                if record.identity is not None:
                    self.members[record.identity].append(index)
        for members in self.members.values():
            members.sort(key=lambda index: records[index].id)  # whatever the order of the manifest

    def candidates(self, index: int) -> list[int]:
        """Other photos of the same person that are not the same picture, by id."""
        target = self.records[index]
        others = self.members.get(target.identity, ()) if target.identity is not None else ()
        return [other for other in others if not self._same_picture(target, self.records[other])]

    def draw(self, index: int, seed: int, visit: int) -> list[int]:
        """Indices of one visit's references: 1 to ``most`` other photos, or the sample if there are none."""
        others = self.candidates(index)
        if not others:
            return [index]
        name = self.records[index].id
        number = 1 + randomness.integer(min(self.most, len(others)), seed, "references", name, visit)
        order = randomness.permutation(len(others), seed, "which references", name, visit)
        return [others[place] for place in order[:number].tolist()]

    def _same_picture(self, first: Record, second: Record) -> bool:
        if first.path == second.path:
            return True
        pairs = ((first.photo_hash, second.photo_hash), (first.crop_hash, second.crop_hash))
        return any(a is not None and b is not None and hash_distance(a, b) <= self.duplicate_distance for a, b in pairs)
