"""The checkpoints made on the spot: true sizes, the same on every run, read whole by ComfyUI."""

from __future__ import annotations

import torch

from feedface_core.files.adapter_file import load_adapter
from tools.tiny_checkpoint import (
    SD15,
    TINY,
    checkpoint_weights,
    meta_autoencoder,
    meta_text_encoder,
    meta_unet,
    sites,
    unet_weights,
    write_adapter,
)
from tools.tiny_diffusers import TinySize

SMALLEST = TinySize(channels=(320,), context=768)


def parameters(weights) -> int:
    return sum(weight.numel() for weight in weights.values())


def test_published_sizes() -> None:
    assert parameters(meta_unet(SD15).state_dict()) == 859_520_964  # Stable Diffusion 1.5
    assert parameters(meta_text_encoder()) == 123_060_480  # CLIP ViT-L/14, text
    assert parameters(meta_autoencoder()) == 1_222_532 + 1_222_531 + 2  # TAESD, with its scale and shift


def test_seed_decides() -> None:
    first, again, other = (unet_weights(SMALLEST, seed) for seed in (0, 0, 1))
    name = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert first[name].shape == (320, 768) and first[name].dtype is torch.float16
    assert abs(first[name].float().std().item() * 768**0.5 - 1) < 0.01


def test_comfyui_knows_it_and_uses_every_tensor(comfy, caplog) -> None:
    import comfy.sd

    for size in (SMALLEST, TINY):
        model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(checkpoint_weights(size))
        assert type(model.model.model_config).__name__ == "SD15"
        assert tuple(model.model.model_config.unet_config["channel_mult"]) == tuple(
            width // 320 for width in size.channels
        )
        assert clip is not None and type(vae.first_stage_model).__name__ == "TAESD"
    said = caplog.text.lower()
    assert "missing" not in said and "left over" not in said and "unexpected" not in said


def test_adapter_fits_the_checkpoint(tmp_path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", SMALLEST, effect=0.0)
    found = load_adapter(path)
    assert [site.name for site in found.config.sites] == [
        "input_blocks.1.1.transformer_blocks.0",
        "middle_block.1.transformer_blocks.0",
        "output_blocks.0.1.transformer_blocks.0",
        "output_blocks.1.1.transformer_blocks.0",
    ]
    assert found.tensors["branches.0.zero_linear.weight"].abs().max() == 0
    assert len(sites(SD15)) == 16 and {site.width for site in sites(SD15)} == {320, 640, 1280}
