"""Order, index, minimum size, policies and the JSON of boxes."""

from __future__ import annotations

import json

import pytest
import torch

from feedface_core.errors import FeedFaceError
from feedface_core.faces import (
    ORDERS,
    DetectedFace,
    Detector,
    GivenBoxes,
    GivenMask,
    NoFaceError,
    draw_faces,
    faces_from_json,
    faces_to_json,
    order_faces,
    parse_indexes,
    select_faces,
    select_from_photo,
)

SIZE = (400, 200)
LEFT = DetectedFace((10, 60, 50, 100), confidence=0.95)
MIDDLE = DetectedFace((180, 80, 200, 105), confidence=0.99)
RIGHT = DetectedFace((300, 20, 380, 110), confidence=0.91)
FACES = [MIDDLE, RIGHT, LEFT]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("size", [RIGHT, LEFT, MIDDLE]),
        ("left to right", [LEFT, MIDDLE, RIGHT]),
        ("right to left", [RIGHT, MIDDLE, LEFT]),
        ("top to bottom", [RIGHT, LEFT, MIDDLE]),
        ("confidence", [MIDDLE, LEFT, RIGHT]),
        ("centre", [MIDDLE, RIGHT, LEFT]),
        ("as found", FACES),
    ],
)
def test_orders(order, expected):
    assert order_faces(FACES, order, SIZE) == expected


def test_every_order_is_tested_and_unknown_ones_are_refused():
    assert len(ORDERS) == 7
    with pytest.raises(FeedFaceError, match="no order 'age'; there are: size, left to right"):
        order_faces(FACES, "age", SIZE)


def test_equal_faces_are_ordered_by_place_whatever_the_detector_said_first():
    twins = [DetectedFace((200, 0, 240, 40)), DetectedFace((20, 0, 60, 40))]
    assert [face.box[0] for face in order_faces(twins, "size", SIZE)] == [20, 200]
    assert [face.box[0] for face in order_faces(twins[::-1], "size", SIZE)] == [20, 200]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", (0,)), (" 0, 2 ", (0, 2)), ("2,0", (2, 0)), ("1-3", (1, 2, 3)), ("0, 2 - 3", (0, 2, 3)), ("All", None)],
)
def test_indexes(text, expected):
    assert parse_indexes(text) == expected


@pytest.mark.parametrize("text", ["", " ", "first", "-1", "0,", "3-1", "1.5", "0;x", "0-99999999"])
def test_bad_indexes_are_refused(text):
    with pytest.raises(FeedFaceError, match="indexes: expected numbers"):
        parse_indexes(text)


def test_selection_takes_what_is_asked_for():
    selection = select_faces(FACES, SIZE, order="left to right", indexes=(2, 0))
    assert selection.chosen_faces == [RIGHT, LEFT]
    assert selection.faces == (LEFT, MIDDLE, RIGHT)
    assert select_faces(FACES, SIZE, indexes=None).chosen_faces == [RIGHT, LEFT, MIDDLE]
    assert "3 face(s) found; taken: 2 (80 × 90 px at 300, 20, confidence 0.91)" in selection.describe()


def test_small_faces_get_no_number():
    selection = select_faces(FACES, SIZE, order="left to right", indexes=None, min_size=30)
    assert selection.chosen_faces == [LEFT, RIGHT]
    assert selection.too_small == (MIDDLE,)
    assert "1 left out as too small" in selection.describe()


def test_errors_say_what_was_found():
    with pytest.raises(NoFaceError, match="^holiday.jpg: no face found$"):
        select_faces([], SIZE, name="holiday.jpg")
    tiny = DetectedFace((0, 0, 5, 4))
    with pytest.raises(NoFaceError, match="largest has 5 pixels and min_size is 32"):
        select_faces([tiny], SIZE, min_size=32)
    with pytest.raises(
        FeedFaceError, match="face 3 was asked for, but 3 face.s. were found, numbered from 0 to 2 by size"
    ):
        select_faces(FACES, SIZE, indexes=(0, 3))
    with pytest.raises(FeedFaceError, match="1 more under the min_size of 30 pixels"):
        select_faces(FACES, SIZE, indexes=(2,), min_size=30)
    with pytest.raises(FeedFaceError, match="no index given"):
        select_faces(FACES, SIZE, indexes=())


class Nothing(Detector):
    name, licence = "nothing", "none"

    def find(self, image):
        return []


def test_policies_for_a_photo_without_a_face():
    photo = torch.zeros(30, 50, 3)
    with pytest.raises(NoFaceError, match=r"photo 2: no face found \(by nothing\)"):
        select_from_photo(photo, Nothing(), name="photo 2")
    skipped = select_from_photo(photo, Nothing(), when_none="skip")
    assert (skipped.outcome, skipped.chosen_faces) == ("skipped", [])
    assert "photo skipped" in skipped.describe()
    whole = select_from_photo(photo, Nothing(), when_none="whole image", min_size=100)
    assert whole.outcome == "whole image" and whole.chosen_faces[0].box == (0, 0, 50, 30)
    with pytest.raises(FeedFaceError, match="no policy 'ignore'"):
        select_from_photo(photo, Nothing(), when_none="ignore")


