"""Results of the code whose outputs are kept on disk, at its present versions.

Where a test fails because the results are meant to be others: raise the version, and put the new numbers here.
"""

from __future__ import annotations

import pytest
import torch

from feedface_core.faces import DetectedFace, resample
from feedface_core.faces import crop as crops
from feedface_core.faces.background import largest_rectangle
from trainer.data import augmentation, pictures
from trainer.data.augmentation import Augmentation, augmented_crop
from trainer.preparation import masks as parsing
from trainer.preparation.masks import face_mask


@pytest.fixture
def image() -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    return torch.stack([x / 49, y / 39, ((x * y) % 17) / 16], dim=-1)


def test_crop(image):
    assert crops.VERSION == 1
    crop = resample(image, (-20.3, 9.2, 29.7, 59.2), 3, 3)
    expected = [0.4958, 0.1913, 0.405, 0.4968, 0.2627, 0.4269, 0.5, 0.4968, 0.499]
    assert crop[..., 0].flatten().tolist() == pytest.approx(expected, abs=1e-3)


def test_picture_and_mask_of_the_training_square(image):
    assert pictures.VERSION == 1
    square = largest_rectangle(50, 40, (1, 1), (2.0, 5.0, 20.0, 30.0))
    assert square == (2, 0, 40, 40)
    pixels = pictures.cut_pixels(pictures.to_picture(image), square, (16, 16))
    expected = [
        -0.757,
        0.129,
        -0.38,
        -0.271,
        0.067,
        -0.247,
        -0.012,
        0.231,
        0.098,
        -0.059,
        0.059,
        0.043,
        0.341,
        -0.004,
        0.255,
        -0.075,
    ]
    assert pixels[2, ::5, ::5].flatten().tolist() == pytest.approx(expected, abs=2.5 / 127.5)
    mask = (torch.arange(40)[:, None] * torch.arange(50) % 3 == 0).float()
    cut = pictures.cut_mask(mask, (50, 40), square, (3, 3))
    expected = [0.5781, 0.5938, 0.5625, 0.5275, 0.545, 0.51, 0.5781, 0.5938, 0.5625]
    assert cut.flatten().tolist() == pytest.approx(expected, abs=1e-3)


def test_mask_of_a_face(image):
    assert parsing.VERSION == 1
    points = torch.tensor([[15.0, 15], [25, 14], [21, 21], [16, 27], [25, 26]])
    for landmarks, expected in (
        (points, [0.63, 0.692, 0.719, 0.714, 0.676, 0.6, 0.464, 0.165]),
        (None, [0.207, 0.42, 0.514, 0.555, 0.554, 0.511, 0.415, 0.189]),
    ):
        mask, _ = face_mask(image, DetectedFace((10.0, 8.0, 30.0, 34.0), landmarks=landmarks))
        assert mask.mean(1)[::5].tolist() == pytest.approx(expected, abs=1e-3)


def test_augmented_crop(image):
    assert augmentation.VERSION == 1
    changes = Augmentation((0.05, -0.1), 1.1, 15.0, 0.9, 1.2, 0.8, 0.02, 0.05, False, True)
    mask = torch.zeros(20, 25)
    mask[3:15, 4:22] = 1
    crop = augmented_crop(pictures.to_picture(image), (5.0, 2.0, 35.0, 32.0), 24, changes, mask)
    expected = [
        0.536,
        0.417,
        0.464,
        0.5,
        0.498,
        0.499,
        0.5,
        0.5,
        0.5,
        0.63,
        0.426,
        0.3,
        0.409,
        0.296,
        0.456,
        0.204,
        0.208,
        0.438,
        0.562,
        0.631,
        0.496,
        0.352,
        0.58,
        0.441,
        0.394,
        0.491,
        0.502,
    ]
    assert crop[2::9, 2::9].flatten().tolist() == pytest.approx(expected, abs=5e-3)
    drawn = Augmentation.draw(True, "a.jpg", 1)
    assert drawn.shift == pytest.approx((-0.0741303, -0.0243306), abs=1e-6)
    assert drawn.zoom == pytest.approx(0.9406504, abs=1e-6)
    assert (drawn.blur, drawn.background, drawn.flip) == (0.0, False, True)
