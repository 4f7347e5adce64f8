"""Face recognisers: dlib's own network on photographs, InsightFace and an adapter's encoder through stand-ins."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional

from feedface_core.errors import FeedFaceError
from feedface_core.faces import DetectedFace, DetectorUnavailable, load_detector, load_image, recognisers
from feedface_core.faces.recognisers import (
    DlibRecogniser,
    EncoderRecogniser,
    InsightFaceRecogniser,
    RecogniserUnavailable,
    load_recogniser,
)

BOX = (40.0, 30.0, 90.0, 80.0)
PHOTO = torch.rand(100, 120, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def without_dlib(monkeypatch):
    recognisers._load_dlib.cache_clear()
    monkeypatch.setitem(sys.modules, "dlib", None)
    yield
    recognisers._load_dlib.cache_clear()


def encoder(key: str = "abc") -> EncoderRecogniser:
    """Class tokens that are the place of the box."""
    return EncoderRecogniser(lambda image, faces: torch.tensor([[face.box, face.box] for face in faces]), key)


def test_dlib_tells_photographs_apart(shared_faces):
    pytest.importorskip("dlib", reason="dlib-bin is not installed: dlib's recogniser is not tested")
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed: nothing finds the faces")
    dlib, detector = load_recogniser("dlib"), load_detector("mtcnn")
    people, vectors = [], []
    for name in ("1433_0", "1433_1", "1433_4", "1540_1", "1540_2", "1558_3", "1558_6", "1558_7"):
        image = load_image(shared_faces / f"{name}.jpg")
        face = max(detector.detect(image), key=lambda face: face.area)
        people.append(name[:4])
        vectors.append(dlib.vector(image, face))
    vectors = torch.stack(vectors)
    similarity = dlib.similarity(vectors, vectors)
    same = torch.tensor([[one == other for other in people] for one in people])
    apart = ~torch.eye(len(people), dtype=torch.bool)
    assert vectors.shape == (8, 128) and similarity.diagonal() == pytest.approx(torch.ones(8), abs=1e-3)
    assert similarity[same & apart].mean() > similarity[~same].mean() + 0.2
    assert (similarity[same] >= dlib.same).all()


def test_similarity_of_dlib_is_one_minus_the_distance():
    class Own(DlibRecogniser):
        def __init__(self):
            pass

    one, others = torch.zeros(1, 128), torch.zeros(3, 128)
    others[:, 5] = torch.tensor([0.6, 1.5, 7.0])
    assert Own().similarity(one, others).tolist() == [pytest.approx([0.4, -0.5, -1.0])]
    assert Own.same == pytest.approx(1 - 0.6)


def test_insightface_finds_its_faces_again(monkeypatch):
    mine, other = functional.normalize(torch.randn(2, 512), dim=-1)

    class Detector:
        detail = "buffalo_l"

        def detect(self, image):
            return [
                DetectedFace((200, 30, 250, 80), embedding=other),
                DetectedFace((42, 33, 92, 78), embedding=mine),
                DetectedFace(BOX),  # one that the pack does not recognise
            ]

    asked = []
    monkeypatch.setattr(recognisers, "load_detector", lambda *names, **given: asked.append(given) or Detector())
    recogniser = InsightFaceRecogniser(["/x"], "buffalo_l")
    assert recogniser.name == "insightface/buffalo_l" and asked[0]["recognition"] and asked[0]["model"] == "buffalo_l"
    found = recogniser.vectors(PHOTO, [DetectedFace(BOX), DetectedFace((0, 0, 20, 20))])
    assert torch.equal(found[0], mine) and found[1] is None
    assert recogniser.vectors(PHOTO, []) == []
    expected = float(mine @ other)
    assert float(recogniser.similarity(mine[None], other[None])) == pytest.approx(expected, abs=1e-6)
    # The trainer's distance and the similarity are one threshold.
    assert 1 - recogniser.distance**2 / 2 == pytest.approx(recogniser.same, abs=0.01)


def test_encoder_compares_class_tokens():
    recogniser, faces = encoder(), [DetectedFace(BOX), DetectedFace((0, 0, 9, 5))]
    vectors = torch.stack(recogniser.vectors(PHOTO, faces))
    assert vectors.norm(dim=-1) == pytest.approx(torch.ones(2)) and vectors.shape == (2, 4)
    similarity = recogniser.similarity(vectors, vectors)
    assert similarity.diagonal() == pytest.approx(torch.ones(2)) and 0 < similarity[0, 1] < 1
    assert recogniser.name == "adapter's encoder abc" and recogniser.vectors(PHOTO, []) == []


@pytest.mark.usefixtures("without_dlib")
def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(RecogniserUnavailable, match="pip install dlib-bin face_recognition_models"):
        load_recogniser("dlib")
    with pytest.raises(DetectorUnavailable, match="InsightFace|insightface"):
        load_recogniser("insightface", insightface_roots=[tmp_path])
    with pytest.raises(RecogniserUnavailable, match="needs an adapter"):
        load_recogniser("adapter's encoder")
    with pytest.raises(RecogniserUnavailable, match="no InsightFace models in .*; dlib: .*pip install"):
        load_recogniser(insightface_roots=[tmp_path])
    assert load_recogniser(insightface_roots=[tmp_path], encoder=(weakest := encoder())) is weakest
    with pytest.raises(FeedFaceError, match=r"no face recogniser 'x'; there are: auto, insightface, dlib"):
        load_recogniser("x")


def test_missing_weights_of_dlib_are_named(monkeypatch):
    pytest.importorskip("dlib", reason="dlib-bin is not installed: dlib's recogniser is not tested")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecogniserUnavailable, match="no package face_recognition_models"):
        DlibRecogniser()