def test_policy_covers_faces_that_are_too_small_but_not_bad_indexes():
    photo = torch.zeros(200, 400, 3)
    skipped = select_from_photo(photo, GivenBoxes([MIDDLE]), min_size=100, when_none="skip")
    assert skipped.outcome == "skipped" and skipped.too_small == (MIDDLE,)
    with pytest.raises(FeedFaceError):
        select_from_photo(photo, GivenBoxes([MIDDLE]), indexes=(1,), when_none="skip")


def test_given_mask_must_fit_the_photo():
    mask = torch.zeros(200, 400)
    mask[20:60, 30:80] = 1
    found = select_from_photo(torch.zeros(200, 400, 3), GivenMask(mask)).chosen_faces
    assert [face.box for face in found] == [(30, 20, 80, 60)]
    with pytest.raises(FeedFaceError, match="photo: mask: 64 × 64 pixels, but the photo has 400 × 200"):
        select_from_photo(torch.zeros(200, 400, 3), GivenMask(torch.zeros(64, 64)))


def test_json_round_trip():
    marks = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
    face = DetectedFace((1.25, 2.5, 30, 40), 0.5, marks, torch.ones(4), "mtcnn")
    text = faces_to_json([[face], []])
    assert json.loads(text)[0][0]["box"] == [1.25, 2.5, 30, 40]
    assert "embedding" not in text
    back = faces_from_json(text, photos=2)
    assert back[1] == []
    assert (back[0][0].box, back[0][0].confidence, back[0][0].source) == (face.box, 0.5, "mtcnn")
    torch.testing.assert_close(back[0][0].landmarks, marks)


@pytest.mark.parametrize("text", ["[1, 2, 3, 4]", "[[1, 2, 3, 4]]", "[[[1, 2, 3, 4]]]", '{"box": [1, 2, 3, 4]}'])
def test_short_forms_for_one_photo(text):
    assert [[face.box for face in photo] for photo in faces_from_json(text, 1)] == [[(1, 2, 3, 4)]]


@pytest.mark.parametrize(
    ("text", "photos", "message"),
    [
        ("1, 2, 3, 4", 1, "not JSON"),
        ('"face"', 1, "expected a list"),
        ("[]", 1, "there are 0 lists for 1"),
        ("[[1, 2, 3, 4]]", 2, "there are 1 lists for 2"),
        ("[[[1, 2, 3]]]", 1, "photo 1 of 1: a box is four numbers"),
        ("[[[10, 10, 5, 20]]]", 1, "x0 < x1"),
        ('[[{"x": 1}]]', 1, 'needs the key "box", found the keys'),
        ('[[{"box": [0, 0, 9, 9], "confidence": [1]}]]', 1, "not a face"),
        ('[[{"box": [0, 0, 9, 9], "confidence": "high"}]]', 1, "not a face"),
        ('[[{"box": [0, 0, 9, 9], "landmarks": [[1, 2]]}]]', 1, r"\(5, 2\)"),
        ("[[1, 2, 3, 4], 7]", 1, "there are 2 lists for 1"),
        ("[[[1, 2, 3, 4]], 7]", 2, "photo 2 of 2: expected a list of boxes"),
    ],
)
def test_bad_json_is_refused(text, photos, message):
    with pytest.raises(FeedFaceError, match=message):
        faces_from_json(text, photos)


def test_preview_marks_the_chosen_face_and_leaves_the_rest_of_the_photo():
    photo = torch.full((200, 400, 3), 0.2)
    selection = select_faces(FACES, SIZE, indexes=(0,), min_size=30)
    preview = draw_faces(photo, selection)
    assert preview.shape == (200, 400, 3)
    green, orange, grey = (torch.tensor(c) / 255 for c in ((60, 220, 90), (255, 170, 40), (150, 150, 150)))
    torch.testing.assert_close(preview[109, 340], green)  # lower edge of the chosen, largest face
    torch.testing.assert_close(preview[100, 30], orange)
    torch.testing.assert_close(preview[105, 190], grey)
    torch.testing.assert_close(preview[190, 100], photo[190, 100], atol=2e-3, rtol=0)
    other = draw_faces(photo, select_faces(FACES, SIZE, indexes=(1,), min_size=30))
    assert not torch.equal(other, preview)


def test_preview_of_a_large_photo_is_shrunk_and_of_a_skipped_one_says_so():
    photo = torch.full((1000, 3000, 3), 0.2)
    skipped = select_from_photo(photo, Nothing(), when_none="skip")
    preview = draw_faces(photo, skipped)
    assert preview.shape == (341, 1024, 3)
    assert (preview[:60, :300] - 0.2).abs().max() > 0.3
    torch.testing.assert_close(preview[100:], torch.full_like(preview[100:], 0.2), atol=2e-3, rtol=0)
