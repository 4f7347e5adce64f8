"""One adapter through diffusers' U-Net, where it is trained, and through ComfyUI's, where it is used."""

from __future__ import annotations

import pytest
import torch
from support.comfy_unet import comfy_model, run_in_comfyui
from support.small_training import make_config

from feedface_core.conditioning import Face
from feedface_core.files.adapter_file import save_adapter
from tools.tiny_diffusers import TinySize, make_base, make_encoder
from trainer.models.adapter import Models, load_models

# The levels, blocks and attention of the real ones, at a tenth of their width.
SIZES = {
    "sd1": TinySize(channels=(32, 64, 128, 128), blocks=2, context=64),
    "sd2": TinySize(channels=(64, 128, 256, 256), blocks=2, context=64),
    "sdxl": TinySize(channels=(64, 128, 256), blocks=2, context=64, depths=(1, 2, 10)),
}
BRANCHES = {"sd1": 16, "sd2": 16, "sdxl": 11}


def trained_adapter(models: Models, path):
    """An adapter that has learned something, written to a file."""
    torch.manual_seed(1)
    for branch in models.adapter.branches:
        last = branch.zero_linear
        torch.nn.init.normal_((last.up if models.adapter.config.rank else last).weight, std=0.2)
    return save_adapter(path, models.adapter.config, models.adapter.state_dict(), models.encoder.tensors())


LIGHT = {"adapter__self_attention": False, "adapter__mlp": False, "adapter__rank": 8}
CASES = [(family, {"adapter__tap": tap}) for family in SIZES for tap in ("input", "output")]


@pytest.mark.parametrize(("family", "settings"), [*CASES, ("sd1", LIGHT)])
def test_same_prediction(comfy, tmp_path, family, settings):
    make_base(tmp_path / "base", family, SIZES[family])
    make_encoder(tmp_path / "clip", image_size=64)
    config = make_config(tmp_path, tmp_path / "none.jsonl", tmp_path / "run", **settings)
    models = load_models(config, "cpu")
    base = models.frozen
    assert len(models.adapter.branches) == BRANCHES[family]
    path = trained_adapter(models, tmp_path / "adapter.safetensors")

    crops = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([700, 20])
    text = base.encode_text(["a person", ""])
    hidden = models.encoder.encode(crops)
    rows = [(1, None), (1, models.adapter.control_of(Face(hidden), "cpu", torch.float32, strength=0.7))]
    with torch.no_grad():
        plain = base.predict(noisy, timesteps, text)
        ours = base.predict(noisy, timesteps, text, rows)

    loaded = comfy.module("nodes.adapter").LoadedAdapter(str(path))
    core = comfy.module("feedface_core.conditioning")
    theirs = run_in_comfyui(comfy, comfy_model(base.host), loaded, core, crops, noisy, timesteps, text)
    scale = plain.abs().max()
    assert (ours[1] - plain[1]).abs().max() / scale > 0.01, "the face changes the prediction"
    assert (theirs - ours).abs().max() / scale < 1e-4
    assert (theirs[0] - plain[0]).abs().max() / scale < 1e-4
