"""The node FeedFace Detect Faces: crops, boxes, preview and report, and errors that name the node and the photo."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

NAME = "FeedFace Detect Faces"


@pytest.fixture(scope="module")
def detect(comfy):
    return comfy.module("nodes.detect")


@pytest.fixture(scope="module")
def errors(comfy):
    """The pack's own copy of the error classes."""
    return comfy.module("feedface_core.faces")


@pytest.fixture
def run(detect):
    """Run the node as ComfyUI does, with the defaults of its widgets for what is not given."""
    schema = detect.DetectFaces.GET_SCHEMA()
    defaults = {one.id: one.default for one in schema.inputs if getattr(one, "default", None) is not None}

    def execute(image, **inputs):
        return detect.DetectFaces.EXECUTE_NORMALIZED(image=image, **(defaults | inputs))

    return execute


def blank(count: int = 1, height: int = 96, width: int = 128) -> torch.Tensor:
    return torch.full((count, height, width, 3), 0.5)


def test_schema(detect):
    schema = detect.DetectFaces.GET_SCHEMA()
    assert schema.node_id == "FeedFaceDetectFaces"
    assert schema.category == "FeedFace"
    assert "crop face" in getattr(schema, "search_aliases", ["crop face"])  # 0.3.75 has none
    assert all(one.tooltip for one in [*schema.inputs, *schema.outputs])
    # ComfyUI 0.3.75 wants every id once among inputs and outputs.
    ids = [one.id for one in [*schema.inputs, *schema.outputs]]
    assert len(ids) == len(set(ids))
    assert [one.display_name for one in schema.outputs] == ["crops", "face_boxes", "preview", "report"]


def test_unknown_schema_fields_are_dropped_only_when_they_are_known_to_be_new(comfy, monkeypatch):
    types = comfy.module("nodes.types")
    monkeypatch.setattr(types, "_NEWER_FIELDS", frozenset({"of_tomorrow"}))
    assert types.make_schema("FeedFaceSmallModel", [], [], of_tomorrow=True).node_id == "FeedFaceSmallModel"
    with pytest.raises(TypeError, match="colour"):
        types.make_schema("FeedFaceSmallModel", [], [], colour="red")


def test_one_portrait(run, astronaut):
    pytest.importorskip("facenet_pytorch")
    output = run(astronaut, detector="mtcnn")
    crops, boxes, preview, report = output.args
    assert crops.shape == (1, 224, 224, 3)
    assert 0 <= crops.min() and crops.max() <= 1
    ((face,),) = json.loads(boxes)
    assert face["box"] == pytest.approx([176, 66, 272, 190], abs=25)
    assert preview.shape == astronaut.shape and not torch.equal(preview, astronaut)
    assert report.splitlines()[0] == "detector: mtcnn [MIT, weights included in facenet-pytorch]"
    assert "image: 1 face(s) found; taken: 0" in report
    assert len(output.ui["images"]) == 1


def test_the_photo_itself_is_not_changed(run, astronaut):
    before = astronaut.clone()
    run(astronaut, detector="whole image")
    run(astronaut, boxes="[10, 10, 90, 90]")
    assert torch.equal(astronaut, before)


def test_batch_with_a_photo_without_a_face(run, errors, astronaut):
    pytest.importorskip("facenet_pytorch")
    batch = torch.cat([astronaut, torch.full_like(astronaut, 0.5), astronaut.flip(2)])
    with pytest.raises(errors.NoFaceError, match=f"{NAME}: photo 2 of 3: no face found .by mtcnn"):
        run(batch, detector="mtcnn")
    crops, boxes, preview, report = run(batch, detector="mtcnn", when_none="skip").args
    assert crops.shape[0] == 2 and preview.shape[0] == 3
    assert [len(photo) for photo in json.loads(boxes)] == [1, 0, 1]
    assert "photo 2 of 3: no face found: photo skipped" in report
    # The third photo is the first one mirrored.
    (x0, y0, x1, y1), mirrored = (json.loads(boxes)[photo][0]["box"] for photo in (0, 2))
    assert mirrored == pytest.approx([512 - x1, y0, 512 - x0, y1], abs=15)
    crops, boxes, _, report = run(batch, detector="mtcnn", when_none="whole image").args
    assert crops.shape[0] == 3
    assert json.loads(boxes)[1][0]["box"] == [0, 0, 512, 512]
    # A whole photo has no margin: what fills the crop is the photo.
    torch.testing.assert_close(crops[1], torch.full_like(crops[1], 0.5))


