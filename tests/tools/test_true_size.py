"""Stable Diffusion 1.5 at its true size with random weights, through a real server. Slow: minutes on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo import FACE, PLAIN, portrait
from tools.server import ComfyServer
from tools.tiny_checkpoint import SD15, sites, write_adapter, write_checkpoint


@pytest.mark.slow
def test_a_face_in_stable_diffusion_15(newest_comfyui, tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    photo = tmp_path / "astronaut.png"
    Image.fromarray(data.astronaut()).save(photo)
    write_checkpoint(tmp_path / "models/checkpoints/sd15.safetensors", size=SD15)
    write_adapter(tmp_path / "models/feedface/sd15.safetensors", size=SD15)
    assert len(sites(SD15)) == 16
    with ComfyServer(newest_comfyui.path, newest_comfyui.python, model_folders=tmp_path / "models") as server:
        name = server.upload(photo)
        graph = portrait("sd15.safetensors", "sd15.safetensors", name, "a person", size=256, steps=2)
        run = server.run(graph, timeout=900)
        (plain,), (face,) = server.pictures(run, PLAIN), server.pictures(run, FACE)
        assert "Traceback" not in server.log, server.tail()
    assert plain.shape == face.shape == (256, 256, 3)
    assert np.abs(plain.astype(int) - face.astype(int)).mean() > 1
