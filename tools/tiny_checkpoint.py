"""Stable Diffusion 1.x checkpoints and adapters with random weights, made on the spot, for tests and for trying things.

ComfyUI's ordinary checkpoint loader reads them: it knows SD 1.x by 320 model channels and context width 768,
and takes any number of levels and blocks from the file. Its text encoder has one size (CLIP ViT-L/14), and its
smallest autoencoder is TAESD's. A seed gives the same file on every machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.files.adapter_file import save_adapter
from feedface_core.hosts import list_sites
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.encoder import build_encoder
from tools.tiny_diffusers import TinySize, unet_config
from trainer.models.ldm_names import unet_to_ldm

CONTEXT = 768
TINY = TinySize(channels=(320, 320), context=CONTEXT)
SD15 = TinySize(channels=(320, 640, 1280, 1280), blocks=2, context=CONTEXT)
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 32,
}


def meta_unet(size: TinySize) -> nn.Module:
    """The U-Net of a size without storage, for its names and shapes."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**unet_config(size))


def meta_text_encoder() -> dict[str, Tensor]:
    """CLIP ViT-L/14's text model: names of ``transformers`` below ``text_model`` and tensors without storage."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        weights = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **CLIP_L)).state_dict()
    return {name.removeprefix("text_model."): value for name, value in weights.items()}


def meta_autoencoder() -> dict[str, Tensor]:
    """TAESD's names in ComfyUI and tensors without storage."""
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        taesd = AutoencoderTiny()
        weights = {f"taesd_encoder.{name}": value for name, value in taesd.encoder.layers.state_dict().items()}
        for name, value in taesd.decoder.layers.state_dict().items():  # ComfyUI's begins with a layer more
            number, _, rest = name.partition(".")
            weights[f"taesd_decoder.{int(number) + 1}.{rest}"] = value
        return weights | {"vae_scale": torch.empty(()), "vae_shift": torch.empty(())}


def random_weights(
    shapes: Iterable[tuple[str, Tensor]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights that keep activations near unit size; norms start as the identity, biases at zero.

    Args:
        shapes: names and tensors of the shapes wanted, such as ``model.named_parameters()``.
    """
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, like in shapes:
        if like.ndim < 2:
            one = name == "vae_scale" or (like.ndim == 1 and name.endswith("weight"))
            weights[name] = torch.full(like.shape, float(one), dtype=dtype)
        else:
            table = name.endswith(("token_embedding.weight", "position_embedding.weight"))
            std = 1.0 if table else math.prod(like.shape[1:]) ** -0.5
            weights[name] = torch.randn(like.shape, generator=generator).mul_(std).to(dtype)
    return weights


def unet_weights(size: TinySize = TINY, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A U-Net's state dict in the layout of the original release, without a prefix."""
    return random_weights(unet_to_ldm(meta_unet(size)).items(), seed, dtype)


def checkpoint_weights(
    size: TinySize = TINY, seed: int = 0, dtype: torch.dtype = torch.float16, text_layers: int = 2
) -> dict[str, Tensor]:
    """U-Net, text encoder and autoencoder under the names of a Stable Diffusion 1.x checkpoint.

    Args:
        size: of the U-Net.
        seed: the same seed gives the same weights.
        dtype: how they are stored.
        text_layers: layers of the text encoder that do something; the others are zero and pass their input on.
    """
    text = random_weights(meta_text_encoder().items(), seed + 1, dtype)
    for name, weight in text.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        if layer and int(layer.group(1)) >= text_layers:
            weight.zero_()
    models = {
        "model.diffusion_model.": unet_weights(size, seed, dtype),
        "cond_stage_model.transformer.text_model.": text,
        "first_stage_model.": random_weights(meta_autoencoder().items(), seed + 2, dtype),
    }
    return {prefix + name: weight for prefix, weights in models.items() for name, weight in weights.items()}


def write_checkpoint(path: Path, size: TinySize = TINY, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Write a checkpoint for ComfyUI's checkpoint loader; returns its path."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint_weights(size, seed, dtype), path)
    return path


def sites(size: TinySize = TINY) -> tuple[SiteConfig, ...]:
    """Every transformer block of a checkpoint's U-Net, from input to output."""
    return tuple(site.config() for site in list_sites(meta_unet(size)))


def write_adapter(path: Path, size: TinySize = TINY, seed: int = 0, effect: float = 0.5) -> Path:
    """Write an adapter file, its small random encoder included; returns its path.

    Args:
        path: ends in ``.safetensors``.
        size: the U-Net it is for.
        seed: the same seed gives the same weights.
        effect: gain of the last linear layer of each branch; 0 is an untrained adapter, which changes nothing.
    """
    encoder = EncoderConfig(ENCODER, name="random")
    config = AdapterConfig("sd1", sites(size), CONTEXT, encoder, title="Random weights")
    # transformers starts position embeddings and class token small: a random encoder would hardly see the photo.
    encoder_weights = random_weights(build_encoder(encoder).named_parameters(), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = FaceAdapter(config)
        for branch in adapter.branches:
            weight = branch.zero_linear.weight
            nn.init.normal_(weight, std=effect * weight.shape[1] ** -0.5)
    return save_adapter(Path(path), config, adapter.state_dict(), encoder_weights)
