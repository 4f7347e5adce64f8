"""diffusers' configurations of a single-file Stable Diffusion checkpoint, read off the shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import TrainerError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = "conditioner.embedders.0.transformer.text_model."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
POSITIONS = ("embeddings.position_embedding.weight", "positional_embedding")  # of OpenAI's CLIP, and of OpenCLIP
HEAD_WIDTH = 64
Shapes = Mapping[str, tuple[int, ...]]


def read_configs(weights: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> dict[str, dict[str, Any]]:
    """What diffusers and transformers need to know about a checkpoint, by subfolder of a diffusers folder:
    ``unet``, ``vae``, ``scheduler``, ``text_encoder`` and, for SDXL, ``text_encoder_2``.

    The scheduler's ``prediction_type`` is None where the weights do not tell.

    Args:
        metadata: of the file.
        name: of the file, for messages.

    Raises:
        TrainerError: for a checkpoint of something else, or one that lacks its autoencoder or text encoder.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise TrainerError(
            f"model.base: {name} is no Stable Diffusion checkpoint: it has no {UNET}input_blocks.0.0.weight "
            f"(but {', '.join(sorted(shapes)[:3])} …)"
        )
    for prefix, what in ((VAE, "autoencoder"), (("cond_stage_model.", "conditioner."), "text encoder")):
        if not any(key.startswith(prefix) for key in shapes):
            raise TrainerError(f"model.base: {name} has no {what}; give a full checkpoint or a diffusers folder")
    xl = any(key.startswith(XL_OPEN_CLIP) for key in shapes)
    encoders = [
        _text_encoder(shapes, prefix)
        for prefix in (CLIP, XL_CLIP, OPEN_CLIP, XL_OPEN_CLIP)
        if any(prefix + name in shapes for name in POSITIONS)
    ]
    if not encoders:
        raise TrainerError(f"model.base: {name} has a text encoder of an unknown layout")
    return {
        "unet": _unet(shapes),
        "vae": _autoencoder(shapes, xl),
        "scheduler": {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "rescale_betas_zero_snr": "ztsnr" in shapes,
            "prediction_type": _prediction_type(shapes, metadata),
        },
        **dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False)),
    }


def _prediction_type(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    stated = metadata.get("modelspec.prediction_type", "")
    if stated.startswith("v") or (not stated and "v_pred" in shapes):  # the key that fine-tunes of SDXL carry
        return "v_prediction"
    unclear = not stated and any(key.startswith(OPEN_CLIP) for key in shapes)  # Stable Diffusion 2 comes in both
    return None if unclear else "epsilon"


def _count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number between a prefix and a dot; 0 without any."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in shapes)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _unet(shapes: Shapes) -> dict[str, Any]:
    levels = [{"width": 0, "layers": 0, "depth": 0}]
    for index in range(1, _count(shapes, f"{UNET}input_blocks.")):
        block = f"{UNET}input_blocks.{index}."
        if f"{block}0.op.weight" in shapes:  # downsampling: the next level begins
            levels.append({"width": 0, "layers": 0, "depth": 0})
            continue
        level = levels[-1]
        level["width"] = shapes[f"{block}0.out_layers.3.weight"][0]
        level["layers"] += 1
        level["depth"] = max(level["depth"], _count(shapes, f"{block}1.transformer_blocks."))
    widths, depths = [level["width"] for level in levels], [level["depth"] for level in levels]
    middle = _count(shapes, f"{UNET}middle_block.1.transformer_blocks.")
    if depths[-1] and middle != depths[-1]:
        raise TrainerError(
            f"a U-Net with {middle} blocks in the middle and {depths[-1]} in the lowest level is not known"
        )
    text_key = next(key for key in shapes if key.startswith(UNET) and key.endswith(".attn2.to_k.weight"))
    projection = next(key for key in shapes if key.startswith(UNET) and key.endswith("proj_in.weight"))
    linear = len(shapes[projection]) == 2
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": levels[0]["layers"],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        # SD 1.x and 2.x have no attention in the lowest level, but a block in the middle, which follows its number.
        "transformer_layers_per_block": [max(depth, 1) for depth in (*depths[:-1], depths[-1] or middle)],
        "cross_attention_dim": shapes[text_key][1],
        "use_linear_projection": linear,
        # diffusers calls the number of heads attention_head_dim: 8 at every level, or 64 channels a head.
        "attention_head_dim": [max(width // HEAD_WIDTH, 1) for width in widths] if linear else 8,
        "sample_size": 64,
    }
    if embedding := shapes.get(f"{UNET}label_emb.0.0.weight"):  # SDXL: size and pooled text
        pooled = shapes[f"{XL_OPEN_CLIP}text_projection"][1]
        config |= {
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": embedding[1],
            "addition_time_embed_dim": (embedding[1] - pooled) // 6,
        }
    return config


def _autoencoder(shapes: Shapes, xl: bool) -> dict[str, Any]:
    levels = _count(shapes, f"{VAE}encoder.down.")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [shapes[f"{VAE}encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, f"{VAE}encoder.down.0.block."),
        "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"][1],
        "scaling_factor": 0.13025 if xl else 0.18215,
        "force_upcast": xl,
        "sample_size": 1024 if xl else 512,
    }


def _text_encoder(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """A CLIP text model by transformers' names (OpenAI's) or by OpenCLIP's own."""
    open_clip = prefix in (OPEN_CLIP, XL_OPEN_CLIP)
    vocabulary, width = shapes[prefix + ("" if open_clip else "embeddings.") + "token_embedding.weight"]
    layer = prefix + ("transformer.resblocks." if open_clip else "encoder.layers.")
    return {
        "model_type": "clip_text_model",
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": shapes.get(f"{prefix}text_projection", (0, width))[1],
        "intermediate_size": shapes[f"{layer}0.mlp.{'c_fc' if open_clip else 'fc1'}.weight"][0],
        "max_position_embeddings": shapes[prefix + POSITIONS[open_clip]][0],
        # Stable Diffusion 2 reads the layer before the last one; diffusers leaves the last one out.
        "num_hidden_layers": _count(shapes, layer) - (prefix == OPEN_CLIP),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
