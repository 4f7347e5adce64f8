"""Face masks: the ellipse against its own area and axes, Facer through a small TorchScript model made here."""

from __future__ import annotations

import math

import pytest
import torch

from feedface_core.errors import FeedFaceError
from feedface_core.faces import DetectedFace, DetectorUnavailable, load_detector
from trainer.preparation.masks import FacerParser, HeadEllipse, ellipse_mask, face_mask, head_ellipse, load_parser

# Eyes 40 apart, mouth 40 below them, nose half way: a face that looks straight ahead.
FRONTAL = torch.tensor([[80.0, 100], [120, 100], [100, 120], [86, 140], [114, 140]])
FACE = DetectedFace((60, 60, 140, 165), landmarks=FRONTAL)


def turned(degrees: float) -> torch.Tensor:
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return (FRONTAL - 100) @ matrix.T + 100


def test_ellipse_has_the_area_of_an_ellipse_and_soft_edges():
    mask = ellipse_mask(200, 200, HeadEllipse((100.0, 90.0), 40.0, 60.0))
    assert mask.shape == (200, 200)
    assert mask.sum().item() == pytest.approx(math.pi * 40 * 60, rel=2e-3)
    assert mask[90, 100] == 1 and mask[90, 145] == 0 and mask[90, 135] == 1
    edge = ((mask > 0) & (mask < 1)).sum().item()
    assert 0.5 * 315 < edge < 2 * 315  # one pixel wide along a circumference of about 317


def test_ellipse_of_a_tilted_head_is_the_same_ellipse_turned():
    upright = head_ellipse(FACE)
    tilted = head_ellipse(DetectedFace(FACE.box, landmarks=turned(90)))
    assert (tilted.across, tilted.along) == pytest.approx((upright.across, upright.along))
    assert tilted.down == pytest.approx((-1, 0), abs=1e-6)
    a, b = ellipse_mask(200, 200, upright), ellipse_mask(200, 200, tilted)
    torch.testing.assert_close(b, a.flip(0).T, atol=1e-4, rtol=0)


def test_ellipse_spans_chin_and_hair():
    ellipse = head_ellipse(FACE)
    assert ellipse.centre == pytest.approx((100, 92))
    assert ellipse.centre[1] + ellipse.along == pytest.approx(100 + 1.8 * 40)
    assert ellipse.centre[1] - ellipse.along == pytest.approx(100 - 2.2 * 40)
    assert ellipse.across == pytest.approx(60)


@pytest.mark.parametrize("side", [-1, 1])
def test_ellipse_moves_behind_the_nose_when_the_head_turns(side):
    marks = FRONTAL.clone()
    marks[2, 0] += 8 * side
    assert head_ellipse(DetectedFace(FACE.box, landmarks=marks)).centre[0] == pytest.approx(100 - 16 * side)


def test_mask_of_a_face_without_landmarks_covers_its_box():
    image = torch.zeros(200, 200, 3)
    face = DetectedFace((60, 60, 140, 165))
    mask, source = face_mask(image, face)
    assert source == "ellipse from box" and mask.shape == (200, 200)
    assert mask[112, 100] == 1 and mask[5, 5] == 0
    assert mask[60:165, 60:140].mean() > 0.9


def test_mask_at_the_border_and_outside():
    image = torch.zeros(100, 100, 3)
    mask, _ = face_mask(image, DetectedFace((-30, 20, 30, 90)))
    assert mask[50, 0] == 1 and mask[50, 99] == 0
    with pytest.raises(FeedFaceError, match="outside the photo of 100 × 100"):
        face_mask(image, DetectedFace((500, 500, 550, 560)))


class Colour:
    """Takes every red pixel as face."""

    name = "colour"

    def parse(self, image, landmarks):
        self.landmarks = landmarks
        return image[..., 0]


def test_parsed_mask_is_put_back_in_place_and_keeps_one_person():
    image = torch.zeros(240, 300, 3)
    image[70:170, 60:150, 0] = 1  # the person
    image[70:170, 170:200, 0] = 1  # somebody else, in view of the parser
    parser = Colour()
    mask, source = face_mask(image, FACE, parser)
    assert source == "colour"
    expected = torch.zeros(240, 300)
    expected[70:170, 60:150] = 1
    assert (mask - expected).abs().mean() < 0.005
    assert mask[80:160, 175:195].max() == 0
    # The landmarks follow into the region: a square of 4 × 105 pixels around the box, here at its own size.
    assert (parser.landmarks[1] - parser.landmarks[0]).tolist() == pytest.approx([40, 0], abs=0.5)


def test_large_faces_are_parsed_small_and_put_back_large():
    image = torch.zeros(1000, 1200, 3)
    image[200:900, 300:800, 0] = 1
    face = DetectedFace((350, 300, 750, 850), landmarks=FRONTAL * 5)
    mask, _ = face_mask(image, face, Colour())
    expected = torch.zeros(1000, 1200)
    expected[200:900, 300:800] = 1
    assert mask.shape == (1000, 1200)
    assert (mask - expected).abs().mean() < 0.01


def test_parser_that_finds_nothing_gives_way_to_the_ellipse():
    image = torch.zeros(200, 200, 3)
    mask, source = face_mask(image, FACE, Colour())
    assert source == "ellipse from landmarks (colour found nothing)"
    torch.testing.assert_close(mask, face_mask(image, FACE)[0])


class LapaLike(torch.nn.Module):
    """Answers like FaRL on LaPa: 11 classes of logits; red is hair (10), green is face (1), the rest background."""

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.zeros(pictures.shape[0], 11, pictures.shape[2], pictures.shape[3])
        logits[:, 0] = 5.0
        logits[:, 10] = pictures[:, 0] * 20.0
        logits[:, 1] = pictures[:, 1] * 20.0
        return logits, logits


def test_facer_parses_face_and_hair(tmp_path):
    pytest.importorskip("facer")
    torch.jit.script(LapaLike()).save(str(tmp_path / "face_parsing.farl.lapa.main_ema_136500_jit191.pt"))
    parser = load_parser([tmp_path / "absent", tmp_path])
    image = torch.zeros(240, 240, 3)
    image[60:100, 60:140, 0] = 1  # hair
    image[100:170, 60:140, 1] = 1  # face
    mask, source = face_mask(image, FACE, parser)
    assert source == "facer farl/lapa/448"
    expected = torch.zeros(240, 240)
    expected[60:170, 60:140] = 1
    intersection = (mask * expected).sum()
    assert (intersection / (mask + expected - mask * expected).sum()).item() > 0.9
    assert mask[20, 20] == 0


def test_missing_and_broken_parsers_are_named(tmp_path):
    assert load_parser([tmp_path, tmp_path / "absent"]) is None
    with pytest.raises(DetectorUnavailable, match="lapa.pt: no such face parsing model"):
        FacerParser(tmp_path / "lapa.pt")
    pytest.importorskip("facer")
    (tmp_path / "lapa.pt").write_bytes(b"not a model")
    with pytest.raises(DetectorUnavailable, match="lapa.pt: not a face parsing model"):
        FacerParser(tmp_path / "lapa.pt")


def test_mask_of_the_astronaut_covers_face_and_hair_not_the_suit(astronaut):
    pytest.importorskip("facenet_pytorch")
    image = astronaut[0]
    (face,) = load_detector("mtcnn").detect(image)
    mask, source = face_mask(image, face)
    assert source == "ellipse from landmarks"
    assert mask[130, 222] == 1  # nose
    assert mask[50, 215] > 0.5  # hair above the forehead
    assert mask[260:, :].max() == 0  # the suit
    assert mask[:, 380:].max() == 0  # the shuttle
