"""Workflows with our nodes, queued on a real ComfyUI server, newest and oldest, from a photograph to a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.demo import FACE, PLAIN, REPORT, portrait
from tools.server import ComfyServer, ServerError

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*_api.json"))
MODEL = "tiny_sd1.safetensors"
# What a workflow is scaled down to, by node and input.
SMALL: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": MODEL},
    "FeedFaceLoadAdapter": {"adapter_name": MODEL},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
    "BasicScheduler": {"steps": 2},
}


@pytest.fixture(scope="module")
def server(any_comfyui, tiny_models: Path) -> Iterator[ComfyServer]:
    with ComfyServer(any_comfyui.path, any_comfyui.python, model_folders=tiny_models) as running:
        yield running


@pytest.fixture(scope="module")
def photo(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    data = pytest.importorskip("skimage.data")
    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return server.upload(path)


def scaled_down(workflow: dict[str, Any], photo: str) -> dict[str, Any]:
    for node in workflow.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = photo
    return workflow


@pytest.fixture(scope="module")
def pictures(server: ComfyServer, photo: str) -> tuple[np.ndarray, np.ndarray]:
    """The same prompt and seed without and with the face."""
    run = server.run(portrait(MODEL, MODEL, photo, "a person", size=64, steps=3))
    assert "1 face" in "".join(run.outputs[REPORT]["text"])
    (plain,), (face,) = server.pictures(run, PLAIN), server.pictures(run, FACE)
    return plain, face


def test_face_changes_the_picture(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    plain, face = pictures
    assert plain.shape == face.shape == (64, 64, 3)
    assert np.abs(plain.astype(int) - face.astype(int)).mean() > 5


def test_strength_zero_is_the_plain_picture(server: ComfyServer, photo: str, pictures) -> None:
    run = server.run(portrait(MODEL, MODEL, photo, "a person", size=64, steps=3, strength=0.0))
    assert np.array_equal(server.pictures(run, FACE)[0], pictures[0])


def test_free_and_run_again_gives_the_same_pictures(server: ComfyServer, photo: str, pictures) -> None:
    server.free()
    run = server.run(portrait(MODEL, MODEL, photo, "a person", size=64, steps=3))
    again = server.pictures(run, PLAIN)[0], server.pictures(run, FACE)[0]
    assert np.array_equal(again[0], pictures[0])
    assert np.array_equal(again[1], pictures[1])


def test_picture_without_a_face_is_an_error_that_names_the_node(server: ComfyServer, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "gray").save(tmp_path / "wall.png")
    workflow = portrait(MODEL, MODEL, server.upload(tmp_path / "wall.png"), "a person", size=64, steps=3)
    with pytest.raises(ServerError, match=r"FeedFaceDetectFaces\) failed: .*no face"):
        server.run(workflow)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow(server: ComfyServer, photo: str, path: Path) -> None:
    run = server.run(scaled_down(json.loads(path.read_text(encoding="utf-8")), photo))
    pictures = server.pictures(run)
    assert pictures and all(picture.std() > 5 for picture in pictures)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow_has_both_formats(path: Path) -> None:
    api = json.loads(path.read_text(encoding="utf-8"))
    graph = json.loads(path.with_name(path.name.replace("_api", "")).read_text(encoding="utf-8"))
    kinds = {str(node["id"]): node["type"] for node in graph["nodes"] if node["type"] not in ("Note", "MarkdownNote")}
    assert kinds == {name: node["class_type"] for name, node in api.items()}
