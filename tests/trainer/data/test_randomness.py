"""Draws without state: the same numbers for ever, and uniform ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainer.data.dataset import randomness


def test_seeds_tell_all_parts_apart_and_never_change():
    # A change of these numbers would make every run unrepeatable.
    assert randomness.seed_of(0, "order", 0) == 1483281915508598133
    assert randomness.normal((3,), 7, "noise", "a.jpg", 2).tolist() == pytest.approx(
        [1.4489006996154785, 0.30063486099243164, 0.8782075643539429]
    )
    parts = [(1, "a"), (1, "a", 0), ("1", "a"), ("a", 1), (1, "b"), ("ab", "c"), ("a", "bc"), (-1, "a")]
    assert len({randomness.seed_of(*part) for part in parts}) == len(parts)
    with pytest.raises(TypeError, match="1.5"):
        randomness.seed_of(1.5)


def test_draws_are_uniform():
    values = np.array([randomness.uniform(3, "test", f"id{n}", 1) for n in range(20_000)])
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.std() - 12**-0.5) < 0.01
    counts = Counter(randomness.integer(5, "x", n) for n in range(5000))
    assert sorted(counts) == [0, 1, 2, 3, 4] and min(counts.values()) > 850
    assert not any(randomness.chance(0.0, n) for n in range(100))
    assert all(randomness.chance(1.0, n) for n in range(100))
