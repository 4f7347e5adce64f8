"""Retrieval: the reference is another photo of the same person.

A reference cut from the target itself teaches the adapter to paste. Taken from another photo, pose, light and
expression have to come from the text (J. Pinkney, Face Mixer Diffusion). Near-duplicates are the target
again, so they are left out. Who has no other photo gets the own one, augmented (:mod:`trainer.data.augmentation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import randomness
from .augmentation import Augmentation
from .manifest import Record
from .records import Records

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
        self.records, self.settings = Records.of(records), settings
        self.variants, self.flip = settings.augment_variants, settings.mirrors_references

    def candidates(self, index: int) -> list[int]:
        """Other photos of the same person that are not the same picture, by id, whatever the order of the manifest."""
        if not self.settings.retrieval:
            return []
        return self.records.people.others(index, self.settings.duplicate_distance)

    def draw(self, index: int, seed: int, visit: int) -> tuple[Reference, ...]:
        """One visit's references: 1 to ``references`` other photos, or a variant of the sample if there are none."""
        name = self.records[index].id
        others = self.candidates(index)
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
            yield from self.of_photo(index)

    def of_photo(self, index: int) -> list[Reference]:
        """Every reference to a photo that can be drawn for any sample."""
        # Being another photo of somebody is mutual: who has no candidates is nobody's.
        if self.variants and not self.candidates(index):
            return [Reference(index, variant=variant) for variant in range(self.variants)]
        return [Reference(index, flip) for flip in ((False, True) if self.flip else (False,))]

    def augmentation(self, reference: Reference) -> Augmentation | None:
        """See :func:`augmentation_of`."""
        return augmentation_of(self.records, reference, self.flip)


def augmentation_of(records: Sequence[Record], reference: Reference, mirrored: bool) -> Augmentation | None:
    """What is changed in the crop of a reference, None for nothing; the same in every run, so that it can be cached.

    Args:
        records: the reference's index is its place among these photos.
        mirrored: whether references are mirrored at all.
    """
    if reference.variant is None:
        return None
    return Augmentation.draw(mirrored, records[reference.index].id, reference.variant)
