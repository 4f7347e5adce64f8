"""From files to tensors: hashes, the training square, masks, orientation and colour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from feedface_core.faces.background import largest_rectangle, largest_square
from trainer.data.dataset import pictures


def test_perceptual_hash_survives_recompression_only(tmp_path):
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut())
    photo.resize((300, 300)).save(tmp_path / "small.jpg", quality=60)
    again = pictures.open_photo(tmp_path / "small.jpg")
    first = pictures.perceptual_hash(photo)
    assert pictures.hash_distance(first, pictures.perceptual_hash(again)) <= 2
    other = Image.fromarray(data.coffee())
    assert pictures.hash_distance(first, pictures.perceptual_hash(other)) > 15
    assert (
        pictures.hash_distance(first, pictures.perceptual_hash(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 15
    )


@pytest.mark.parametrize(
    ("size", "face", "expected"),
    [
        ((100, 60), None, (20, 0, 60)),
        ((100, 60), (30, 10, 50, 30), (20, 0, 60)),  # inside already
        ((100, 60), (2, 10, 20, 30), (2, 0, 60)),
        ((100, 60), (80, 10, 99.5, 30), (40, 0, 60)),
        ((100, 60), (-8, 10, 20, 30), (0, 0, 60)),  # past the border
        ((60, 100), (10, 5, 50, 45), (0, 5, 60)),
        ((60, 200), (10, 90, 50, 190), (0, 110, 60)),  # longer than the square: centred
        ((64, 64), (0, 0, 64, 64), (0, 0, 64)),
    ],
)
def test_training_square_moves_as_little_as_it_takes(size, face, expected):
    assert largest_square(*size, face) == expected


def test_mask_is_cut_like_the_photo(tmp_path):
    photo = Image.new("RGB", (100, 60), "black")
    photo.paste("white", (40, 20, 60, 40))
    mask = Image.new("L", (50, 30), 0)  # half the photo's size
    mask.paste(23, (20, 10, 30, 20))  # the lowest class of the released masks
    mask.save(tmp_path / "mask.png")
    square = largest_rectangle(100, 60, (1, 1), None)
    pixels = pictures.cut_pixels(photo, square, (60, 60))
    cut = pictures.cut_mask(pictures.read_mask(tmp_path / "mask.png", (100, 60)), (100, 60), square, (6, 6))
    expected = torch.zeros(6, 6)
    expected[2:4, 2:4] = 1.0
    assert torch.equal(cut[0], expected)
    assert torch.equal((pixels[0] > 0).float(), expected.repeat_interleave(10, 0).repeat_interleave(10, 1))
    coarse = pictures.cut_mask(pictures.read_mask(tmp_path / "mask.png", (100, 60)), (100, 60), square, (4, 4))
    assert coarse[0, 1, 1].item() == pytest.approx((10 / 15) ** 2, abs=1e-5)  # the share of the cell it covers


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_mask_turned_by_the_camera_is_read_upright(tmp_path, suffix):
    mask = Image.new("L", (48, 64), 0)
    mask.paste(255, (8, 0, 40, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"turned.{suffix}", exif=exif)
    read = pictures.read_mask(tmp_path / f"turned.{suffix}", (48, 64))
    assert torch.equal(read[:8, 12:36], torch.ones(8, 24)) and read.shape == (64, 48) and read[32:].max() == 0


def test_photos_are_upright_and_in_colour(tmp_path):
    photo = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.open_photo(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("L", (4, 4), 100).save(tmp_path / "grey.png")
    assert pictures.open_photo(tmp_path / "grey.png").getpixel((0, 0)) == (100, 100, 100)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pictures.open_photo(tmp_path / "clear.png").getpixel((0, 0)) == (128, 128, 128)
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert pictures.open_photo(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
