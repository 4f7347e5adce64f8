"""The small system: its people, its tokenizer, its optimiser, its parts. Drawing needs Node.js and is skipped
without."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.small_model import autoencoder, drawing, identity, people, text
from examples.small_model.loop import LoopConfig, averaged, pixels, train
from examples.small_model.muon import orthogonalise

DRAWN = "hairBg body ear head eyeLine smileLine miscLine facialHair eye eyebrow hair nose".split()
PARTS = {
    "ids": {part: [f"{part}1", f"{part}2", "none"] for part in DRAWN},
    "genders": {part: ["male", "female", "both"] for part in DRAWN},
}
CONFIG = people.PeopleConfig(train_identities=2, heldout_identities=2, pictures=3, heldout_pictures=2)


def test_a_person_keeps_the_features_and_changes_the_scene():
    specs = [spec for spec, _ in people.specs_of(PARTS, CONFIG, "train", 0)]
    varied = {"teamColors", "jersey", "mouth", "glasses", "accessories"}
    kept = [{k: v for k, v in spec["face"].items() if k not in varied} for spec in specs]
    assert kept[0] == kept[1] == kept[2]
    assert len({json.dumps(spec) for spec in specs}) == 3


def test_people_depend_on_seed_split_and_index_alone():
    again = [record for _, record in people.specs_of(PARTS, CONFIG, "train", 1)]
    more = dataclasses.replace(CONFIG, train_identities=50)
    assert again == [record for _, record in people.specs_of(PARTS, more, "train", 1)]
    faces = [people.identity(PARTS, 0, split, i) for split in people.SPLITS for i in range(40)]
    assert len({json.dumps(face) for face in faces}) == 80  # nobody is in both splits


def test_captions_name_the_scene_and_never_the_person():
    scene = people.Scene("angry", "glasses", "cap", "vest", "orange", "dotted", "blue", "close-up")
    assert scene.caption() == (
        "a close-up of an angry person wearing glasses and a cap and an orange vest, dotted blue background"
    )
    assert scene.caption(np.random.default_rng(0), keep=0.0) == "a person"


def test_box_holds_the_head_at_the_size_of_the_picture():
    rng = np.random.default_rng(0)
    scene = dataclasses.replace(people.scene_of(rng), framing="close-up")
    spec, box = people.picture(people.identity(PARTS, 0, "train", 0), scene, rng)
    height = box[3] - box[1]
    assert height == pytest.approx(400 * spec["scale"] / 2, abs=0.03)
    assert 50 <= height <= 57
    assert (box[0] + box[2]) / 2 == pytest.approx(spec["x"] / 2, abs=0.01)


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="drawing needs Node.js")
@pytest.mark.slow
def test_drawing_gives_pictures_masks_and_records_and_resumes(tmp_path):
    drawing.build(tmp_path, CONFIG, shard=1, log=lambda line: None)
    first = drawing.People.load(tmp_path, "train")
    assert first.pictures.shape == (6, 64, 64, 3)
    assert first.masks.shape == (6, 64, 64)
    assert len(first.records) == 6
    assert first.identities().tolist() == [0, 0, 0, 1, 1, 1]
    for mask, record in zip(first.masks, first.records, strict=True):
        x0, y0, x1, y1 = (int(v) for v in record["box"])
        assert mask[(y0 + y1) // 2, (x0 + x1) // 2] == 255  # the middle of the face is face
        assert mask[:, :1].mean() < 128  # the border is mostly not
    pictures = np.array(first.pictures)
    (tmp_path / "train" / "shards.txt").write_text("0\n")  # as if it had been interrupted after the first shard
    np.lib.format.open_memmap(tmp_path / "train" / "pictures.npy", "r+")[3:] = 0
    drawing.build(tmp_path, CONFIG, shard=1, log=lambda line: None)
    assert (drawing.People.load(tmp_path, "train").pictures == pictures).all()
    with pytest.raises(RuntimeError, match="was drawn with"):
        drawing.build(tmp_path, dataclasses.replace(CONFIG, pictures=4), log=lambda line: None)


def test_every_word_of_a_caption_is_one_token(tmp_path):
    tokenizer = text.write_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(50):
        caption = people.scene_of(rng).caption()
        words = caption.replace(",", " ,").replace("-", " - ").split()
        ids = tokenizer(caption).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == [text.START, *(w + "</w>" for w in words), text.END]
    assert text.tokenize(tokenizer, ["a person", ""]).shape == (2, text.LENGTH)


def test_muon_makes_orthogonal_updates():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 60)))
    assert 0.6 < values.min() and values.max() < 1.3


def _regression(step: int, rng: np.random.Generator, model: nn.Module) -> dict[str, torch.Tensor]:
    x = torch.from_numpy(rng.standard_normal((16, 4))).float() + 0.01 * torch.randn(16, 4)
    return {"loss": ((model(x) - x.flip(1)) ** 2).mean()}


def _train(folder: Path, steps: int, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    loop = LoopConfig(steps=40, batch=16, rate=1e-2, warmup=5, **options)

    def loss_of(step, rng):
        if step == steps:
            raise KeyboardInterrupt
        return _regression(step, rng, model)

    try:
        train("net", folder, model, loop, loss_of, log=lambda line: None)
    except KeyboardInterrupt:
        pass
    return model.state_dict()


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    whole = _train(tmp_path / "whole", 99)
    _train(tmp_path / "parts", 23, checkpoint_seconds=0.0)
    resumed = _train(tmp_path / "parts", 99, checkpoint_seconds=0.0)
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    model, step = averaged("net", tmp_path / "parts", nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)))
    assert step == 40
    assert torch.equal(model[0].weight, whole["0.weight"])


def test_crops_agree_with_the_crops_of_the_core():
    from feedface_core.faces.crop import crop_face

    # a smooth picture, so that bilinear and bicubic resampling agree
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    picture = torch.stack([x, y, (x + y) / 2], -1)  # (H, W, 3)
    box = (20.0, 14.0, 44.0, 50.0)
    ours = identity.crops(picture.movedim(-1, 0)[None] * 2 - 1, torch.tensor([box]))[0]
    core = crop_face(picture, box, size=identity.CROP).movedim(-1, 0) * 2 - 1
    assert (ours - core).abs().max() < 0.02


def test_autoencoder_is_standardised_without_changing_what_it_does():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    drawn = drawing.People(pictures, None, [{}] * 32)
    model = autoencoder.create().eval()
    x = pixels(pictures[:2])
    with torch.no_grad():
        before = model.decode(model.encode(x).latent_dist.mean).sample
        spread = model.encode(x).latent_dist
        autoencoder.standardise(model, drawn, count=32)
        after = model.encode(x).latent_dist
        means = model.encode(pixels(pictures)).latent_dist.mean * autoencoder.SCALE
        assert torch.allclose(model.decode(after.mean).sample, before, atol=1e-4)
    assert means.mean((0, 2, 3)).abs().max() < 1e-3
    assert means.std().item() == pytest.approx(1.0, abs=0.01)
    # mean and spread grew by the same factor
    factor = after.std.mean() / spread.std.mean()
    assert factor.item() == pytest.approx((after.mean.std() / spread.mean.std()).item(), rel=0.3)


@pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="drawing needs Node.js")
@pytest.mark.slow
def test_the_prepare_step_finds_the_same_faces(tmp_path):
    pytest.importorskip("facenet_pytorch")
    from examples.small_model.dataset import write_dataset
    from trainer.data.manifest import read_rows
    from trainer.prepare import main as prepare

    config = people.PeopleConfig(train_identities=20, heldout_identities=1, pictures=3, heldout_pictures=1)
    drawing.build(tmp_path / "people", config, log=lambda line: None)
    ours = drawing.People.load(tmp_path / "people", "train")
    drawn = read_rows(write_dataset(ours, tmp_path / "drawn"))
    prepare(
        [
            str(tmp_path / "drawn" / "pictures"),
            str(tmp_path / "prepared"),
            "detect.detector=mtcnn",
            "filter.minimum_face=16",
            "filter.minimum_sharpness=0",
            "mask.parser=ellipse",
            r"identity.pattern=^(train-\d+)-",
        ]
    )
    found = {Path(row["path"]).stem: row for row in read_rows(tmp_path / "prepared" / "manifest.jsonl")}
    assert len(found) >= 0.8 * len(drawn)  # MTCNN was made for photographs
    overlaps = []
    for row, record in zip(drawn, ours.records, strict=True):
        if row["id"] in found:
            overlaps.append(_overlap(people.detector_box(record["box"]), found[row["id"]]["bbox"]))
            assert found[row["id"]]["identity"] == row["identity"]
    assert np.mean(overlaps) > 0.8 and min(overlaps) > 0.5


def _overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)
