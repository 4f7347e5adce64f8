"""The numbers: what they say of pasted faces, strangers and the photos themselves, and how sure they are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feedface_core.faces import DetectedFace
from trainer.evaluate.looking import Look, References
from trainer.evaluate.measures import FACE, UNMODIFIED, normalise, score_person, summarise, summarise_photos
from trainer.evaluate.people import Person, Photo, Request

PROMPTS = ("on a beach", "in a café", "at night")
FACE_BOX = DetectedFace((0, 0, 8, 8))


class Looker:
    """Compares by cosine; knows neither CLIP nor ImageReward."""

    clip = reward = None
    finds_faces = True

    def similarity(self, vectors, others):
        return np.stack([*vectors]) @ np.stack([*others]).T


def unit(vectors: torch.Tensor) -> list[np.ndarray]:
    return [one.numpy() for one in torch.nn.functional.normalize(vectors, dim=-1)]


def look(vector: np.ndarray | None, name: str = "x.png") -> Look:
    return Look(Path(name), None if vector is None else FACE_BOX, vector)


def world(seed: int, people: int = 6, photos: int = 4):
    """For each person a direction, photos of it, and the looks at pictures of several kinds of adapters."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(people):
        person = torch.randn(1, 32, generator=generator)
        noise = lambda count, share: unit(person + share * torch.randn(count, 32, generator=generator))  # noqa: B023, E731
        vectors = noise(photos, 0.6)
        requests = tuple(Request(f"{index}_{n}", str(index), prompt, 0) for n, prompt in enumerate(PROMPTS))
        one = Person(str(index), tuple(Photo(Path(f"{n}.png")) for n in range(photos)), requests)
        kinds = {
            "stranger": unit(torch.randn(len(PROMPTS), 32, generator=generator)),
            "same": noise(len(PROMPTS), 0.6),
            "pasted": unit(torch.tensor(np.stack(vectors[:3])) + 0.01 * torch.randn(3, 32, generator=generator)),
        }
        yield References(one, tuple(look(vector) for vector in vectors), 2), kinds


def rows(kind: str, seed: int = 0, found: float = 1.0) -> dict:
    scored = []
    for references, kinds in world(seed):
        pairs = list(zip(references.person.requests, kinds[kind], strict=True))
        looks = {request: look(vector if n < found * len(pairs) else None) for n, (request, vector) in enumerate(pairs)}
        plain = zip(references.person.requests, map(look, kinds["stranger"]), strict=True)
        scored.append(score_person(references, {FACE: looks, UNMODIFIED: dict(plain)}, Looker(), {}))
    return summarise(scored, FACE, 200)


@pytest.mark.parametrize("seed", range(3))
def test_normalised_similarity_has_its_ends_where_they_belong(seed):
    assert rows("stranger", seed)["similarity_normalised"].value == pytest.approx(0.0, abs=1e-6)
    assert rows("same", seed)["similarity_normalised"].value == pytest.approx(1.0, abs=0.15)
    assert rows("pasted", seed)["similarity_normalised"].value > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_pasted_faces_are_nearer_than_photos(seed):
    pasted, same, stranger = (rows(kind, seed) for kind in ("pasted", "same", "stranger"))
    assert pasted["copied"].value == 1.0 and pasted["beyond"].low > 0.0
    assert stranger["copied"].value == 0.0 and stranger["beyond"].value < same["beyond"].value < pasted["beyond"].value
    # What is pasted from the photos that the adapter sees is no nearer to the others than photos are.
    assert pasted["unseen"].value < pasted["similarity"].value


def test_one_more_photo_is_nearer_by_chance():
    """Among n + 1 photos each belongs to the closest pair with probability 2 / (n + 1)."""
    scored = [
        score_person(
            references,
            {FACE: dict(zip(references.person.requests, map(look, kinds["same"]), strict=True))},
            Looker(),
            {},
        )
        for references, kinds in world(0, people=300)
    ]
    chance = summarise_photos(scored, 200)["copied"].value
    assert chance == pytest.approx(2 / 5)
    assert summarise(scored, FACE, 200)["copied"].value == pytest.approx(chance, abs=0.06)


def test_pictures_without_a_face_count_for_that_alone():
    some = rows("same", found=0.5)
    assert some["found"].value == pytest.approx(2 / 3) and some["similarity"].people == 6
    none = rows("same", found=0.0)
    assert (
        none["found"].value == 0.0 and none["similarity"].value is None and none["similarity_normalised"].value is None
    )


def test_interval_is_of_people():
    """It holds the mean, narrows with people and is none for a single one; the same each time."""
    few = rows("same")["similarity"]
    assert few.low < few.value < few.high and rows("same")["similarity"] == few
    scored = [
        score_person(
            references, {FACE: dict.fromkeys(references.person.requests, look(kinds["same"][0]))}, Looker(), {}
        )
        for references, kinds in world(0, people=40)
    ]
    many, alone = (summarise(some, FACE, 200)["similarity"] for some in (scored, scored[:1]))
    assert many.high - many.low < few.high - few.low
    assert (alone.low, alone.high, alone.people) == (None, None, 1)


def test_one_photo_has_nothing_to_be_normalised_by():
    [(references, kinds)] = world(0, people=1, photos=3)
    alone = References(references.person, references.looks[:1], 1)
    scored = score_person(alone, {FACE: {alone.person.requests[0]: look(kinds["same"][0])}}, Looker(), {})
    row = summarise([scored], FACE, 200)
    assert row["similarity"].value is not None
    assert row["similarity_normalised"].value is row["copied"].value is row["unseen"].value is None


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1), st.floats(0.1, 10), st.floats(-5, 5))
def test_normalised_does_not_depend_on_the_scale(value, high, low, factor, offset):
    one = normalise(np.array([value, high, low]))
    other = normalise(np.array([value, high, low]) * factor + offset)
    if high - low > 1e-3:
        assert other == pytest.approx(one, rel=1e-6, abs=1e-6)
    elif high - low <= 0:
        assert math.isnan(one)
