"""The drawn people of the small model. Drawing needs Node.js and is skipped without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.drawn_people import PARTS

from examples.small_model import drawing, people, settings
from trainer.errors import TrainerError


def people_settings(*overrides: str, train: int = 2, heldout: int = 2, pictures: int = 3) -> settings.PeopleSettings:
    counts = (f"train.identities={train}", f"train.pictures={pictures}", f"heldout.identities={heldout}")
    return settings.load([*(f"people.splits.{one}" for one in counts), *overrides]).people


CONFIG = people_settings()


def test_a_person_keeps_the_features_and_changes_the_scene():
    specs = [spec for spec, _ in people.specs_of(PARTS, CONFIG, "train", 0)]
    varied = {"teamColors", "jersey", "mouth", "glasses", "accessories"}
    kept = [{k: v for k, v in spec["face"].items() if k not in varied} for spec in specs]
    assert kept[0] == kept[1] == kept[2]
    assert len({json.dumps(spec) for spec in specs}) == 3


def test_people_depend_on_seed_split_and_index_alone():
    again = [record for _, record in people.specs_of(PARTS, CONFIG, "train", 1)]
    more = people_settings(train=50)
    assert again == [record for _, record in people.specs_of(PARTS, more, "train", 1)]
    splits = {split.number: name for name, split in CONFIG.splits.items() if split.equal_colors is None}
    faces = [people.identity(PARTS, CONFIG, split, i) for split in splits.values() for i in range(40)]
    assert len({json.dumps(face) for face in faces}) == 40 * len(splits) == 160  # nobody is in two of them


def test_without_jitter_every_colour_is_one_of_the_palette():
    fixed = people_settings("people.skin_jitter=0", "people.hair_jitter=0")
    skin = {color for complexion in fixed.complexions.values() for color in complexion.skin}
    hair = {color for complexion in fixed.complexions.values() for color in complexion.hair}
    for i in range(20):
        face = people.identity(PARTS, fixed, "train", i)
        assert face["body"]["color"] in skin and face["hair"]["color"] in hair


def test_people_of_equal_colours_are_the_same_people_in_other_colours():
    fixed = people_settings()
    for i in range(10):
        own, equal = (people.identity(PARTS, fixed, split, i) for split in ("heldout", "heldout-equal"))
        assert (equal["body"]["color"], equal["hair"]["color"]) == fixed.splits["heldout-equal"].equal_colors
        equal["body"]["color"], equal["hair"]["color"] = own["body"]["color"], own["hair"]["color"]
        assert own == equal


def test_features_name_the_nearest_colour_of_the_palette():
    face = people.identity(PARTS, CONFIG, "train", 3)
    face["body"]["color"], face["hair"]["color"] = "#f4d8c9", "#292623"
    named = people.features(face, CONFIG)
    assert named["skin"] == "#f2d6cb" and named["hair color"] == "#272421"
    assert set(named) == set(people.FEATURES) and named["nose"] == face["nose"]["id"]


def test_captions_name_the_scene_and_never_the_person():
    values = ("angry", "glasses", "cap", "vest", "orange", "dotted", "blue", "close-up")
    scene = dict(zip(people.ATTRIBUTES, values, strict=True))
    assert people.caption(scene) == (
        "a close-up of an angry person wearing glasses and a cap and an orange vest, dotted blue background"
    )
    assert people.caption(scene, np.random.default_rng(0), keep=0.0) == "a person"


@pytest.mark.parametrize("size", [64, 128])
def test_box_holds_the_head_at_the_size_of_the_picture(size):
    for spec, record in people.specs_of(PARTS, people_settings(f"people.size={size}"), "train", 0):
        assert spec["mask_size"] == size and spec["size"] == 2 * size
        x0, y0, x1, y1 = (value / size for value in record["box"])
        assert y1 - y0 == pytest.approx(400 * spec["scale"] / people.CANVAS, abs=1e-3)
        assert (x0 + x1) / 2 == pytest.approx(spec["x"] / people.CANVAS, abs=1e-3)
        low, high = CONFIG.framings[record["framing"]]
        assert 400 * low / people.CANVAS - 1e-3 <= y1 - y0 <= 400 * high / people.CANVAS + 1e-3
        (left, level), (right, other) = record["eyes"]
        assert x0 * size < left < right < x1 * size
        assert (right - left) ** 2 + (other - level) ** 2 == pytest.approx((120 * record["unit"]) ** 2, rel=1e-2)


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="drawing needs Node.js")
@pytest.mark.slow
def test_drawing_gives_pictures_masks_and_records_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "SHARD", 1)
    drawing.draw(tmp_path, CONFIG, log=lambda line: None)
    first = drawing.People.load(tmp_path, "train")
    everything = range(len(first))
    pictures, masks = first.pixels(everything), first.masks(everything)
    assert pictures.shape == (6, 3, 64, 64) and masks.shape == (6, 1, 64, 64)
    for x0, y0 in (eye for record in first.records if record["glasses"] == "none" for eye in record["eyes"]):
        assert masks[:, 0, int(y0), int(x0)].max() == 1  # eyes are in heads
    assert first.identities().tolist() == [0, 0, 0, 1, 1, 1]
    assert first.pictures_of(2).tolist() == [[0, 1, 2], [3, 4, 5]]
    for mask, record in zip(masks, first.records, strict=True):
        x0, y0, x1, y1 = (int(v) for v in record["box"])
        assert mask[0, (y0 + y1) // 2, (x0 + x1) // 2] == 1  # the middle of the face is face
        assert mask[0, :, :1].mean() < 0.5  # the border is mostly not
    kept = (tmp_path / "train/00000").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "train/00001")  # as if it had been interrupted after the first person
    (tmp_path / "train/manifest.jsonl").unlink()
    drawing.draw(tmp_path, CONFIG, log=lambda line: None)
    assert torch.equal(drawing.People.load(tmp_path, "train").pixels(everything), pictures)
    assert (tmp_path / "train/00000").stat().st_mtime_ns == kept
    with pytest.raises(TrainerError, match="was drawn with"):
        drawing.draw(tmp_path, people_settings(pictures=4), log=lambda line: None)


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="drawing needs Node.js")
@pytest.mark.slow
def test_the_prepare_step_finds_the_same_faces(tmp_path):
    pytest.importorskip("facenet_pytorch")
    from trainer.data.manifest import read_rows
    from trainer.prepare import main as prepare

    drawing.draw(tmp_path / "people", people_settings(train=20), ["train"], log=lambda line: None)
    ours = drawing.People.load(tmp_path / "people", "train")
    (tmp_path / "photos").mkdir()
    for record in ours.records:
        shutil.copy(ours.folder / record["path"], tmp_path / "photos")
    prepare(
        [
            str(tmp_path / "photos"),
            str(tmp_path / "prepared"),
            "detect.detector=mtcnn",
            "filter.minimum_face=16",
            "filter.minimum_sharpness=0",
            "mask.parser=ellipse",
            r"identity.pattern=^(train-\d+)-",
        ]
    )
    found = {Path(row["path"]).stem: row for row in read_rows(tmp_path / "prepared" / "manifest.jsonl")}
    assert len(found) >= 0.8 * len(ours)  # MTCNN was made for photographs
    overlaps = []
    for record in ours.records:
        if record["id"] in found:
            overlaps.append(_overlap(people.detector_box(record["box"]), found[record["id"]]["bbox"]))
            assert found[record["id"]]["identity"] == record["identity"]
    assert np.mean(overlaps) > 0.8 and min(overlaps) > 0.5


def _overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)
