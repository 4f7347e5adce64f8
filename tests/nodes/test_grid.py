"""Every face with every background, and pictures in a labelled grid."""

from __future__ import annotations

import pytest
import torch
from support.refused import refused


@pytest.fixture
def grid(comfy):
    return comfy.module("nodes.grid")


@pytest.fixture
def error(comfy):
    return comfy.module("feedface_core.errors").FeedFaceError


def test_pairs_are_faces_down_and_backgrounds_across(grid, face, other_face):
    faces, backgrounds, columns = grid.Pairs.execute(
        face_1=face, background_1=other_face, face_4=other_face, background_2=face, background_5=other_face
    ).args
    assert columns == 3
    assert [one is face for one in faces] == [True] * 3 + [False] * 3
    assert [one is face for one in backgrounds] == [False, True, False] * 2


@pytest.mark.parametrize("labels", [("", ""), ("Ann, Ben", ""), ("", "sea, hills, a garden"), ("Ann", "sea, hills")])
@pytest.mark.parametrize("batches", [[5], [1, 1, 1, 1, 1], [2, 3]])
def test_every_picture_stands_whole_in_its_place(grid, labels, batches):
    pictures = torch.rand(5, 40, 60, 3, generator=torch.Generator().manual_seed(1))
    pictures = (pictures * 255).round() / 255
    made = grid.Grid.execute(list(pictures.split(batches)), [3], [labels[0]], [labels[1]]).args[0]
    places = []
    for picture in pictures:
        found = [
            (y, x)
            for y in range(made.shape[1] - 39)
            for x in range(made.shape[2] - 59)
            if torch.equal(made[0, y, x], picture[0, 0]) and torch.allclose(made[0, y : y + 40, x : x + 60], picture)
        ]
        assert len(found) == 1
        places += found
    lines, columns = sorted({y for y, _ in places}), sorted({x for _, x in places})
    assert places == [(y, x) for y in lines for x in columns][:5] and (len(lines), len(columns)) == (2, 3)
    if not any(labels):
        assert made.shape[1:3] == (2 * 40 + 4, 3 * 60 + 2 * 4)
    inside = torch.ones(made.shape[1:3], dtype=torch.bool)
    for y, x in places:
        inside[y : y + 40, x : x + 60] = False
    assert bool((made[0][inside] < 0.5).any()) == any(labels), "labels stand beside the pictures"


def test_pictures_of_other_sizes_fit_the_first(grid):
    made = grid.Grid.execute([torch.zeros(1, 32, 32, 3), torch.ones(1, 64, 48, 4)], [2]).args[0]
    assert made.shape == (1, 32, 68, 3)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"images": []}, ["0 pictures"]),
        ({"images": [torch.full((1, 8, 8, 3), float("nan"))]}, ["images"]),
        ({"images": [None]}, ["images"]),
        ({"columns": [0]}, ["columns"]),
        ({"columns": [2.5]}, ["columns"]),
        ({"columns": ["3"]}, ["columns"]),
        ({"columns": [1024], "images": [torch.zeros(1024, 4, 64, 3)]}, ["16384"]),
        ({"images": [torch.zeros(1025, 4, 4, 3)]}, ["1025 pictures"]),
        ({"row_labels": [3]}, ["row_labels"]),
        ({"column_labels": [None]}, ["column_labels"]),
    ],
)
def test_what_cannot_be_drawn(grid, error, inputs, words):
    good = {"images": [torch.zeros(1, 8, 8, 3)], "columns": [1]}
    refused(lambda: grid.Grid.execute(**{**good, **inputs}), "FeedFace Grid", *words, error=error)
