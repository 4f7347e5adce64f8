"""References are other photos of the person, not the same picture again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trainer.config import DataSettings
from trainer.data.manifest import Record
from trainer.data.references import Reference, References


def make_record(name, identity, photo_hash=None, crop_hash=None):
    return Record(
        id=name, path=Path(name), bbox=(0, 0, 9, 9), identity=identity, photo_hash=photo_hash, crop_hash=crop_hash
    )


def references_of(records, **changes):
    return References(records, DataSettings(manifest="m.jsonl", augment_variants=0, flip=False, **changes))


def test_references_are_other_photos_of_the_person():
    records = [make_record(f"{n}.jpg", "ann" if n < 8 else "bob" if n == 8 else None) for n in range(11)]
    references = references_of(records)
    counts = Counter()
    for visit in range(500):
        drawn = [reference.index for reference in references.draw(3, 0, visit)]
        assert 3 not in drawn and len(set(drawn)) == len(drawn) and set(drawn) <= set(range(8))
        counts[len(drawn)] += 1
    assert sorted(counts) == [1, 2, 3, 4, 5] and min(counts.values()) > 70
    assert references.draw(8, 0, 0) == (Reference(8),)  # the only photo of bob
    assert references.draw(9, 0, 0) == (Reference(9),)  # nobody knows who that is
    off = references_of(records, retrieval=False)
    assert off.draw(3, 0, 0) == (Reference(3),)


def test_near_duplicates_are_no_references():
    base = 0x0F0F0F0F0F0F0F0F
    records = [
        make_record("a", "ann", base, base),
        make_record("b", "ann", base ^ 0b11, ~base & (2**64 - 1)),  # the photo again, recompressed
        make_record("c", "ann", ~base & (2**64 - 1), base ^ 0b1111),  # the photo again, cut differently
        make_record("d", "ann", base ^ 0b11111, base ^ 0xFF),  # five and eight bits apart: another photo
        make_record("a", "ann"),  # the photo again, with another caption
    ]
    assert [*references_of(records).candidates(0)] == [3]
    assert [*references_of(records, duplicate_distance=0).candidates(0)] == [1, 2, 3]
