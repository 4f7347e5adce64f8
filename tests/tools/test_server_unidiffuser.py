"""The published model on a real server: small files in the released layout, the workflow as shipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.unidiffuser import released_folders

from tools.server import ComfyServer, ServerError

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows/api/feedface_unidiffuser.json"


@pytest.fixture(scope="module")
def models(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released_folders(tmp_path_factory.mktemp("unidiffuser"), tiny_models)


@pytest.fixture(scope="module")
def server(any_comfyui, models: Path) -> Iterator[ComfyServer]:
    with ComfyServer(any_comfyui.path, any_comfyui.python, model_folders=models) as running:
        yield running


@pytest.fixture
def portrait(astronaut, tmp_path: Path) -> Path:
    from PIL import Image

    Image.fromarray((astronaut[0] * 255).byte().numpy()).save(tmp_path / "portrait.jpg", quality=95)
    return tmp_path / "portrait.jpg"


NODES = (
    "CheckpointLoaderSimple",
    "FeedFaceLoadUniDiffuser",
    "FeedFaceLoadAdapter",
    "LoadImage",
    "FeedFaceDetectFaces",
    "FeedFaceEncodeFaces",
    "FeedFaceApply",
    "CLIPTextEncode",
    "FeedFaceUniDiffuserUnconditional",
    "EmptyLatentImage",
    "KSampler",
    "VAEDecode",
    "FeedFaceSaveImage",
)


def numbered(prompt: dict) -> dict:
    """The same with the numbers that these tests use, from 1 in the order of ``NODES``."""
    number = {key: str(NODES.index(node["class_type"]) + 1) for key, node in prompt.items()}
    assert len(set(number.values())) == len(prompt)

    def renamed(value: object) -> object:
        return [number[value[0]], value[1]] if isinstance(value, list) else value

    return {
        number[key]: {**node, "inputs": {name: renamed(value) for name, value in node["inputs"].items()}}
        for key, node in prompt.items()
    }


def changed(server: ComfyServer, portrait: Path, **inputs: object) -> dict:
    """The workflow as shipped, smaller; ``NODE__INPUT`` names what else is changed."""
    prompt = numbered(json.loads(WORKFLOW.read_text("utf-8")))
    prompt["4"]["inputs"]["image"] = server.upload(portrait)
    prompt["5"]["inputs"]["detector"] = "whole image"
    prompt["10"]["inputs"] |= {"width": 96, "height": 64}
    prompt["11"]["inputs"]["steps"] = 3
    for name, value in inputs.items():
        node, key = name.removeprefix("n").split("__")
        prompt[node]["inputs"][key] = value
    return prompt


def test_workflow_as_shipped(server: ComfyServer, portrait: Path) -> None:
    prompt = changed(server, portrait)
    (faced,) = server.pictures(server.run(prompt), "13")
    assert faced.shape == (64, 96, 3) and faced.std() > 1
    (without,) = server.pictures(server.run(changed(server, portrait, n7__strength=0.0)), "13")
    (bare,) = server.pictures(server.run(changed(server, portrait, n11__model=["2", 0])), "13")
    assert np.array_equal(without, bare) and not np.array_equal(faced, bare)
    server.free()
    (again,) = server.pictures(server.run(changed(server, portrait, n13__filename_prefix="again")), "13")
    assert np.array_equal(again, faced)
    assert "Traceback" not in server.log, server.tail()


def test_batch_image_to_image_and_two_stages(server: ComfyServer, portrait: Path) -> None:
    run = server.run(changed(server, portrait, n10__batch_size=2))
    assert len(server.pictures(run, "13")) == 2
    prompt = changed(server, portrait)
    scale = {"image": ["4", 0], "width": 64, "height": 64, "crop": "disabled", "upscale_method": "bilinear"}
    prompt["20"] = {"class_type": "ImageScale", "inputs": scale}
    prompt["21"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["20", 0], "vae": ["1", 2]}}
    prompt["11"]["inputs"] |= {"latent_image": ["21", 0], "denoise": 0.5}
    (picture,) = server.pictures(server.run(prompt), "13")
    assert picture.shape == (64, 64, 3)

    whole, staged = (changed(server, portrait, n11__steps=4, n11__sampler_name="euler") for _ in range(2))
    both = {key: value for key, value in whole["11"]["inputs"].items() if key not in ("seed", "denoise")}
    both |= {"noise_seed": 1, "return_with_leftover_noise": "enable", "add_noise": "enable"}
    staged["11"] = {"class_type": "KSamplerAdvanced", "inputs": {**both, "start_at_step": 0, "end_at_step": 2}}
    second = {
        **both,
        "add_noise": "disable",
        "latent_image": ["11", 0],
        "start_at_step": 2,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
    }
    staged["22"] = {"class_type": "KSamplerAdvanced", "inputs": second}
    staged["12"]["inputs"]["samples"] = ["22", 0]
    pictures = [server.pictures(server.run(prompt), "13")[0].astype(int) for prompt in (whole, staged)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_guider_and_empty_prompt(server: ComfyServer, portrait: Path) -> None:
    empty = changed(server, portrait, n11__negative=["23", 0])
    empty["23"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}}
    (picture,) = server.pictures(server.run(empty), "13")
    (unconditional,) = server.pictures(server.run(changed(server, portrait)), "13")
    assert not np.array_equal(picture, unconditional)


def test_mistakes_are_named(server: ComfyServer, portrait: Path, models: Path) -> None:
    def refused(prompt: dict) -> str:
        """What the server says about node 2 before it runs what does not need it."""
        answer = server.post("/prompt", {"prompt": prompt, "client_id": server.client_id})
        return " ".join(error["details"] for error in answer["node_errors"]["2"]["errors"])

    said = refused(changed(server, portrait, n2__uvit="uvit_v2.pth"))
    assert "uvit - no file 'uvit_v2.pth'" in said and str(models / "diffusion_models") in said
    with pytest.raises(ServerError, match=r"wrong\.pth: this is UniDiffuser's caption decoder \(models/text_enc"):
        shutil.copy(models / "text_encoders/caption_decoder.pth", models / "diffusion_models/wrong.pth")
        server.run(changed(server, portrait, n2__uvit="wrong.pth"))
    on_stable_diffusion = changed(server, portrait, n7__model=["1", 0])
    with pytest.raises(ServerError, match=r"feed-4800000\.pt was made for UniDiffuser.*Stable Diffusion"):
        server.run(on_stable_diffusion)
    decoder = models / "text_encoders/caption_decoder.pth"
    aside = decoder.rename(models / "aside.pth")
    try:
        with pytest.raises(ServerError, match="FeedFace Load UniDiffuser: no file 'caption_decoder.pth'") as caught:
            server.run(changed(server, portrait, n2__weight_dtype="fp32"))
        assert str(models / "text_encoders") in str(caught.value)
    finally:
        aside.rename(decoder)
