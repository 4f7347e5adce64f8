"""The stages of preparing photos, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from support.preparation import BOX, make_staged

from feedface_core.faces import DetectedFace, clamp_square
from trainer.config.preparation import CropSettings, FilterSettings, MaskSettings
from trainer.preparation.photo import Drop
from trainer.preparation.stages import Mask, choose_face, cut_crops, sharpness


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ((), ("no face", "")),
        ((BOX, [0, 0, 50, 50]), ("several faces", "2, of 60, 50 pixels")),
        (([50, 30, 80, 60],), ("small face", "30 pixels, wanted 48")),
    ],
)
def test_exactly_one_recognisable_face(boxes, expected):
    with pytest.raises(Drop) as drop:
        choose_face(make_staged(), [DetectedFace(tuple(box)) for box in boxes], FilterSettings())
    assert drop.value.args == expected


def test_small_faces_are_background():
    photo = make_staged()
    photo.face = None
    choose_face(photo, [DetectedFace((0, 0, 20, 20)), DetectedFace(tuple(BOX))], FilterSettings())
    assert photo.face.box == tuple(BOX) and photo.row["bbox"] == BOX


def test_sharpness_neither_depends_on_light_nor_on_size():
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut()).crop((170, 60, 280, 200))

    def measure(picture: Image.Image) -> float:
        picture = picture.resize((48, 48), Image.Resampling.BICUBIC)
        return sharpness(torch.from_numpy(np.array(picture)).float() / 255)

    sharp = measure(photo)
    assert sharp == pytest.approx(0.4, abs=0.3)
    assert measure(photo.point(lambda value: value // 5)) == pytest.approx(sharp, rel=0.1)
    assert measure(photo.resize((220, 280), Image.Resampling.BICUBIC)) == pytest.approx(sharp, rel=0.15)
    assert measure(photo.filter(ImageFilter.GaussianBlur(3))) < 0.25 * sharp


@pytest.mark.parametrize(
    ("square", "expected"),
    [
        ((10, 10, 50, 50), (10, 10, 50, 50)),
        ((-10, 20, 50, 80), (0, 20, 60, 80)),
        ((130, 100, 190, 160), (100, 60, 160, 120)),
        ((-20, -20, 180, 180), (20, 0, 140, 120)),  # longer than the photo is high
    ],
)
def test_square_clamped_to_the_photo(square, expected):
    assert clamp_square(square, 160, 120) == expected


def test_crop_at_the_border_is_padded_or_clamped():
    photos = {}
    for border in ("pad", "clamp"):
        photos[border] = make_staged(box=[-10, 30, 50, 90])
        cut_crops(photos[border], CropSettings(border=border, size=66))
    assert photos["pad"].row["square_bbox"] == [-13.0, 27.0, 53.0, 93.0]
    assert photos["clamp"].row["square_bbox"] == [0.0, 27.0, 66.0, 93.0]
    assert (photos["pad"].crop[:, :10] - 0.5).abs().max() < 1e-5  # grey past the border
    exact = photos["clamp"].image[27:93, 0:66]
    assert (photos["clamp"].crop - exact).abs().max() < 1e-5  # sub-pixel exact: one pixel for one


def test_parser_mask_is_recorded(monkeypatch):
    class Parser:
        name = "test parser"

        def parse(self, image, landmarks):
            mask = torch.zeros(image.shape[:2])
            half = image.shape[0] // 2
            mask[half - 20 : half + 20, half - 10 : half + 10] = 1
            return mask

    monkeypatch.setattr("trainer.preparation.stages.load_parser", lambda roots, device: Parser())
    photo = make_staged()
    points = torch.tensor([[65.0, 50], [95, 50], [80, 62], [70, 75], [90, 75]])
    photo.face = DetectedFace(tuple(BOX), landmarks=points)
    Mask(MaskSettings(), Path())([photo])
    assert photo.row["mask_kind"] == "test parser"
    assert photo.row["mask_area"] == pytest.approx(40 * 20 / (160 * 120), rel=0.02)
