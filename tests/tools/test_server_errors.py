"""What a real server reports for each error of ours: the name of its class without a path, and the message."""

from __future__ import annotations

import importlib
import io
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import feedface_core
from feedface_core.errors import FeedFaceError
from tools.server import ComfyServer, ServerError

PHOTO = {"class_type": "LoadImage", "inputs": {"image": "grey.png"}}
SHOW = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A prompt around one node: it may take a photo, and what it makes is shown."""
    return {"photo": PHOTO, "node": {"class_type": kind, "inputs": inputs}, "show": SHOW}


def detect(**inputs: Any) -> dict[str, Any]:
    settings = {"detector": "mtcnn", "order": "size", "indexes": "0", "min_size": 32, "when_none": "error"}
    return node("FeedFaceDetectFaces", **{"image": ["photo", 0], **settings, **inputs})


def apply_to_wan() -> dict[str, Any]:
    prompt = node("FeedFaceApply", model=["model", 0], adapter=["adapter", 0], strength=1.0, start=0.0, end=1.0)
    wan = {"unet_name": "errors_wan.safetensors", "weight_dtype": "default"}
    return {
        **prompt,
        "model": {"class_type": "UNETLoader", "inputs": wan},
        "adapter": {"class_type": "FeedFaceLoadAdapter", "inputs": {"adapter_name": "tiny_sd1.safetensors"}},
    }


#: Prompts that end in an error: its class, and how the message begins.
CASES = [
    (detect(boxes="nonsense"), "FeedFaceError", "FeedFace Detect Faces: boxes: not JSON"),
    (detect(), "NoFaceError", "FeedFace Detect Faces: image: no face found"),
    (detect(detector="whole image", indexes="3"), "FeedFaceError", "FeedFace Detect Faces: image: face 3 was asked"),
    (detect(detector="insightface"), "DetectorUnavailable", "FeedFace Detect Faces: no InsightFace model files"),
    (
        node("FeedFaceLoadAdapter", adapter_name="errors_other.safetensors"),
        "FeedFaceError",
        "FeedFace Load Adapter: MODELS/feedface/errors_other.safetensors: not a FeedFace adapter",
    ),
    (
        node("FeedFaceLoadFace", face_name="errors_other.safetensors"),
        "FeedFaceError",
        "FeedFace Load Face: MODELS/feedface/faces/errors_other.safetensors: not a saved face",
    ),
    (
        node("FeedFaceLoadUniDiffuser", uvit="errors_broken.pth", caption_decoder="errors_broken.pth"),
        "FeedFaceError",
        "FeedFace Load UniDiffuser: MODELS/diffusion_models/errors_broken.pth: not a readable weights file",
    ),
    (
        node("FeedFaceLoadUniDiffuser", uvit="errors_broken.pth", caption_decoder="auto"),
        "MissingFile",
        "FeedFace Load UniDiffuser: no file 'caption_decoder.pth'",
    ),
    (
        node(
            "FeedFaceScore",
            image=["photo", 0],
            references=["photo", 0],
            recogniser="adapter's encoder",
            detector="auto",
        ),
        "RecogniserUnavailable",
        "FeedFace Score: the recogniser",
    ),
    (apply_to_wan(), "FeedFaceError", "FeedFace Apply Adapter: WanModel is not a model FeedFace can attach to"),
]


@pytest.fixture(scope="module")
def files(server: ComfyServer) -> Path:
    """Files that are not what a loader expects, and a photo without a face."""
    models = server.base / "models"
    for folder in ("feedface", "feedface/faces", "diffusion_models"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("feedface", "feedface/faces"):
        save_file({"weight": torch.zeros(1)}, models / folder / "errors_other.safetensors")
    (models / "diffusion_models/errors_broken.pth").write_bytes(b"no weights")
    wan = {
        "head.modulation": (1, 2, 128),
        "head.head.weight": (64, 128),
        "patch_embedding.weight": (128, 16, 1, 2, 2),
        "blocks.0.ffn.0.weight": (128, 128),
    }  # what ComfyUI tells the family and the sizes by
    save_file(
        {name: torch.zeros(shape) for name, shape in wan.items()}, models / "diffusion_models/errors_wan.safetensors"
    )
    photo = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(photo, "PNG")
    server.upload(photo.getvalue(), "grey.png")
    return models


def test_every_class_has_a_case() -> None:
    for module in pkgutil.walk_packages(feedface_core.__path__, "feedface_core."):
        importlib.import_module(module.name)
    ours = [kind for kind in FeedFaceError.__subclasses__() if kind.__module__.startswith("feedface_core")]
    classes = {FeedFaceError, *ours}
    assert {kind.__name__ for kind in classes} == {kind for _, kind, _ in CASES}


@pytest.mark.parametrize(("prompt", "kind", "beginning"), CASES)
def test_report_begins_with_the_name_of_the_error(server, files: Path, prompt, kind: str, beginning: str) -> None:
    seen: dict[str, dict[str, Any]] = {}
    with pytest.raises(ServerError, match=f"failed: {kind}: "):
        server.run(prompt, on_event=seen.__setitem__)
    failure = seen["execution_error"]
    (history,) = [
        data
        for name, data in server.get(f"/history/{failure['prompt_id']}")[failure["prompt_id"]]["status"]["messages"]
        if name == "execution_error"
    ]
    for report in (failure, history):
        assert report["exception_type"] == kind
        assert report["exception_message"].startswith(beginning.replace("MODELS", str(files)))
