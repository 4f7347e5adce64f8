"""Small Stable Diffusion models with random weights, as diffusers folders, for tests, examples and
benchmarks.

They have the layout of the real ones (levels, attention, one or two text encoders, tokenizer, scheduler) at a
fraction of the width, and take no download::

    python -m tools.tiny_diffusers models/tiny --family sd1

writes ``models/tiny/base`` and, with a small CLIP vision encoder, ``models/tiny/clip_vision``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.small_model.text import END, write_clip_tokenizer

MERGES = [tuple(merge.split()) for merge in ("i n", "t h", "a n", "r e", "e r</w>", "p h", "o t")]


@dataclass(frozen=True)
class TinySize:
    """Widths of the small models, multiples of 32. As in the real ones SD 1.x has 8 heads, others 64 channels a head.

    Args:
        channels: width of each level of the U-Net.
        blocks: residual blocks in each level.
        context: width of the text states (all encoders together).
        autoencoder: width of each level of the autoencoder.
        autoencoder_blocks: residual blocks in each level of the autoencoder.
        text_layers: layers of a text encoder.
        image_size: nominal side of the pictures.
        heads: attention heads of ``sd1``; 8 in the real ones.
        depths: transformer blocks in each attention of a level, for ``sdxl``; None is one, and two in the last level.
    """

    channels: Sequence[int] = (32, 64)
    blocks: int = 1
    context: int = 32
    autoencoder: Sequence[int] = (32, 32, 32, 32)
    autoencoder_blocks: int = 1
    text_layers: int = 3
    image_size: int = 64
    heads: int = 8
    depths: Sequence[int] | None = None


def unet_config(size: TinySize = TinySize(), family: str = "sd1") -> dict:
    """Arguments of ``UNet2DConditionModel``."""
    levels = len(size.channels)
    attention = [family != "sdxl" or level > 0 for level in range(levels)]
    if family != "sdxl":
        attention[-1] = levels <= 2  # SD 1.x and 2.x have none in the lowest of their four levels
    config = {
        "sample_size": size.image_size // 8,
        "block_out_channels": tuple(size.channels),
        "layers_per_block": size.blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attention)),
        "cross_attention_dim": size.context,
        "attention_head_dim": size.heads if family == "sd1" else [max(width // 64, 1) for width in size.channels],
        "use_linear_projection": family != "sd1",
    }
    if family == "sdxl":
        config |= {
            "transformer_layers_per_block": size.depths or [*[1] * (levels - 1), 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": size.context * 3 // 4 + 6 * 256,
        }
    return config


def make_base(
    folder: Path, family: str = "sd1", size: TinySize = TinySize(), seed: int = 0, prediction: str | None = None
) -> Path:
    """Write a diffusers folder in the layout of ``sd1``, ``sd2`` (v-prediction) or ``sdxl``.

    Args:
        folder: where to; made when missing.
        prediction: ``epsilon`` or ``v``; None takes what the family usually predicts.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    folder = Path(folder)
    UNet2DConditionModel(**unet_config(size, family)).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=tuple(size.autoencoder),
        layers_per_block=size.autoencoder_blocks,
        latent_channels=4,
        sample_size=size.image_size,
        down_block_types=("DownEncoderBlock2D",) * len(size.autoencoder),
        up_block_types=("UpDecoderBlock2D",) * len(size.autoencoder),
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    ).save_pretrained(folder / "vae")
    predicts = prediction or ("v" if family == "sd2" else "epsilon")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if predicts == "v" else "epsilon",
    ).save_pretrained(folder / "scheduler")
    _text_encoders(folder, family, size)
    index = {"_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _text_encoders(folder: Path, family: str, size: TinySize) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary = len(write_clip_tokenizer(folder / "tokenizer", MERGES, 77, "!" if family == "sd2" else END))
    # Stable Diffusion XL has two encoders, the second one wider.
    widths = [size.context // 4, size.context * 3 // 4] if family == "sdxl" else [size.context]
    configs = [
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=max(width // 64, 1),
            projection_dim=width,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            hidden_act="gelu" if family == "sd2" or number else "quick_gelu",
        )
        for number, width in enumerate(widths)
    ]
    CLIPTextModel(configs[0]).save_pretrained(folder / "text_encoder")
    if family == "sdxl":
        write_clip_tokenizer(folder / "tokenizer_2", MERGES, 77, "!")
        CLIPTextModelWithProjection(configs[1]).save_pretrained(folder / "text_encoder_2")


def make_encoder(
    folder: Path, width: int = 32, layers: int = 3, image_size: int = 64, patch_size: int = 32, seed: int = 1
) -> Path:
    """Write a small CLIP vision encoder in the layout of transformers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(width // 64, 1),
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=width,
        )
    ).save_pretrained(folder)
    return Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sd1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    make_base(options.folder / "base", options.family, seed=options.seed)
    make_encoder(options.folder / "clip_vision", image_size=224, seed=options.seed + 1)
    print(f"wrote {options.folder / 'base'} ({options.family}) and {options.folder / 'clip_vision'}")


if __name__ == "__main__":
    main()
