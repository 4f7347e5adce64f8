"""FeedFace Score and FeedFace Best Of: which picture is most like the references, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SMALL = Path(__file__).parents[2] / "models/feedface_small"
DRAWN = {"recogniser": "adapter's encoder", "detector": "whole image"}


@pytest.fixture(scope="module")
def nodes(comfy):
    return comfy.module("nodes.likeness")


@pytest.fixture(scope="module")
def drawn(comfy):
    """The small model's adapter, and four drawings ``(4, 64, 64, 3)`` of each of its three people."""
    adapter = comfy.module("nodes.adapter").LoadedAdapter(str(SMALL / "adapter/feedface_small.safetensors"))
    load = comfy.module("feedface_core.faces").load_image
    names = [[f"feedface_person{person}_{number}.png" for number in range(1, 5)] for person in (1, 2, 3)]
    return adapter, [torch.stack([load(SMALL / "people" / name) for name in own]) for own in names]


def test_drawn_people_are_told_apart(nodes, drawn):
    adapter, people = drawn
    batch = torch.cat([people[1][2:], people[0][2:], people[2][2:]])  # two drawings of each
    for person, own in ((0, (2, 3)), (1, (0, 1)), (2, (4, 5))):
        found = {**DRAWN, "detector": "mtcnn"}  # the encoder knows crops of heads, not whole pictures
        result = nodes.Score.execute(batch, people[person][:2], adapter=adapter, **found)
        scores, report = result.args
        assert len(scores) == 6 and all(-1 <= score <= 1 for score in scores)
        assert min(scores[place] for place in own) > max(scores[n] for n in range(6) if n not in own)
        assert f"recogniser: adapter's encoder {adapter.encoder_fingerprint}" in report and "references: 2" in report
        assert f"picture 1: {scores[0]:.3f}" in report and result.ui.as_dict()["text"] == (report,)


def test_the_most_similar_face_of_a_picture_counts(nodes, drawn, monkeypatch, comfy):
    adapter, people = drawn
    faces = comfy.module("feedface_core.faces")

    class Halves(faces.WholeImage):
        """Finds a face on either side of a picture that is twice as wide as high, none in a black one."""

        def find(self, image):
            height, width = image.shape[:2]
            if not image.any():
                return []
            return [faces.DetectedFace((x, 0, x + height, height)) for x in range(0, width, height)]

    monkeypatch.setattr(nodes, "load_detector", lambda *_, **__: Halves())
    two = torch.cat([people[1][3], people[0][3]], dim=1)[None]  # (1, 64, 128, 3)
    (both,), report = nodes.Score.execute(two, people[0][:2], adapter=adapter, **DRAWN).args
    (alone,), _ = nodes.Score.execute(people[0][3:], people[0][:2], adapter=adapter, **DRAWN).args
    # The same but for the padding of the crop, which holds a little of the neighbour.
    assert both == pytest.approx(alone, abs=0.1) and "the most similar of 2 faces" in report
    black = torch.zeros(1, 64, 64, 3)
    found = nodes.Score.execute(torch.cat([people[0][3:], black]), people[0][:2], adapter=adapter, **DRAWN)
    scores, report = found.args
    assert scores[1] == -1.0 and "picture 2: -1 (no face found)" in report
    some = torch.cat([people[0][:1], black])
    assert "references: 1; no face in 2" in nodes.Score.execute(two, some, adapter=adapter, **DRAWN).args[1]
    error = faces.NoFaceError
    with pytest.raises(error, match=r"FeedFace Score: references: no face found in any of 1 photo\(s\)"):
        nodes.Score.execute(two, black, adapter=adapter, **DRAWN)


