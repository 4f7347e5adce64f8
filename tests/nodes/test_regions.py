"""Several people in one pass of a real ComfyUI model."""

from __future__ import annotations

import pytest
import torch
from support.small_model import apply, prompt, sample


@pytest.fixture
def regions(comfy):
    return comfy.module("nodes.regions").Regions.execute


SIZE = {"width": 128, "height": 128}


def test_several_people_change_the_picture_each_where_it_is(pack, model, adapter, face, other_face, regions) -> None:
    plain = sample(model)
    both = sample(apply(pack, model, adapter, regions(face, other_face, regions="columns", **SIZE).args[0]))
    swapped = sample(apply(pack, model, adapter, regions(other_face, face, regions="columns", **SIZE).args[0]))
    assert not torch.equal(both, plain) and not torch.equal(both, swapped)
    same = sample(apply(pack, model, adapter, regions(face, face, regions="columns", **SIZE).args[0]))
    one = sample(apply(pack, model, adapter, face))
    rounding = 4e-6 * one.abs().max().item()  # of float32 sums in another order, at values of some hundreds
    torch.testing.assert_close(same, one, atol=rounding, rtol=1e-3)
    assert (same - one).norm() < 2e-5 * (one - plain).norm()


def test_model_without_people_is_left_as_it_was(pack, model, adapter, face, other_face, regions) -> None:
    plain = sample(model)
    nowhere = regions(face, other_face, regions="masks", masks=torch.zeros(2, 128, 128), **SIZE).args[0]
    assert torch.equal(sample(apply(pack, model, adapter, nowhere)), plain)
    sample(apply(pack, model, adapter, regions(face, other_face, regions="columns", **SIZE).args[0]))
    assert torch.equal(sample(model), plain)


def test_people_on_one_prompt(pack, model, adapter, face, other_face, regions) -> None:
    people = regions(face, other_face, regions="columns", **SIZE).args[0]
    patched = apply(pack, model, adapter)
    positive = pack.apply.SetFace.execute(conditioning=prompt(1), strength=1.0, face=people).args[0]
    torch.testing.assert_close(
        sample(patched, positive), sample(apply(pack, model, adapter, people), prompt(1)), atol=1e-6, rtol=1e-6
    )


def test_boxes_of_detected_faces_and_best_assignment(pack, comfy, adapter, crops, regions) -> None:
    boxes = "[[[0, 0, 40, 60], [70, 10, 120, 70]]]"
    one, two = (pack.face.EncodeFaces.execute(adapter, crops[n : n + 1]).args[0] for n in (0, 1))
    found = pack.face.EncodeFaces.execute(adapter, crops[[1, 0]]).args[0]
    people, preview, report = regions(one, two, regions="boxes", boxes=boxes, found=found, **SIZE).args
    assert people.faces == (two, one)
    assert preview.shape == (1, 128, 128, 3)
    assert report.startswith("region 1: face 2, likeness 1.000\nregion 2: face 1, likeness 1.000")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"regions": "boxes"}, "boxes: not JSON"),
        ({"regions": "boxes", "boxes": "[[0, 0, 9, 9]]"}, "1 regions for 2 faces"),
        ({"regions": "masks"}, "no masks are connected"),
        ({"regions": "masks", "masks": torch.ones(3, 8, 8)}, "3 regions for 2 faces"),
        ({"regions": "columns", "width": 8}, "width is 8, expected a whole number from 16"),
    ],
)
def test_mistakes_are_named(pack, face, other_face, regions, inputs, message: str) -> None:
    error = pack.face.FeedFaceError
    with pytest.raises(error, match=f"^FeedFace Regions: .*{message}"):
        regions(face, other_face, **{**SIZE, **inputs})


def test_several_people_are_no_face_to_save_or_mix(pack, face, other_face, regions) -> None:
    people = regions(face, other_face, regions="columns", **SIZE).args[0]
    for call in (
        lambda: pack.face.SaveFace.execute(people, "group", False),
        lambda: pack.face.CombineFaces.execute(face, people, 0.5, "average"),
        lambda: regions(face, people, regions="columns", **SIZE),
    ):
        with pytest.raises(pack.face.FeedFaceError, match="several people"):
            call()
