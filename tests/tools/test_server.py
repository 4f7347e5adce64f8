"""A real ComfyUI server, newest and oldest, with the pack in its custom_nodes."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from tools.server import ComfyServer, ServerError

ROOT = Path(__file__).resolve().parents[2]

# Core nodes only: what this proves does not depend on ours.
PLAIN = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny_sd1.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo of a person"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0],
            "positive": ["2", 0],
            "negative": ["3", 0],
            "latent_image": ["4", 0],
            "seed": 1,
            "steps": 3,
            "cfg": 4.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    },
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
    "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "plain"}},
}


def plain(**sampler: object) -> dict:
    prompt = deepcopy(PLAIN)
    prompt["5"]["inputs"].update(sampler)
    return prompt


def test_every_node_of_the_pack_is_there(server: ComfyServer) -> None:
    written = json.loads((ROOT / "locales/en/nodeDefs.json").read_text("utf-8")).keys()
    known = {name for name in server.object_info() if name.startswith("FeedFace")}
    assert written and known == written, server.tail()


def test_starts_without_a_traceback(server: ComfyServer) -> None:
    start = server.log.split("got prompt")[0]  # other tests make it fail on purpose later
    assert "Traceback" not in start, server.tail()
    assert "IMPORT FAILED" not in start, server.tail()


def test_picture_of_core_nodes(server: ComfyServer) -> None:
    run = server.run(plain())
    assert {"5", "6", "7"} <= set(run.executed)
    assert {*run.executed, *run.cached} == set(PLAIN)  # another test's run may have left the others
    assert run.progress[-1] == ("5", 3, 3)
    (picture,) = server.pictures(run)
    assert picture.shape == (64, 64, 3)
    assert picture.mean() == pytest.approx(75.61, abs=0.5)
    (other,) = server.pictures(server.run(plain(seed=2)))
    assert not np.array_equal(picture, other)


def test_interrupted_run_leaves_nothing_behind(server: ComfyServer) -> None:
    (before,) = server.pictures(server.run(plain(seed=3)))

    def interrupt(kind: str, data: dict) -> None:
        if kind == "progress" and data["value"] >= 2:
            server.interrupt()

    run = server.run(plain(seed=4, steps=1000), on_event=interrupt, timeout=100)
    assert run.interrupted and run.outputs == {}
    server.free()
    (after,) = server.pictures(server.run(plain(seed=3)))
    assert np.array_equal(before, after)


def test_upload(server: ComfyServer, tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    name = server.upload(tmp_path / "small.png")
    run = server.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "same"}},
        }
    )
    assert np.array_equal(server.pictures(run)[0], pixels)
    assert np.array_equal(server.view({"filename": name, "type": "input"}), pixels)
    assert server.upload(tmp_path / "small.png", "renamed.png", "of_a_test") == "of_a_test/renamed.png"


def test_refused_workflow_names_the_node(server: ComfyServer) -> None:
    prompt = plain()
    prompt["1"]["inputs"]["ckpt_name"] = "absent.safetensors"
    with pytest.raises(ServerError, match=r"node 1 \(CheckpointLoaderSimple\).*absent\.safetensors"):
        server.run(prompt)


def test_failing_node_is_named(server: ComfyServer) -> None:
    prompt = plain()
    (server.base / "input/broken.png").write_bytes(b"not a picture")
    prompt["6"] = {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}
    with pytest.raises(ServerError, match=r"node 6 \(LoadImage\) failed: .*UnidentifiedImageError"):
        server.run(prompt)


def test_failure_to_start_shows_the_log(newest_comfyui) -> None:
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-flag"):
        with ComfyServer(newest_comfyui.path, newest_comfyui.python, arguments=["--no-such-flag"]):
            pass
