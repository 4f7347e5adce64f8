"""The detectors on real photographs, InsightFace through its own FaceAnalysis with two small models made
here."""

from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from feedface_core.errors import FeedFaceError
from feedface_core.faces import (
    DetectedFace,
    DetectorUnavailable,
    NoFaceError,
    WholeImage,
    crop_face,
    draw_faces,
    find_insightface_packs,
    load_detector,
    load_image,
    select_from_photo,
    shrink,
)

INPUT_SIDE = 640
# One face: an anchor of stride 32 at (320, 192) with distances of 3, 2, 4 and 5 strides to the sides of its
# box.
STRIDE, ANCHOR, DISTANCES = 32, (320, 192), (3.0, 2.0, 4.0, 5.0)
BOX = (224, 128, 448, 352)


def intersection_over_union(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def save_onnx(path: Path, inputs, nodes, outputs, initializers=()) -> None:
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info(name, floats, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, floats, shape) for name, shape in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


def save_face_detector(path: Path, score: float = 0.8) -> None:
    """Scores, boxes and landmarks for strides 8, 16 and 32: the shape of an SCRFD model, with constant
    answers."""
    from onnx import helper

    widths = {"score": 1, "box": 4, "marks": 10}
    outputs, initializers, nodes = [], [], []
    for kind, width in widths.items():
        for stride in (8, 16, 32):
            cells = INPUT_SIDE // stride
            values = numpy.zeros((cells * cells * 2, width), dtype=numpy.float32)
            if stride == STRIDE:
                row = 2 * (ANCHOR[1] // stride * cells + ANCHOR[0] // stride)
                marks = [-1, 0, 1, 0, 0, 1, -1, 2, 1, 2]
                values[row] = {"score": score, "box": DISTANCES, "marks": marks}[kind]
            name = f"{kind}_{stride}"
            initializers.append((f"{name}_constant", values))
            nodes.append(helper.make_node("Identity", [f"{name}_constant"], [name]))
            outputs.append((name, list(values.shape)))
    save_onnx(path, [("input", [1, 3, INPUT_SIDE, INPUT_SIDE])], nodes, outputs, initializers)


def save_face_recogniser(path: Path) -> None:
    """112 × 112 to 512 numbers: a projection of the mean colour of a coarse grid."""
    from onnx import helper

    weights = numpy.random.default_rng(0).standard_normal((3 * 4 * 4, 512)).astype(numpy.float32)
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
    ]
    save_onnx(path, [("input", ["N", 3, 112, 112])], nodes, [("embedding", ["N", 512])], [("weights", weights)])


@pytest.fixture(scope="session")
def insightface_root(tmp_path_factory) -> Path:
    pytest.importorskip("insightface")
    root = tmp_path_factory.mktemp("models") / "insightface"
    save_face_detector(root / "models/buffalo_l/det.onnx")
    save_face_recogniser(root / "models/buffalo_l/rec.onnx")
    return root


@pytest.fixture(scope="session")
def mtcnn():
    pytest.importorskip("facenet_pytorch")
    return load_detector("mtcnn")


@pytest.fixture
def portrait(astronaut) -> torch.Tensor:
    return astronaut[0]


# ---- InsightFace


def test_insightface_finds_the_face_in_pixels_of_the_photo(insightface_root):
    detector = load_detector("insightface", insightface_roots=[insightface_root])
    faces = detector.detect(torch.rand(320, 320, 3))  # half the size the detector works on
    assert len(faces) == 1
    assert faces[0].box == pytest.approx([v / 2 for v in BOX], abs=1e-3)
    assert faces[0].confidence == pytest.approx(0.8, abs=1e-5)
    # Eyes one stride left and right of the anchor, in the order left eye, right eye, nose, mouth.
    assert faces[0].landmarks.tolist()[:2] == [pytest.approx([144, 96]), pytest.approx([176, 96])]
    assert faces[0].embedding is None and faces[0].source == "insightface"
    assert "buffalo_l" in detector.description and "non-commercial research only" in detector.description


def test_boxes_of_a_large_photo_are_scaled_back(insightface_root):
    detector = load_detector("insightface", insightface_roots=[insightface_root])
    (face,) = detector.detect(torch.rand(1500, 3000, 3))
    # The photo is 1024 wide after shrinking and 640 wide for the detector.
    assert face.box == pytest.approx([v * 3000 / 640 for v in BOX], rel=2e-3)


def test_embedding_is_of_unit_length_and_tells_pictures_apart(insightface_root, portrait):
    detector = load_detector("insightface", insightface_roots=[insightface_root], recognition=True)
    same = detector.detect(portrait)[0].embedding
    assert same.shape == (512,)
    assert same.norm().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(detector.detect(portrait)[0].embedding, same)
    other = detector.detect(1 - portrait)[0].embedding
    assert torch.dot(same, other).item() < 0.5


def test_red_and_blue_are_passed_in_the_order_insightface_expects(insightface_root, monkeypatch):
    detector = load_detector("insightface", insightface_roots=[insightface_root])
    seen = []
    analysis = SimpleNamespace(prepare=lambda **_: None, get=lambda pixels: seen.append(pixels) or [], det_model=None)
    picture = torch.tensor([1.0, 0.5, 0.0]).expand(40, 40, 3)
    monkeypatch.setattr(detector, "analysis", analysis)
    assert detector.detect(picture) == []
    assert seen[0].dtype == numpy.uint8 and seen[0][3, 3].tolist() == [0, 128, 255]


def test_smaller_detector_sizes_are_tried_when_nothing_is_found(insightface_root, monkeypatch):
    detector = load_detector("insightface", insightface_roots=[insightface_root])
    sizes = []
    found = SimpleNamespace(bbox=numpy.array([1.0, 2, 30, 40]), det_score=0.7, kps=None, embedding=None)
    analysis = SimpleNamespace(
        prepare=lambda det_size, **_: sizes.append(det_size[0]),
        get=lambda pixels: [found] if sizes[-1] == 320 else [],
        det_model=None,
    )
    monkeypatch.setattr(detector, "analysis", analysis)
    assert [face.box for face in detector.detect(torch.rand(64, 64, 3))] == [(1, 2, 30, 40)]
    assert sizes == [640, 320]


def test_threshold_is_passed_on(insightface_root):
    strict = load_detector("insightface", insightface_roots=[insightface_root], threshold=0.9)
    assert strict.detect(torch.rand(64, 64, 3)) == []


def test_packs_are_found_in_order_of_preference_and_in_doubled_folders(tmp_path):
    for folder in (
        "zoo/models/my_pack",
        "zoo/models/antelopev2/antelopev2",
        "other/models/buffalo_l",
        "zoo/models/empty",
    ):
        (tmp_path / folder).mkdir(parents=True)
        if not folder.endswith("empty"):
            (tmp_path / folder / "a.onnx").touch()
    packs = find_insightface_packs([tmp_path / "zoo", tmp_path / "other", tmp_path / "absent"])
    assert list(packs) == ["antelopev2", "buffalo_l", "my_pack"]
    assert packs["antelopev2"] == tmp_path / "zoo/models/antelopev2/antelopev2"


def test_missing_model_files_are_an_error_that_says_where_it_looked(tmp_path):
    with pytest.raises(DetectorUnavailable) as caught:
        load_detector("insightface", insightface_roots=[tmp_path / "insightface"])
    assert str(tmp_path / "insightface/models/<name>") in str(caught.value)
    assert not (tmp_path / "insightface").exists()  # nothing was created, nothing was downloaded


def test_unknown_pack_names_those_that_are_there(insightface_root):
    with pytest.raises(DetectorUnavailable, match="named 'buffalo_x'; found: buffalo_l"):
        load_detector("insightface", insightface_roots=[insightface_root], model="buffalo_x")


def test_folder_without_a_detector_and_broken_files_are_named(tmp_path):
    pytest.importorskip("insightface")
    save_face_recogniser(tmp_path / "a/models/pack/rec.onnx")
    with pytest.raises(DetectorUnavailable, match=r"models/pack \(.onnx files: rec.onnx\): none of them is a face"):
        load_detector("insightface", insightface_roots=[tmp_path / "a"])
    (tmp_path / "b/models/pack").mkdir(parents=True)
    (tmp_path / "b/models/pack/det.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DetectorUnavailable, match="det.onnx"):
        load_detector("insightface", insightface_roots=[tmp_path / "b"])


def test_pack_without_a_recogniser_is_refused_for_recognition_only(tmp_path):
    pytest.importorskip("insightface")
    save_face_detector(tmp_path / "models/pack/det.onnx")
    assert load_detector("insightface", insightface_roots=[tmp_path]).detect(torch.rand(64, 64, 3))
    with pytest.raises(DetectorUnavailable, match="no face recogniser"):
        load_detector("insightface", insightface_roots=[tmp_path], recognition=True)


# ---- choice


def test_auto_prefers_insightface_and_falls_back_to_mtcnn(insightface_root, mtcnn, tmp_path):
    assert load_detector(insightface_roots=[insightface_root]).name == "insightface"
    assert load_detector(insightface_roots=[tmp_path]).name == "mtcnn"


def test_auto_passes_over_models_that_do_not_work(mtcnn, tmp_path):
    pytest.importorskip("insightface")
    (tmp_path / "models/pack").mkdir(parents=True)
    (tmp_path / "models/pack/det.onnx").write_bytes(b"broken")
    assert load_detector(insightface_roots=[tmp_path]).name == "mtcnn"


def test_without_any_detector_the_error_lists_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    hidden = {"insightface", "onnxruntime", "facenet_pytorch"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else real(name, *a))
    with pytest.raises(DetectorUnavailable) as caught:
        load_detector()
    for part in ("pip install insightface", "pip install facenet-pytorch", "'whole image'", "boxes or a mask"):
        assert part in str(caught.value)


def test_missing_package_of_a_named_detector_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "facenet_pytorch":
            raise ImportError("No module named 'facenet_pytorch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DetectorUnavailable, match="pip install facenet-pytorch==2.5.3"):
        load_detector("mtcnn", threshold=0.123)


def test_loaded_detectors_are_reused(mtcnn, insightface_root):
    assert load_detector("mtcnn") is mtcnn
    roots = [insightface_root]
    first = load_detector("insightface", insightface_roots=roots)
    assert load_detector("insightface", insightface_roots=roots) is first
    assert load_detector("insightface", insightface_roots=roots, recognition=True) is not first


def test_unknown_detector_and_recognition_by_mtcnn_are_refused():
    with pytest.raises(
        FeedFaceError, match="no face detector 'dlib'; there are: auto, insightface, mtcnn, whole image"
    ):
        load_detector("dlib")
    with pytest.raises(DetectorUnavailable, match="does not recognise"):
        load_detector("mtcnn", recognition=True)


def test_whole_image_and_shrink():
    (face,) = WholeImage().detect(torch.rand(3000, 1500, 3))
    assert face.box == pytest.approx((0, 0, 1500, 3000))
    assert shrink(torch.rand(100, 50, 3)).shape == (100, 50, 3)
    small = shrink(torch.full((3000, 7, 3), 0.25))
    assert small.shape == (1024, 2, 3)
    torch.testing.assert_close(small, torch.full_like(small, 0.25))


# ---- MTCNN


def test_mtcnn_finds_the_astronaut(mtcnn, portrait):
    faces = mtcnn.detect(portrait)
    assert len(faces) == 1
    assert intersection_over_union(faces[0].box, (176, 66, 272, 190)) > 0.75
    assert faces[0].confidence > 0.99
    left, right, nose, *mouth = faces[0].landmarks.tolist()
    assert left[0] < nose[0] < right[0] and left[1] < nose[1] < mouth[0][1]
    assert "MIT" in mtcnn.description


@pytest.mark.parametrize("factor", [0.5, 3])
def test_mtcnn_box_scales_with_the_photo(mtcnn, portrait, factor):
    reference = mtcnn.detect(portrait)[0].box
    planes = portrait.permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(planes, scale_factor=factor, mode="bilinear", antialias=True)[0]
    largest = max(mtcnn.detect(scaled.clamp(0, 1).permute(1, 2, 0)), key=lambda face: face.area)
    assert intersection_over_union([v / factor for v in largest.box], reference) > 0.85


def test_mtcnn_in_grey_with_alpha_and_in_tiny_pictures(mtcnn, portrait):
    reference = mtcnn.detect(portrait)[0].box
    assert intersection_over_union(mtcnn.detect(portrait.mean(dim=-1))[0].box, reference) > 0.8
    with_alpha = torch.cat([portrait, torch.ones(512, 512, 1)], dim=-1)
    assert mtcnn.detect(with_alpha)[0].box == pytest.approx(reference)
    for shape in ((1, 1), (5, 5), (19, 400), (20, 20), (21, 300)):
        assert mtcnn.detect(torch.rand(*shape, 3, generator=torch.Generator().manual_seed(0))) == []


def test_mtcnn_finds_nothing_in_a_flat_picture(mtcnn):
    with pytest.raises(NoFaceError):
        select_from_photo(torch.full((256, 256, 3), 0.5), mtcnn)


def test_failure_inside_mtcnn_names_the_photo(mtcnn, monkeypatch):
    def fail(*_, **__):
        raise IndexError("The shape of the mask [3] does not match")

    monkeypatch.setattr(mtcnn.network, "detect", fail)
    with pytest.raises(FeedFaceError, match="photo of 60 × 40 pixels .The shape of the mask.*another detector"):
        mtcnn.detect(torch.rand(40, 60, 3))


def test_face_at_the_border_is_found_and_its_crop_padded(mtcnn, portrait):
    cut = portrait[95:]  # through the forehead
    (face,) = [face for face in mtcnn.detect(cut) if face.size > 60]
    crop = crop_face(cut, face.box, size=64, scale=2.0)
    torch.testing.assert_close(crop[0], torch.full((64, 3), 0.5))
    assert crop[32:].std() > 0.1


def test_two_people_in_one_picture(mtcnn, portrait):
    pair = torch.cat([portrait, portrait.flip(1)], dim=1)
    chosen = select_from_photo(pair, mtcnn, order="left to right", indexes=None).chosen_faces
    assert len(chosen) == 2
    mirrored = chosen[1].box
    assert (
        intersection_over_union((1024 - mirrored[2], mirrored[1], 1024 - mirrored[0], mirrored[3]), chosen[0].box) > 0.8
    )


def test_mtcnn_on_the_photographs(mtcnn, shared_faces):
    missed, several = [], []
    photos = sorted(shared_faces.glob("*_*.jpg"))
    for path in photos:
        faces = mtcnn.detect(load_image(path))
        if not faces:
            missed.append(path.name)
        if len(faces) > 1:
            several.append(path.name)
            # What is found besides the person is small or unsure.
            best = max(faces, key=lambda face: face.area)
            assert all(face.confidence < best.confidence for face in faces if face is not best)
    assert missed == []
    assert len(several) <= len(photos) // 8


def test_preview_of_a_photograph_shows_the_box(mtcnn, shared_faces):
    image = load_image(sorted(shared_faces.glob("*_*.jpg"))[0])
    selection = select_from_photo(image, mtcnn)
    preview = draw_faces(image, selection)
    x0, _, x1, y1 = (round(v) for v in selection.chosen_faces[0].box)
    assert preview.shape == image.shape
    torch.testing.assert_close(preview[y1 - 1, (x0 + x1) // 2], torch.tensor([60, 220, 90]) / 255)


def test_faces_know_their_measures():
    face = DetectedFace((10, 20, 40, 80))
    assert (face.width, face.height, face.size, face.area, face.centre) == (30, 60, 60, 1800, (25, 50))