def test_when_all_photos_are_skipped_the_error_says_so(run, errors):
    with pytest.raises(ValueError, match=r"any of the 2 photo\(s\), and all of them were skipped"):
        run(blank(2), boxes="[[], []]", when_none="skip")


def test_boxes_of_the_user(run):
    image = blank()
    image[0, 20:60, 30:70] = torch.tensor([1.0, 0, 0])
    crops, boxes, _, report = run(image, boxes="[[30, 20, 70, 60]]", crop_scale=1.0, crop_size=64).args
    assert crops.shape == (1, 64, 64, 3)
    torch.testing.assert_close(crops[0, 4:-4, 4:-4], torch.tensor([1.0, 0, 0]).expand(56, 56, 3), atol=1e-3, rtol=0)
    assert json.loads(boxes)[0][0]["box"] == [30, 20, 70, 60]
    assert report.startswith("detector: boxes")


def test_crops_are_cut_as_in_the_training_of_a_connected_adapter(run, comfy):
    crops_of = comfy.module("feedface_core.faces").crop_face
    encoder = comfy.module("feedface_core.config").EncoderConfig(
        image_size=48, crop_scale=1.5, crop_border="clamp", crop_fill=0.2
    )
    kind = comfy.module("nodes.adapter").LoadedAdapter
    adapter = kind.__new__(kind)
    adapter.config = SimpleNamespace(encoder=encoder)
    image = torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    given, box = "[[0, 20, 40, 60]]", (0.0, 20.0, 40.0, 60.0)
    crops, _, _, report = run(image, boxes=given, adapter=adapter).args
    torch.testing.assert_close(crops[0], crops_of(image[0], box, 48, 1.5, 0.2, "clamp"))
    assert "crops: 1.5 × the box, 48 pixels, border: clamp" in report
    own, *_ = run(image, boxes=given, adapter=adapter, crop_scale=2.0, crop_size=64).args
    torch.testing.assert_close(own[0], crops_of(image[0], box, 64, 2.0, 0.2, "clamp"))
    plain, _, _, report = run(image, boxes=given).args
    torch.testing.assert_close(plain[0], crops_of(image[0], box, 224, 1.1))
    assert "crops:" not in report
    adapter.config.encoder = comfy.module("feedface_core.config").EncoderConfig()
    torch.testing.assert_close(run(image, boxes=given, adapter=adapter).args[0], plain)


