"""Crop geometry against Pillow and against pictures whose crop can be computed by hand."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from feedface_core.errors import FeedFaceError
from feedface_core.faces import (
    FILL,
    check_box,
    check_image,
    crop_face,
    image_from_pil,
    load_image,
    mask_boxes,
    resample,
    square_box,
)


def ramp(height: int, width: int) -> torch.Tensor:
    """Red grows along x and green along y, each pixel the coordinate of its centre over 1000; blue is
    0.25."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x / 1000, y / 1000, torch.full_like(x, 0.25)], dim=-1)


def test_square_is_on_the_longer_side_times_the_scale():
    assert square_box((10, 20, 30, 60), 1.1) == pytest.approx((-2, 18, 42, 62))
    assert square_box((10, 20, 50, 40), 1.0) == pytest.approx((10, 10, 50, 50))


def test_square_keeps_the_centre_and_may_pass_the_border():
    x0, y0, x1, y1 = square_box((0, 0, 100, 80))
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((50, 40))
    assert (x1 - x0, y1 - y0) == pytest.approx((110, 110))
    assert y0 == pytest.approx(-15)


@pytest.mark.parametrize(
    "box",
    [(10.0, 20.0, 74.0, 84.0), (10.3, 20.7, 90.1, 77.9), (30.25, 30.5, 41.75, 42.0)],
    ids=["same size", "shrinking", "enlarging"],
)
def test_resampling_equals_pillows_bicubic(box):
    generator = torch.Generator().manual_seed(0)
    # Low contrast around the middle, so that neither overshoot is clipped.
    image = 0.4 + 0.2 * torch.rand(120, 110, 1, generator=generator)
    expected = Image.fromarray(image[..., 0].numpy()).resize((64, 48), Image.Resampling.BICUBIC, box=box)
    # Pillow reads only inside the box, so compare where the filter does not reach past it.
    ours = resample(image, box, 48, 64)[..., 0]
    assert ours.shape == (48, 64)
    step = max((box[2] - box[0]) / 64, (box[3] - box[1]) / 48, 1.0)
    edge = math.ceil(2 * step / min((box[2] - box[0]) / 64, (box[3] - box[1]) / 48)) + 1
    inner = (slice(edge, -edge), slice(edge, -edge))
    assert ours[inner].numel() > 100
    torch.testing.assert_close(ours[inner], torch.from_numpy(numpy.array(expected))[inner], atol=2e-5, rtol=0)


def test_crop_is_exact_to_a_fraction_of_a_pixel():
    # The filter reproduces a linear ramp, to a fiftieth of a pixel: sample i of 32 lies at x0 + (i + 0.5) *
    # side / 32.
    crop = crop_face(ramp(200, 200), (60.3, 70.6, 92.3, 102.6), size=32, scale=1.5)
    centres = 76.3 - 24 + (torch.arange(32) + 0.5) * 48 / 32
    torch.testing.assert_close(crop[16, :, 0], centres / 1000, atol=2e-5, rtol=0)
    torch.testing.assert_close(crop[:, 16, 1], (centres + 10.3) / 1000, atol=2e-5, rtol=0)
    torch.testing.assert_close(crop[..., 2], torch.full((32, 32), 0.25), atol=1e-5, rtol=0)


@pytest.mark.parametrize("box", [(-20.0, 30, 20, 70), (80.0, 30, 120, 70)], ids=["left", "right"])
def test_square_past_the_border_is_padded_not_cut(box):
    crop = crop_face(torch.ones(100, 100, 3), box, size=40, scale=1.0)
    assert crop.shape == (40, 40, 3)
    halves = crop[:, :18], crop[:, 22:]
    outside, inside = halves if box[0] < 0 else halves[::-1]
    torch.testing.assert_close(outside, torch.full_like(outside, FILL))
    torch.testing.assert_close(inside, torch.ones_like(inside))


