"""Retrieval: the reference is another photo of the same person.

A reference cut from the target itself teaches the adapter to paste. Taken from another photo, pose, light and
expression have to come from the text (J. Pinkney, Face Mixer Diffusion). Near-duplicates are the target
again, so they are left out. Who has no other photo gets the own one, augmented (:mod:`trainer.data.augmentation`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import randomness
from .augmentation import Augmentation
from .manifest import Record
from .pictures import hash_distance

if TYPE_CHECKING:
    from ..config import DataSettings


class Reference(NamedTuple):
    """One face crop of a sample.

    Args:
        index: of the photo.
        flip: whether the plain crop is mirrored.
        variant: which augmented variant it is, or None for the plain crop.
    """

    index: int
    flip: bool = False
    variant: int | None = None


class References:
    """Draws the references of a sample.

    Args:
        records: all photos.
        settings: how many there are, whether they are retrieved, augmented and mirrored, and what a duplicate is.
    """

    def __init__(self, records: Sequence[Record], settings: DataSettings) -> None:
        self.records, self.settings = records, settings
        self.variants, self.flip = settings.augment_variants, settings.mirrors_references
        self.people: dict[str, list[int]] = defaultdict(list)
        # By id, whatever the order of the manifest.
        for index, record in sorted(enumerate(records), key=lambda entry: entry[1].id) if settings.retrieval else ():
            if record.identity is not None:
                self.people[record.identity].append(index)

    def candidates(self, index: int) -> Iterator[int]:
        """Other photos of the same person that are not the same picture, by id."""
        target = self.records[index]
        others = self.people.get(target.identity, ())
        return (other for other in others if not self._same_picture(target, self.records[other]))

    def _same_picture(self, first: Record, second: Record) -> bool:
        most = self.settings.duplicate_distance
        pairs = ((first.photo_hash, second.photo_hash), (first.crop_hash, second.crop_hash))
        return first.path == second.path or any(None not in pair and hash_distance(*pair) <= most for pair in pairs)

    def draw(self, index: int, seed: int, visit: int) -> tuple[Reference, ...]:
        """One visit's references: 1 to ``references`` other photos, or a variant of the sample if there are none."""
        name = self.records[index].id
        others = list(self.candidates(index))
        if not others and self.variants:
            return (Reference(index, variant=randomness.integer(self.variants, seed, "variant", name, visit)),)
        chosen = [index]
        if others:
            most = min(self.settings.references, len(others))
            number = 1 + randomness.integer(most, seed, "references", name, visit)
            order = randomness.permutation(len(others), seed, "which references", name, visit)
            chosen = [others[position] for position in order[:number].tolist()]
        return tuple(
            Reference(other, self.flip and randomness.chance(0.5, seed, "flip reference", name, visit, position))
            for position, other in enumerate(chosen)
        )

    def all(self) -> Iterator[Reference]:
        """Every reference that can be drawn for any sample."""
        for index in range(len(self.records)):
            # Being another photo of somebody is mutual: who has no candidates is nobody's.
            if self.variants and next(self.candidates(index), None) is None:
                yield from (Reference(index, variant=variant) for variant in range(self.variants))
            else:
                yield from (Reference(index, flip) for flip in ((False, True) if self.flip else (False,)))

    def augmentation(self, reference: Reference) -> Augmentation | None:
        """What is changed in the crop of a reference; the same in every run, so that it can be cached."""
        if reference.variant is None:
            return None
        return Augmentation.draw(self.flip, self.records[reference.index].id, reference.variant)