def test_boxes_going_out_and_in_again_give_the_same_crops(run):
    image = torch.rand(2, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    given = "[[[10, 10, 50, 60], [60, 20, 100, 70]], [[5, 5, 60, 60]]]"
    crops, boxes, _, _ = run(image, boxes=given, indexes="all", order="right to left").args
    again, boxes_again, _, _ = run(image, boxes=boxes, indexes="all", order="as found").args
    assert crops.shape[0] == 3
    torch.testing.assert_close(again, crops)
    assert boxes_again == boxes


def test_mask_of_the_user(run, errors):
    mask = torch.zeros(1, 96, 128)
    mask[0, 10:60, 20:60] = 1
    mask[0, 20:60, 80:115] = 1
    crops, boxes, _, report = run(blank(2), mask=mask, indexes="all", order="left to right").args
    assert crops.shape[0] == 4
    assert [face["box"] for face in json.loads(boxes)[1]] == [[20, 10, 60, 60], [80, 20, 115, 60]]
    assert report.startswith("detector: mask")
    with pytest.raises(ValueError, match="mask: 64 × 64 pixels, but the photo has 128 × 96"):
        run(blank(), mask=torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="3 masks for 2 photos"):
        run(blank(2), mask=mask.expand(3, -1, -1))
    with pytest.raises(ValueError, match="both boxes and a mask"):
        run(blank(), mask=mask, boxes="[[1, 2, 30, 40]]")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": torch.full((1, 96, 128, 3), float("nan"))}, "values from nan"),
        ({"image": torch.zeros(96, 128, 3)}, r"shape \(96, 128, 3\)"),
        ({"image": torch.zeros(0, 96, 128, 3)}, r"shape \(0, 96"),
        ({"boxes": "[[10, 10, 15, 15]]"}, "largest has 5 pixels and min_size is 32"),
        ({"boxes": "[[10, 10, 60, 60]]", "indexes": "1"}, "face 1 was asked for, but 1 face"),
        ({"boxes": "[[10, 10, 60, 60]]", "indexes": "first"}, "indexes: expected numbers"),
        ({"boxes": "[[200, 10, 260, 60]]"}, "outside the photo of 128 × 96"),
        ({"boxes": "10 10 60 60"}, "boxes: not JSON"),
        ({"boxes": "[]"}, "boxes: there are 0 lists for 1 photo"),
        ({"boxes": "[[]]"}, "image: no face found"),
        ({"detector": "dlib"}, "detector is 'dlib', expected one of"),
    ],
)
def test_bad_input_names_the_node_and_what_is_wrong(run, errors, inputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(**({"image": blank()} | inputs))
    assert str(caught.value).startswith(NAME)


def test_greyscale_and_alpha(run):
    grey = torch.rand(1, 96, 128, 1, generator=torch.Generator().manual_seed(1))
    crops, _, preview, _ = run(grey, boxes="[[10, 10, 60, 60]]").args
    assert crops.shape[-1] == preview.shape[-1] == 3
    torch.testing.assert_close(crops[..., 0], crops[..., 2])
    clear = torch.cat([torch.rand(1, 96, 128, 3), torch.zeros(1, 96, 128, 1)], dim=-1)
    crops, *_ = run(clear, detector="whole image").args
    torch.testing.assert_close(crops, torch.full_like(crops, 0.5))


def test_insightface_folders_of_comfyui_are_searched(comfy, errors, run, tmp_path, monkeypatch):
    pytest.importorskip("insightface")
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "insightface", ([str(tmp_path)], set()))
    with pytest.raises(errors.DetectorUnavailable) as caught:
        run(blank(), detector="insightface")
    for folder in (tmp_path, f"{folder_paths.models_dir}/insightface"):
        assert str(folder) in str(caught.value)


def test_interrupting_stops_between_photos(run, comfy):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        run(blank(2), detector="whole image")
    assert run(blank(), detector="whole image").args[0].shape[0] == 1


SCRIPT = """
import importlib.util, json, sys
comfyui, pack, base = sys.argv[1:4]
sys.argv = sys.argv[:1]
sys.path.insert(0, comfyui)
from comfy.cli_args import args
args.cpu, args.base_directory = True, base
import torch
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from comfy_api.latest import io
from pack.nodes.detect import DetectFaces
info = DetectFaces.GET_NODE_INFO_V1()
output = DetectFaces.EXECUTE_NORMALIZED(image=torch.rand(1, 64, 64, 3), boxes="[[8, 8, 56, 56]]", crop_size=32)
print(json.dumps({"name": info["name"], "inputs": sorted(info["input"]["required"]), "crops": output[0].shape,
                  "aliases": info.get("search_aliases"), "images": len(output.ui["images"]),
                  "knows_aliases": "search_aliases" in io.Schema.__dataclass_fields__}))
"""


def test_on_every_comfyui_we_support(any_comfyui, request, tmp_path):
    result = subprocess.run(
        [any_comfyui.python, "-c", SCRIPT, any_comfyui.path, request.config.rootpath, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["name"] == "FeedFaceDetectFaces"
    assert found["inputs"] == ["detector", "image", "indexes", "min_size", "order", "when_none"]
    assert found["crops"] == [1, 32, 32, 3]
    assert found["images"] == 1
    assert ("crop face" in (found["aliases"] or [])) == found["knows_aliases"]
