"""Who is in the photos: by name, by folder as far as the faces agree, by clustering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.config.preparation import IdentitySettings
from trainer.preparation.identities import cluster, compares_faces, identify, named_identity
from trainer.preparation.photo import Photo


@pytest.mark.parametrize(
    ("settings", "id_", "given", "expected", "compared"),
    [
        ({}, "ann/1.png", {}, None, True),  # a sub-folder may be anything
        ({}, "1.png", {}, None, False),
        ({}, "ann/1.png", {"identity": "carl"}, "carl", False),
        ({"pattern": r"(.+)_\d+"}, "ann/bob_3.png", {}, "bob", False),
        ({"pattern": r"(.+)_\d+"}, "ann/3.png", {}, None, False),
        ({"source": "folder"}, "ann/1.png", {"identity": "carl"}, "ann", False),
        ({"source": "given"}, "ann/1.png", {}, None, False),
        ({"source": "none"}, "ann/1.png", {"identity": "carl"}, None, False),
        ({"source": "cluster"}, "ann/1.png", {"identity": "carl"}, None, True),
    ],
)
def test_identity_by_name(settings, id_, given, expected, compared):
    photo, own = Photo(id_, Path(id_), given), IdentitySettings(**settings)
    assert named_identity(photo, own)[0] == expected and compares_faces(photo, own) == compared


def make_folder(name: str, people: str, seed: int = 0) -> list[Photo]:
    """A photo for each letter; the same letter is the same person, a dot is a face that was not recognised."""
    random = np.random.default_rng(seed)
    photos = [Photo(f"{name}/{place}.png", Path(f"{name}/{place}.png")) for place in range(len(people))]
    for photo, letter in zip(photos, people, strict=True):
        centre = np.random.default_rng(ord(letter)).normal(0, 1, 128)
        noisy = centre / np.linalg.norm(centre) + random.normal(0, 0.02, 128)
        photo.vector = [] if letter == "." else noisy.tolist()
    return photos


@pytest.mark.parametrize(
    ("faces", "expected"),
    [
        ("aaaa", "xxxx"),
        ("aa", "xx"),
        ("ab", "--"),
        ("abcdefgh", "--------"),  # as in FFHQ's folders, a thousand strangers each
        ("aaab", "xxx-"),
        ("aabb", "----"),  # a couple: neither is the person of the folder
        ("aaa.", "xxx-"),
        ("aa..", "----"),
        ("..", "--"),
        ("a", "-"),
    ],
)
def test_folder_is_a_person_as_far_as_its_faces_agree(faces, expected):
    photos = make_folder("x", faces)
    people = identify(photos, IdentitySettings(), 0.55)
    assert "".join(people.names[photo.id] or "-" for photo in photos) == expected
    assert people.origins["folder"] == expected.count("x") and people.origins["none"] == expected.count("-")
    assert len(people.notes) == (len(faces) > 1 and "-" in expected)


def test_folders_are_looked_at_one_by_one_and_the_user_is_told():
    photos = [*make_folder("00000", "abcd"), *make_folder("ann", "xxxy", 1), *make_folder("bob", "xx", 2)]
    people = identify(photos, IdentitySettings(), 0.55)
    assert [people.names[photo.id] for photo in photos] == [None] * 4 + ["ann"] * 3 + [None] + ["bob"] * 2
    mixed, unlike = people.notes
    assert "1 sub-folder(s) hold several people (00000): each of their 4 photos is its own person" in mixed
    assert "identity.source=folder" in mixed
    assert "1 photo(s) are not of the person of their sub-folder (ann/3.png)" in unlike


def test_folders_that_nobody_looked_into_are_no_people():
    photos = [*make_folder("ann", "aa"), *make_folder("bob", "bb")]
    people = identify(photos, IdentitySettings(), None, "no recogniser")
    assert set(people.names.values()) == {None} and people.origins == {"none": 4}
    assert "4 photos lie in 2 sub-folder(s)" in people.notes[0] and "(no recogniser)" in people.notes[0]
    asked = identify(photos, IdentitySettings(source="folder"), None)
    assert set(asked.names.values()) == {"ann", "bob"} and asked.notes == []


def test_clustering_separates_people_and_numbers_them_by_size():
    random = np.random.default_rng(0)
    centres = {"ann": (0, 0, 1), "bob": (0, 1, 0), "carl": (1, 0, 0)}
    who = ["bob", "ann", "ann", "carl", "ann", "bob"]
    ids = [f"{name}{place}" for place, name in enumerate(who)]
    vectors = [np.array(centres[name]) + random.normal(0, 0.05, 3) for name in who]
    people = cluster([Photo(id_, Path(id_), vector=own) for id_, own in zip(ids, vectors, strict=True)], 0.55)
    numbers = {"ann": "person-0001", "bob": "person-0002", "carl": "person-0003"}
    assert people == {id_: numbers[name] for id_, name in zip(ids, who, strict=True)}
    assert cluster([Photo("a", Path("a"), vector=[1.0, 0.0])], 0.5) == {"a": "person-0001"}
