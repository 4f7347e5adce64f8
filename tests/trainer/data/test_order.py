"""Which sample comes when: a pure function of the seed and the step."""

from __future__ import annotations

import pytest

from trainer.data.order import GlobalBatches


def test_every_epoch_is_another_permutation_and_batches_go_across():
    order = GlobalBatches(10, 4, seed=1, steps=5, repeat=1)
    entries = [entry for batch in order for entry in batch]
    assert sorted(entries) == [(index, visit) for index in range(10) for visit in (0, 1)]
    first, second = [index for index, _ in entries[:10]], [index for index, _ in entries[10:]]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [index for index, _ in GlobalBatches(10, 10, seed=2, steps=1).global_batch(0)] != first


def test_repeat_counts_as_further_visits():
    entries = GlobalBatches(3, 12, seed=0, steps=1, repeat=2).global_batch(0)
    assert sorted(entries) == [(index, visit) for index in range(3) for visit in range(4)]
    assert {visit for _, visit in entries[:6]} == {0, 1}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_share_the_same_global_batches(accumulation):
    settings = {"count": 7, "batch_size": 8, "seed": 5, "steps": 6, "accumulation": accumulation}
    one = list(GlobalBatches(**settings))
    two = [list(GlobalBatches(**settings, process=rank, processes=2)) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == 6 * accumulation
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_resuming_is_starting_at_the_step():
    whole = list(GlobalBatches(11, 4, seed=9, steps=8, accumulation=2))
    rest = GlobalBatches(11, 4, seed=9, steps=8, accumulation=2, start=3)
    assert list(rest) == whole[6:] and len(rest) == 10


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"batch_size is 6, which does not divide by 2 process\(es\) × 2"):
        GlobalBatches(5, 6, 0, 1, processes=2, accumulation=2)
    with pytest.raises(ValueError, match="no samples"):
        GlobalBatches(0, 6, 0, 1)
