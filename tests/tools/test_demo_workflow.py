"""The demo's workflow on a real ComfyUI server, newest and oldest, from a photograph to a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo import FACE, PLAIN, portrait
from tools.demo_graph import REPORT
from tools.server import ComfyServer, ServerError

MODEL = "tiny_sd1.safetensors"


@pytest.fixture(scope="module")
def photo(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    data = pytest.importorskip("skimage.data")
    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return server.upload(path)


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
