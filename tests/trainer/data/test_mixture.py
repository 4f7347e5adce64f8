"""Several data sets in fixed shares."""

from __future__ import annotations

from collections import Counter

import pytest

from trainer.data.mixture import CYCLE, MixedBatches, parts_of, slots
from trainer.errors import TrainerError

PARTS = (range(40), range(40, 47), range(47, 60))
WEIGHTS = (0.7, 0.2, 0.1)


def batches(**changes) -> MixedBatches:
    values = {"count": 60, "batch_size": 10, "seed": 3, "steps": 300, "parts": PARTS, "weights": WEIGHTS}
    return MixedBatches(**{**values, **changes})


def part_of(index: int) -> int:
    return next(number for number, part in enumerate(PARTS) if index in part)


def test_every_cycle_has_the_shares():
    order = batches()
    entries = [entry for step in range(300) for entry in order.global_batch(step)]
    for first in range(0, 3000, CYCLE):
        found = Counter(part_of(index) for index, _ in entries[first : first + CYCLE])
        assert found == {0: 700, 1: 200, 2: 100}
    assert [part_of(index) for index, _ in entries[:CYCLE]] != [
        part_of(index) for index, _ in entries[CYCLE : 2 * CYCLE]
    ]


@pytest.mark.parametrize("repeat", [1, 2])
def test_each_data_set_is_gone_through_in_epochs(repeat):
    order = batches(repeat=repeat)
    for number, part in enumerate(PARTS):
        entries = [entry for step in range(300) for entry in order.global_batch(step) if part_of(entry[0]) == number]
        length = len(part) * repeat
        for epoch in range(len(entries) // length):
            own = entries[epoch * length : (epoch + 1) * length]
            assert sorted(own) == [(i, epoch * repeat + n) for i in part for n in range(repeat)]
        assert len(set(entries)) == len(entries)  # no visit of a photo comes twice


def test_a_start_in_the_middle_and_a_share_of_it_are_the_same():
    whole = list(batches(accumulation=2))
    assert list(batches(accumulation=2, start=120)) == whole[240:]
    shares = [list(batches(accumulation=2, process=process, processes=5)) for process in range(5)]
    assert [sum((share[number] for share in shares), []) for number in range(600)] == whole
    assert list(batches(seed=4)) != list(batches())


def test_shares():
    assert slots((1.0,)) == (1000,) and slots((1, 1, 1)) == (334, 333, 333) and sum(slots((0.3, 5, 17, 2))) == CYCLE
    with pytest.raises(TrainerError, match="data.weights: 0.0001 of 1.0001 is less than one sample in 1000"):
        batches(weights=(1, 0.0001, 1e-9))
    with pytest.raises(TrainerError, match="data.weights has 2 numbers for 3 manifests"):
        batches(weights=(1, 1))
    with pytest.raises(TrainerError, match="manifest 2 has no photos to train on"):
        batches(parts=(range(3), range(0), range(3)))


def test_parts_keep_to_the_photos_that_are_trained_on():
    found = parts_of((3, 2, 4), [0, 2, 3, 7, 8])
    assert [part.tolist() for part in found] == [[0, 2], [3], [7, 8]]
