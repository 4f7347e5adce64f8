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
        most: largest number of references.
        retrieval: False takes the sample's own face crop, always.
        duplicate_distance: photos or crops whose hashes differ in at most so many bits are the same picture.
        variants: of the own face crop, which are drawn from; 0 takes it as it is.
        flip: whether crops may be mirrored.
    """

    def __init__(
        self,
        records: Sequence[Record],
        most: int,
        retrieval: bool,
        duplicate_distance: int,
        variants: int = 0,
        flip: bool = False,
    ) -> None:
        self.records, self.most, self.duplicate_distance = records, most, duplicate_distance
        self.variants, self.flip = variants, flip
        self.members: dict[str, list[int]] = defaultdict(list)
        if retrieval:
            for index, record in enumerate(records):
                if record.identity is not None:
                    self.members[record.identity].append(index)
        for members in self.members.values():
            members.sort(key=lambda index: records[index].id)  # whatever the order of the manifest

    @classmethod
    def of(cls, records: Sequence[Record], settings: DataSettings) -> References:
        """As the settings say."""
        return cls(
            records,
            settings.references,
            settings.retrieval,
            settings.duplicate_distance,
            settings.augment_variants,
            settings.mirrors_references,
        )

    def candidates(self, index: int) -> list[int]:
        """Other photos of the same person that are not the same picture, by id."""
        return list(self._candidates(index))

    def _candidates(self, index: int) -> Iterator[int]:
        target = self.records[index]
        others = self.members.get(target.identity, ()) if target.identity is not None else ()
        return (other for other in others if not self._same_picture(target, self.records[other]))

    def draw(self, index: int, seed: int, visit: int) -> tuple[Reference, ...]:
        """One visit's references: 1 to ``most`` other photos, or a variant of the sample if there are none."""
        name = self.records[index].id
        others = self.candidates(index)
        if not others and self.variants:
            return (Reference(index, variant=randomness.integer(self.variants, seed, "variant", name, visit)),)
        chosen = [index]
        if others:
            number = 1 + randomness.integer(min(self.most, len(others)), seed, "references", name, visit)
            order = randomness.permutation(len(others), seed, "which references", name, visit)
            chosen = [others[place] for place in order[:number].tolist()]
        return tuple(
            Reference(other, self.flip and randomness.chance(0.5, seed, "flip reference", name, visit, place))
            for place, other in enumerate(chosen)
        )

    def all(self) -> Iterator[Reference]:
        """Every reference that can be drawn for any sample."""
        flips = (False, True) if self.flip else (False,)
        for index in range(len(self.records)):
            # Being another photo of somebody is mutual: who has no candidates is nobody's.
            if self.variants and next(self._candidates(index), None) is None:
                yield from (Reference(index, variant=variant) for variant in range(self.variants))
            else:
                yield from (Reference(index, flip) for flip in flips)

    def augmentation(self, reference: Reference) -> Augmentation | None:
        """What is changed in the crop of a reference; the same in every run, so that it can be cached."""
        if reference.variant is None:
            return None
        return Augmentation.draw(self.flip, self.records[reference.index].id, reference.variant)

    def _same_picture(self, first: Record, second: Record) -> bool:
        if first.path == second.path:
            return True
        pairs = ((first.photo_hash, second.photo_hash), (first.crop_hash, second.crop_hash))
        return any(a is not None and b is not None and hash_distance(a, b) <= self.duplicate_distance for a, b in pairs)
