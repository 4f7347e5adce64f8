"""Many photos are grouped and paired as few are."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import TrainerError
from trainer.preparation import identities
from trainer.preparation.identities import cluster
from trainer.preparation.neighbours import ALL_PAIRS, near_pairs
from trainer.preparation.photo import Photo


def photos_of(people: int, each: int, noise: float) -> list[Photo]:
    """Photos of people in turns; with much noise some of a person are as far apart as strangers."""
    random = np.random.default_rng(1)
    centres = random.normal(0, 1, (people, 64))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    photos = []
    for number in range(people * each):
        photo = Photo(f"{number}.png", Path(f"{number}.png"))
        photo.vector = (centres[number % people] + random.normal(0, noise, 64)).tolist()
        photos.append(photo)
    return photos


@pytest.mark.parametrize("noise", [0.02, 0.07, 0.08])
def test_groups_give_the_persons_of_all_pairs(monkeypatch, noise):
    pytest.importorskip("faiss")
    photos = photos_of(60, 10, noise)
    expected = cluster(photos, 0.9)
    assert len(set(expected.values())) >= 2
    monkeypatch.setattr(identities, "MOST_CLUSTERED", 100)
    assert cluster(photos, 0.9) == expected


def test_chain_of_strangers_is_refused(monkeypatch):
    pytest.importorskip("faiss")
    photos = photos_of(30, 1, 0.0)
    for number, photo in enumerate(photos):
        photo.vector[0] += 0.1 * number
        photo.vector[1:] = [0.0] * 63
    monkeypatch.setattr(identities, "MOST_CLUSTERED", 20)
    with pytest.raises(TrainerError, match="30 of 30 photos form one chain of similar faces.*Lower identity.distance"):
        cluster(photos, 1.0)


@pytest.mark.parametrize("distance", [0, 4, 7, 9])
def test_near_pairs_are_all_of_them(monkeypatch, distance):
    pytest.importorskip("faiss")
    random = np.random.default_rng(distance)
    values = [int(one) for one in random.integers(0, 2**63, 60)]
    values = [values[number % 60] for number in range(300)]
    for place in range(300):
        for _ in range(random.integers(0, 8)):
            values[place] ^= 1 << int(random.integers(0, 64))
    hashes = np.array(values, np.uint64)
    expected = [[a, b] for a, b in combinations(range(300), 2) if (values[a] ^ values[b]).bit_count() <= distance]
    assert near_pairs(hashes, distance).tolist() == expected
    monkeypatch.setattr("trainer.preparation.neighbours.ALL_PAIRS", 10)
    assert near_pairs(hashes, distance).tolist() == expected and len(expected) > distance
    assert near_pairs(hashes[:0], distance).shape == near_pairs(hashes[:1], distance).shape == (0, 2)


def test_without_faiss_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(identities, "MOST_CLUSTERED", 3)
    for many in (
        lambda: cluster(photos_of(2, 2, 0.01), 0.5),
        lambda: near_pairs(np.zeros(ALL_PAIRS + 1, np.uint64), 4),
    ):
        with pytest.raises(TrainerError, match=r"needs faiss: pip install 'feedface\[scale\]'"):
            many()