def test_crop_of_a_picture_smaller_than_the_square_holds_all_of_it():
    crop = crop_face(torch.zeros(10, 20, 3), (0, 0, 20, 10), size=200, scale=2.0, fill=1.0)
    # 20 × 10 pixels in a square of 40: a share of 1/8.
    assert (1 - crop).mean().item() == pytest.approx(1 / 8, abs=1e-3)


def test_whole_picture_at_its_own_size_is_unchanged():
    image = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(crop_face(image, (0, 0, 32, 32), size=32, scale=1.0), image, atol=1e-6, rtol=0)


def test_shrinking_is_antialiased():
    stripes = (torch.arange(400) % 2).float().expand(400, 400).unsqueeze(-1).expand(400, 400, 3)
    crop = crop_face(stripes, (50, 50, 350, 350), size=30, scale=1.0)
    # Every pixel of the result covers ten stripes: grey, where picking pixels would give black or white.
    torch.testing.assert_close(crop, torch.full((30, 30, 3), 0.5), atol=0.02, rtol=0)


def test_tiny_face_is_enlarged_in_range():
    image = torch.zeros(50, 50, 3)
    image[23:28, 23:28] = 1.0
    crop = crop_face(image, (23, 23, 28, 28), size=224)
    assert crop.shape == (224, 224, 3)
    assert crop.min() >= 0 and crop.max() <= 1
    assert crop[112, 112].tolist() == pytest.approx([1, 1, 1])


def test_crop_passes_gradients_to_the_photo():
    image = torch.full((20, 20, 3), 0.5, requires_grad=True)
    crop_face(image, (4, 4, 16, 16), size=8).sum().backward()
    assert image.grad[10, 10].sum() > 0 and image.grad[0, 0].sum() == 0


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)])
def test_greyscale_is_repeated(shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    checked = check_image(image)
    assert checked.shape == (4, 6, 3)
    for channel in range(3):
        torch.testing.assert_close(checked[..., channel], image.reshape(4, 6))


def test_alpha_is_composited_on_grey():
    image = torch.ones(2, 2, 4)
    image[0, 0, 3], image[0, 1, 3] = 0.0, 0.5
    checked = check_image(image)
    assert checked[0, 0].tolist() == pytest.approx([FILL] * 3)
    assert checked[0, 1].tolist() == pytest.approx([0.75] * 3)
    assert checked[1, 1].tolist() == pytest.approx([1.0] * 3)


def test_small_overshoot_is_clamped():
    image = torch.full((3, 3, 3), 1.1)
    image[0, 0] = -0.1
    assert check_image(image).aminmax() == (0.0, 1.0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((4, 4, 3), float("nan")), "NaN"),
        (torch.full((4, 4, 3), float("inf")), "infinite"),
        (torch.full((4, 4, 3), 200.0), "0..1, found 200"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "divide by 255"),
        (torch.zeros(1, 4, 4, 3), r"\(1, 4, 4, 3\)"),
        (torch.zeros(4, 4, 5), r"\(4, 4, 5\)"),
        (torch.zeros(0, 4, 3), r"\(0, 4, 3\)"),
        ("photo.png", "found str"),
    ],
)
def test_unusable_image_is_refused(image, message):
    with pytest.raises(FeedFaceError, match=message):
        check_image(image)


def test_one_nan_pixel_is_noticed():
    image = torch.rand(64, 64, 3)
    image[40, 3, 1] = float("nan")
    with pytest.raises(FeedFaceError, match="NaN"):
        crop_face(image, (0, 0, 10, 10))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 20), "x0 < x1"),
        ((30, 10, 10, 20), "x0 < x1"),
        ((0, 0, float("nan"), 5), "finite"),
        ((1, 2, 3), "four numbers"),
        ("abcd", "four numbers"),
        (None, "four numbers"),
    ],
)
def test_unusable_box_is_refused(box, message):
    with pytest.raises(FeedFaceError, match=message):
        check_box(box)


