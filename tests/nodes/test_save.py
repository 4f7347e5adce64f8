"""FeedFace Save Marked Image: files that open in ComfyUI, and say what made them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from feedface_core.files.provenance import SOURCE_TYPES, source_type

PROMPT, WORKFLOW = {"1": {"class_type": "KSampler"}}, {"nodes": [{"id": 1, "title": "größer"}]}


@pytest.fixture
def save(comfy, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    node = comfy.module("nodes.save").SaveImage

    def run(images, prefix="faces/ann", mark="generated", hidden=True, **options):
        class Prepared(node):
            pass

        texts = SimpleNamespace(prompt=PROMPT, extra_pnginfo={"workflow": WORKFLOW}) if hidden else None
        Prepared.hidden = texts
        output = Prepared.execute(images=images, filename_prefix=prefix, mark=mark, **options)
        return [tmp_path / one["subfolder"] / one["filename"] for one in output.ui["images"]], output.ui

    return run


def images(count: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, 32, 48, channels, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "suffix"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")])
def test_saved_with_workflow_and_mark(save, kind, suffix):
    (path,), _ = save(images(), format=kind)
    assert path.name == f"ann_00001_{suffix}" and path.parent.name == "faces"
    assert source_type(path.read_bytes()) == SOURCE_TYPES["generated"]
    opened = Image.open(path)
    if kind == "png":
        found = {name: opened.info[name] for name in ("prompt", "workflow")}
    else:
        found = dict(opened.getexif()[tag].split(":", 1) for tag in (0x0110, 0x010F))
    assert json.loads(found["prompt"]) == PROMPT and json.loads(found["workflow"]) == WORKFLOW


def test_png_is_what_comfyui_saves(save, comfy):
    from comfy_api.latest import ui

    batch = images(2)
    ours, _ = save(batch)
    theirs = ui.ImageSaveHelper._convert_tensor_to_pil(batch[1])
    assert np.array_equal(np.asarray(Image.open(ours[1])), np.asarray(theirs))
    assert [path.name for path in ours] == ["ann_00001_.png", "ann_00002_.png"]
    more, _ = save(images())
    assert more[0].name == "ann_00003_.png"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_switch(save, kind):
    (plain,), _ = save(images(), mark="none", format=kind)
    assert b"DigitalSourceType" not in plain.read_bytes()
    (edited,), _ = save(images(), mark="edited photo", format=kind)
    assert source_type(edited.read_bytes()).endswith("/compositeWithTrainedAlgorithmicMedia")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(save, kind, channels):
    (path,), _ = save(images(channels=channels), format=kind)
    assert Image.open(path).size == (48, 32)


def test_metadata_may_be_switched_off_and_absent(save, comfy, monkeypatch):
    from comfy.cli_args import args

    (path,), _ = save(images(), hidden=False)
    assert "prompt" not in Image.open(path).info
    monkeypatch.setattr(args, "disable_metadata", True)
    (path,), _ = save(images())
    assert "prompt" not in Image.open(path).info and source_type(path.read_bytes())


def test_workflow_too_large_for_a_jpeg_is_told(save, monkeypatch):
    monkeypatch.setitem(WORKFLOW, "large", "x" * 70_000)
    (path,), shown = save(images(), format="jpeg")
    assert "left out" in shown["text"][0] and source_type(path.read_bytes()) and not dict(Image.open(path).getexif())
    (path,), shown = save(images(), format="webp")
    assert "text" not in shown and 0x010F in Image.open(path).getexif()


def test_quality(save):
    (small,), _ = save(images(), format="jpeg", quality=10)
    (large,), _ = save(images(), format="jpeg", quality=100)
    assert small.stat().st_size < large.stat().st_size


@pytest.mark.parametrize("prefix", ["../outside", "/etc/feedface/x", "a\0b"])
def test_prefix_outside_the_folder_is_refused(save, comfy, prefix):
    error = comfy.module("feedface_core.errors").FeedFaceError
    with pytest.raises(error, match="FeedFace Save Marked Image: .*"):
        save(images(), prefix=prefix)