def test_best_are_sorted_with_their_latents(nodes, drawn):
    adapter, people = drawn
    batch = torch.cat([people[1][2:], people[0][2:], people[2][2:]])
    scores, _ = nodes.Score.execute(batch, people[0][:2], adapter=adapter, **DRAWN).args
    order = sorted(range(6), key=lambda place: -scores[place])
    latents = {"samples": torch.arange(6.0).view(6, 1, 1, 1).expand(6, 4, 8, 8), "noise_mask": torch.rand(6, 1, 64, 64)}
    options = {"references": people[0][:2], "adapter": adapter, **DRAWN}
    best = nodes.BestOf.execute(batch, count=3, latents=latents, **options)
    images, kept, indexes, sorted_latents, report = best.args
    assert indexes == order[:3] and kept == [scores[place] for place in order[:3]]
    assert torch.equal(images, batch[indexes]) and kept == sorted(kept, reverse=True)
    assert sorted_latents["samples"][:, 0, 0, 0].tolist() == indexes == sorted_latents["batch_index"]
    assert torch.equal(sorted_latents["noise_mask"], latents["noise_mask"][indexes])
    assert latents.keys() == {"samples", "noise_mask"}  # what came in is as it was
    assert f"kept: picture {order[0] + 1} ({kept[0]:.3f})" in report
    everything = nodes.BestOf.execute(batch, count=99, **options).args
    assert everything[2] == order
    blocked = everything[3]
    assert type(blocked).__name__ == "ExecutionBlocker" and "connect those of the pictures" in blocked.message
    renamed = nodes.BestOf.execute(batch, latents={**latents, "batch_index": list(range(10, 16))}, **options).args
    assert renamed[3]["batch_index"] == [10 + order[0]]


def test_minimum_is_a_gate(nodes, drawn, comfy):
    adapter, people = drawn
    batch = torch.cat([people[0][2:], people[1][2:]])
    options = {"references": people[0][:2], "adapter": adapter, "count": 4, **DRAWN}
    scores = nodes.BestOf.execute(batch, **options).args[1]
    assert nodes.BestOf.execute(batch, minimum=scores[1], **options).args[1] == scores[:2]
    error = comfy.module("feedface_core.errors").FeedFaceError
    with pytest.raises(error, match=r"FeedFace Best Of: none of 4 pictures reaches the minimum of 1; the best has 0\."):
        nodes.BestOf.execute(batch, minimum=1.0, **options)
    nothing = nodes.BestOf.execute(batch, minimum=1.0, when_none="nothing", **options)
    *blocked, report = nothing.args
    assert [type(one).__name__ for one in blocked] == ["ExecutionBlocker"] * 4
    assert all(one.message is None for one in blocked) and "kept: nothing; none of 4 pictures" in report


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ({"samples": torch.zeros(3, 4, 8, 8)}, "latents: 3 for 1 pictures"),
        ({"samples": None}, "latents is .*, expected what an output LATENT gives"),
        (torch.zeros(1, 4, 8, 8), "latents is .*, expected what an output LATENT gives"),
    ],
)
def test_latents_of_other_pictures_are_refused(nodes, drawn, comfy, latents, message):
    adapter, people = drawn
    with pytest.raises(comfy.module("feedface_core.errors").FeedFaceError, match=message):
        nodes.BestOf.execute(people[0][:1], people[0][1:], latents=latents, adapter=adapter, **DRAWN)


def test_missing_adapter_is_named(nodes, drawn, comfy):
    _, people = drawn
    with pytest.raises(comfy.module("feedface_core.errors").FeedFaceError, match="needs an adapter"):
        nodes.Score.execute(people[0], people[0], **DRAWN)


def test_photographs_with_dlib(nodes, comfy, shared_faces):
    pytest.importorskip("dlib", reason="dlib-bin is not installed: dlib's recogniser is not tested")
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed: nothing finds the faces")
    load = comfy.module("feedface_core.faces").load_image
    photos = {name: load(shared_faces / f"{name}.jpg") for name in ("1540_1", "1540_3", "1540_5", "1433_1", "1558_3")}
    batch = torch.stack([photos[name] for name in ("1433_1", "1540_5", "1558_3")])
    known = torch.stack([photos["1540_1"], photos["1540_3"]])
    best = nodes.BestOf.execute(batch, known, recogniser="dlib", detector="mtcnn", count=3)
    _, scores, indexes, _, report = best.args
    assert indexes[0] == 1 and scores[0] > 0.4 > scores[1] and "recogniser: dlib" in report