def test_other_bad_crops_are_refused():
    image = torch.zeros(50, 50, 3)
    with pytest.raises(FeedFaceError, match="outside the photo of 50 × 50"):
        crop_face(image, (60, 0, 90, 30))
    with pytest.raises(FeedFaceError, match="more than 16 times as large as the photo of 50 × 50"):
        crop_face(image, (0, 0, 1e6, 1e6))
    with pytest.raises(FeedFaceError, match="scale"):
        crop_face(image, (0, 0, 9, 9), scale=0)
    with pytest.raises(FeedFaceError, match="size"):
        crop_face(image, (0, 0, 9, 9), size=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_is_turned_upright_by_exif(tmp_path, orientation):
    upright = numpy.zeros((30, 40, 3), dtype=numpy.uint8)
    upright[:15, :20] = 255  # upper left quarter
    # What a camera stores is the picture that the orientation turns into the upright one.
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    turned = Image.fromarray(upright)
    marker = Image.Exif()
    marker[0x0112] = undo
    turned.info["exif"] = marker.tobytes()
    turned.getexif()[0x0112] = undo
    stored = ImageOps.exif_transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    assert Image.open(path).size == ((30, 40) if orientation >= 5 else (40, 30))
    image = load_image(path)
    assert image.shape == (30, 40, 3)
    torch.testing.assert_close(image, torch.from_numpy(upright).float() / 255)


def test_pillow_modes():
    grey16 = Image.fromarray(numpy.full((3, 5), 65535 // 2, dtype=numpy.uint16))
    assert image_from_pil(grey16)[1, 1].tolist() == pytest.approx([0.5] * 3, abs=1e-4)
    transparent = Image.new("RGBA", (5, 3), (255, 0, 0, 0))
    assert image_from_pil(transparent)[0, 0].tolist() == pytest.approx([FILL] * 3)
    assert image_from_pil(Image.new("LA", (5, 3), (255, 255)))[0, 0].tolist() == pytest.approx([1] * 3)
    assert image_from_pil(Image.new("CMYK", (5, 3), (0, 0, 0, 0))).shape == (3, 5, 3)
    palette = Image.new("P", (5, 3), 0)
    palette.putpalette([0, 255, 0])
    assert image_from_pil(palette)[0, 0].tolist() == pytest.approx([0, 1, 0])
    palette.info["transparency"] = 0
    assert image_from_pil(palette)[0, 0].tolist() == pytest.approx([FILL] * 3)


def test_unreadable_photo_is_named(tmp_path):
    with pytest.raises(FeedFaceError, match="missing.jpg: no such photo"):
        load_image(tmp_path / "missing.jpg")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(FeedFaceError, match="text.jpg: not a photo"):
        load_image(tmp_path / "text.jpg")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(FeedFaceError, match="cut.png: not a photo"):
        load_image(tmp_path / "cut.png")


def test_mask_gives_one_box_a_region_largest_first_without_specks():
    mask = torch.zeros(60, 80)
    mask[5:15, 10:30] = 1
    mask[30:55, 40:70] = 0.9
    mask[0, 79] = 1  # a speck
    assert mask_boxes(mask) == [(40, 30, 70, 55), (10, 5, 30, 15)]
    assert mask_boxes(torch.zeros(10, 10)) == []
    with pytest.raises(FeedFaceError, match=r"\(1, 10, 10\)"):
        mask_boxes(torch.zeros(1, 10, 10))


def test_crop_at_the_border_is_filled_up_or_moved_inside():
    image = torch.rand(60, 80, 3, generator=torch.Generator().manual_seed(0))
    box = (-4.0, 10.0, 36.0, 50.0)
    padded = crop_face(image, box, 44, 1.1, fill=0.25)
    assert (padded[:, :4] - 0.25).abs().max() < 1e-5
    clamped = crop_face(image, box, 44, 1.1, border="clamp")
    torch.testing.assert_close(clamped, image[8:52, 0:44], atol=1e-5, rtol=0)
    with pytest.raises(FeedFaceError, match="the border of the crop is 'cut', expected one of pad, clamp"):
        crop_face(image, box, border="cut")
