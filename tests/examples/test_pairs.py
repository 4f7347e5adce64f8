"""Pictures of two drawn people: what is in them, and that the trainer reads both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.drawn_people import PARTS

from examples.small_model import denoiser, drawing, people, settings, system
from trainer.config import DataSettings
from trainer.data.buckets import Buckets
from trainer.data.manifest import read_manifest
from trainer.data.references import References
from trainer.errors import TrainerError

CONFIG = settings.load([]).people


def test_two_people_share_a_scene_and_not_a_box():
    singles = {
        record["identity"]: spec for index in (2, 3) for spec, record in people.specs_of(PARTS, CONFIG, "train", index)
    }
    drawn = list(people.pair_specs_of(PARTS, CONFIG, 1, 4))
    assert len({record["id"] for _, record in drawn}) == 4
    for halves, record in drawn:
        assert record["identities"] == ["train-00002", "train-00003"]
        assert halves[0]["background"] == halves[1]["background"]
        for half, who, box, edge in zip(halves, record["identities"], record["boxes"], (0, 64), strict=True):
            kept = ("hair", "head", "nose", "eye", "eyebrow", "ear", "fatness")
            assert all(half["face"][part] == singles[who]["face"][part] for part in kept)
            assert edge < (box[0] + box[2]) / 2 < edge + 64


def test_trainer_reads_both_people_of_a_picture(tmp_path, monkeypatch):
    """Two squares wide, the first one left; each of the two has references in their other pictures."""

    def render(renderer, specs):
        colors = np.array([int(spec["face"]["body"]["color"][1:3], 16) for spec in specs], np.uint8)
        pictures = np.broadcast_to(colors[:, None, None, None], (len(specs), 64, 64, 3))
        return pictures, pictures[..., 0]

    monkeypatch.setattr(drawing, "install_renderer", lambda folder: folder)
    monkeypatch.setattr(drawing, "parts_of", lambda folder: PARTS)
    monkeypatch.setattr(drawing, "render", render)
    pairs = settings.Pairs(identities=4, pictures=3)
    drawing.draw_pairs(tmp_path, CONFIG, pairs)
    drawing.draw_pairs(tmp_path, CONFIG, pairs)  # goes on where nothing is missing
    drawn = drawing.People.load(tmp_path, "pairs")
    assert len(drawn) == 6 and drawn.size == 64
    left, right = (people.identity(PARTS, CONFIG, "train", i)["body"]["color"] for i in (0, 1))
    pixels = ((drawn.pixels([0]) + 1) * 127.5).round()
    assert pixels.shape == (1, 3, 64, 128) and drawn.masks([0]).shape == (1, 1, 64, 128)
    assert (pixels[..., :64] == int(left[1:3], 16)).all() and (pixels[..., 64:] == int(right[1:3], 16)).all()
    data = DataSettings(
        manifest=str(tmp_path / "pairs/manifest.jsonl"), resolution=96, bucket_step=32, augment_variants=0
    )
    records = read_manifest(data.manifest)[0]
    assert {Buckets.of(data).size_of(record) for record in records} == {(128, 64)}  # as they are drawn
    assert [record.identity for record in records[:2]] == ["train-00000", "train-00001"]
    assert len(records) == 12 and all(record.face_count == 2 for record in records)
    references = References(records, data)
    assert references.candidates(0) == [2, 4] and references.candidates(1) == [3, 5]
    with pytest.raises(TrainerError, match="remove it to draw it anew"):
        drawing.draw_pairs(tmp_path, CONFIG, settings.Pairs(identities=4, pictures=2))


def test_trained_with_pictures_of_both_widths(tmp_path):
    """It begins with the weights that are there, and every step of either width changes them."""
    model = system.load_text_to_image(system.FOLDER)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    captions = "a person", "a smiling person wearing glasses"

    class Few:
        size = 64

        def __len__(self):
            return 4

        def words(self, index, rng):
            return captions[index % 2]

    def pictures(width):
        encoded = {"latents": torch.randn(4, 32, 8, width), "faces": torch.ones(4, 1, 8, width)}
        return denoiser.Pictures(Few(), encoded)

    for share in (0, 1):
        stage = settings.load(["unet.steps=1", "unet.batch_size=4", f"unet.pair_share={share}"]).unet
        trained = denoiser.train_denoiser(
            pictures(8), pictures(16), system.load_text_to_image(system.FOLDER), tmp_path / str(share), stage
        )
        moved = {name for name, weight in trained.named_parameters() if not torch.equal(weight, before[name])}
        assert any(name.startswith("unet.") for name in moved) and any(name.startswith("text_") for name in moved)
        changes = [
            float((weight.detach() - before[name].detach()).abs().max()) for name, weight in trained.named_parameters()
        ]
        assert max(changes) < 0.1
