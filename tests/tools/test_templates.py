"""The shipped templates: made by their generator, complete, readable on a laptop, and running on the small models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.unidiffuser import released_folders

from tools.server import ComfyServer
from tools.templates import API, GRAPHS, LIST, TEMPLATES, Template
from tools.templates.__main__ import EXAMPLES, examples, files
from tools.templates.blueprints import FOLDER
from tools.workflow_format import NOTES

ROOT = Path(__file__).resolve().parents[2]
SMALL = [one for one in LIST if one.base.name == "small"]
RELEASED = [one for one in LIST if one.base.name == "released"]
WIDTH, APART = 1700, 60  # units

each = pytest.mark.parametrize("template", LIST, ids=lambda one: one.key)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("any_comfyui", ["newest"], indirect=True)
def test_files_are_what_the_generator_writes(server: ComfyServer) -> None:
    made = files(server.object_info())
    there = {path for folder in (TEMPLATES, GRAPHS, API, FOLDER) for path in folder.glob("*.json")}
    assert there == set(made)
    different = [path.name for path, text in made.items() if path.read_text("utf-8") != text]
    assert different == [], "run python -m tools.templates"
    assert set(TEMPLATES.glob("*.jpg")) == {one.picture for one in LIST}


def test_photos_of_the_browser_are_those_of_the_small_model() -> None:
    made = examples()
    assert {path: path.read_bytes() for path in EXAMPLES.iterdir()} == made
    loaded = {
        node["inputs"]["image"] for one in SMALL for node in read(one.api).values() if node["class_type"] == "LoadImage"
    }
    assert loaded <= {path.name for path in made}


def test_each_feature_runs_without_a_download_and_on_a_real_model() -> None:
    bases = {one.feature.key: {other.base.name for other in LIST if other.feature is one.feature} for one in LIST}
    assert all("small" in names for names in bases.values())
    assert [key for key, names in bases.items() if len(names) == 1] == ["compare"]
    assert len({one.key for one in LIST}) == len({one.title for one in LIST}) == len(LIST)


@each
def test_tile_has_a_picture_and_a_name_for_every_file_system(template: Template) -> None:
    assert re.fullmatch(r"\d\d [A-Za-z0-9 ,.()]+", template.title) and len(template.title) <= 32
    with Image.open(template.picture) as picture:
        assert picture.size[0] == picture.size[1] >= 400
        assert len(picture.convert("P").getcolors()) > 20


@each
def test_graph_fits_a_laptop(template: Template) -> None:
    boxes = [(*node["pos"], *node["size"]) for node in read(template.file)["nodes"]]
    assert max(x + w for x, _, w, _ in boxes) - min(x for x, *_ in boxes) <= WIDTH
    for index, (x, y, w, h) in enumerate(boxes):
        for a, b, c, d in boxes[index + 1 :]:
            assert max(a - x - w, x - a - c, b - y - h, y - b - d) >= APART


def test_first_look_can_be_read_at_once() -> None:
    """A template opened from its tile is shown whole: at 1440 × 900 pixels by a scale of 667 over its height in units.
    The canvas draws no text below 8 pixels, which is a scale of 8 / 14."""
    graph = read(SMALL[0].file)
    tops, feet = zip(
        *((y, y + height) for _, y, _, height in (one["bounding"] for one in graph["groups"])), strict=True
    )
    assert 667 / (max(feet) - min(tops)) > 8 / 14


@each
def test_files_with_a_public_home_have_their_address(template: Template) -> None:
    """Every file that a loader names, but for what comes along and what the user trains."""
    known = {f"feedface_{base}{kind}.safetensors" for base in ("small", "sd15") for kind in ("", "_face0", "_mixer")}
    for node in read(template.file)["nodes"]:
        models = {one["name"]: one for one in node["properties"].get("models", [])}
        named = [one for one in node.get("widgets_values", []) if str(one).endswith((".safetensors", ".pt", ".pth"))]
        if node["type"] not in {"FeedFaceLoadFace", *NOTES}:
            assert set(named) <= set(models) | known
        for one in models.values():
            assert set(one) == {"name", "url", "directory"} and one["url"].startswith("https://huggingface.co/")


@each
def test_note_is_prose(template: Template) -> None:
    (note,) = (node["widgets_values"][0] for node in read(template.file)["nodes"] if node["type"] in NOTES)
    assert note.startswith(f"## {template.feature.title}\n") and "|" not in note
    assert "`" not in note, "Nodes 2.0 draws code blue on the note's brown"
    assert not re.search(r"\*\n\w", note), "the canvas draws no space there"


# --- on a server


@pytest.mark.parametrize("template", SMALL, ids=lambda one: one.key)
def test_small_template_runs_as_it_is(server: ComfyServer, template: Template) -> None:
    """In the order of learning: what one saves another loads."""
    for path in EXAMPLES.glob("*.png"):
        server.upload(path)
    prompt = read(template.api)
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    mark = len(server.log)
    run = server.run(prompt)
    assert "Traceback" not in server.log[mark:]
    (saved,) = (key for key, node in prompt.items() if node["class_type"] == "FeedFaceSaveImage")
    pictures = server.pictures(run, saved)
    assert len(pictures) == template.feature.pictures
    assert all(picture.std() > 10 for picture in pictures)


@pytest.fixture(scope="module")
def released(newest_comfyui, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server whose model folders are as the notes describe them, with small files of the released layout."""
    folder = released_folders(tmp_path_factory.mktemp("released"), tiny_models)
    with ComfyServer(newest_comfyui.path, newest_comfyui.python, model_folders=folder) as running:
        yield running


@pytest.mark.parametrize("template", RELEASED, ids=lambda one: one.key)
def test_released_template_runs(released: ComfyServer, template: Template, tmp_path: Path) -> None:
    """As it is, with the user's photos, but at a size for the small files."""
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut()).crop((130, 0, 330, 200)).resize((96, 96)).convert("RGBA")
    prompt = read(template.api)
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "LoadImage":
            if "mask" in inputs["image"]:
                photo.putalpha(128)
            photo.save(tmp_path / inputs["image"])
            released.upload(tmp_path / inputs["image"])
        if node["class_type"] == "FeedFaceDetectFaces":
            inputs["detector"] = "whole image"
        if node["class_type"] in ("EmptyLatentImage", "FeedFaceRegions"):
            inputs.update(width=96, height=64)
        if node["class_type"] in ("KSampler", "BasicScheduler"):
            inputs["steps"] = 2
    run = released.run(prompt)
    (saved,) = (key for key, node in prompt.items() if node["class_type"] == "FeedFaceSaveImage")
    assert all(picture.std() > 1 for picture in released.pictures(run, saved))
