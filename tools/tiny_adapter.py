"""A FeedFace adapter with random weights for the checkpoints of :mod:`tools.tiny_checkpoint`, encoder included."""

from __future__ import annotations

from pathlib import Path

import torch

from feedface_core.config import AdapterConfig, EncoderConfig, SiteConfig
from feedface_core.files.adapter_file import save_adapter
from feedface_core.modules.adapter import FaceAdapter
from feedface_core.modules.encoder import build_encoder
from tools.tiny_checkpoint import CONTEXT, TINY, UNetSize, unet_shapes

HEADS = 8  # Stable Diffusion 1.x, at every width
QUERY = ".attn1.to_q.weight"
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 32,
}


def sites(size: UNetSize = TINY) -> tuple[SiteConfig, ...]:
    """Every transformer block of a checkpoint's U-Net, from input to output."""
    widths = {name.removesuffix(QUERY): shape[1] for name, shape in unet_shapes(size) if name.endswith(QUERY)}
    return tuple(SiteConfig(name, width, HEADS, width // HEADS) for name, width in widths.items())


def write_adapter(path: Path, size: UNetSize = TINY, seed: int = 0, effect: float = 0.5) -> Path:
    """Write an adapter file; returns its path.

    Args:
        path: ends in ``.safetensors``.
        size: the U-Net it is for.
        seed: the same seed gives the same weights.
        effect: gain of the last linear layer of each branch; 0 is an untrained adapter, which changes nothing.
    """
    encoder_config = EncoderConfig(ENCODER, name="random")
    config = AdapterConfig("sd1", sites(size), CONTEXT, encoder_config, title="Random weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter, encoder = FaceAdapter(config), build_encoder(encoder_config)
        # transformers starts position embeddings and class token small: a random encoder would hardly see the photo.
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for branch in adapter.branches:
            weight = branch.zero_linear.weight
            torch.nn.init.normal_(weight, std=effect * weight.shape[1] ** -0.5)
    return save_adapter(Path(path), config, adapter.state_dict(), encoder.state_dict())
