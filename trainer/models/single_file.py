"""Configurations of a single-file Stable Diffusion checkpoint, read off the shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .frozen_model import BaseError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = "conditioner.embedders.0.transformer.text_model."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
HEAD_WIDTH = 64


@dataclass(frozen=True)
class CheckpointConfigs:
    """Configurations as diffusers and transformers write them.

    ``prediction`` is None where the weights do not tell.
    """

    unet: dict
    autoencoder: dict
    text_encoders: tuple[dict, ...]
    scheduler: dict
    prediction: str | None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a ``.safetensors`` or ``.ckpt`` file; the latter is never unpickled as code.

    Raises:
        BaseError: for a file that cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return loaded.get("state_dict", loaded), {}
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise BaseError(f"model.base: cannot read {path}: {error}") from error
    except Exception as error:  # the unpickler's own errors have no common class
        raise BaseError(f"model.base: {path} holds more than weights, and is not loaded: {error}") from error


def read_configs(weights: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> CheckpointConfigs:
    """What diffusers needs to know about a checkpoint.

    Raises:
        BaseError: for a checkpoint of another kind, or one that lacks its autoencoder or text encoder.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        some = ", ".join(sorted(shapes)[:3])
        raise BaseError(
            f"model.base: {name} is no Stable Diffusion checkpoint: it has no {UNET}input_blocks.0.0.weight "
            f"(but {some} …)"
        )
    for prefix, what in ((VAE, "autoencoder"), (("cond_stage_model.", "conditioner."), "text encoder")):
        if not any(key.startswith(prefix) for key in shapes):
            raise BaseError(f"model.base: {name} has no {what}; give a full checkpoint or a diffusers folder")
    large = any(key.startswith(XL_OPEN_CLIP) for key in shapes)
    prediction = _prediction(shapes, metadata, large)
    return CheckpointConfigs(
        unet=_unet_config(shapes),
        autoencoder=_autoencoder_config(shapes, large),
        text_encoders=_text_configs(shapes, name),
        scheduler={
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "rescale_betas_zero_snr": "ztsnr" in shapes,
            "prediction_type": "v_prediction" if prediction == "v" else "epsilon",
        },
        prediction=prediction,
    )


def _prediction(shapes: Mapping[str, tuple], metadata: Mapping[str, str], large: bool) -> str | None:
    stated = metadata.get("modelspec.prediction_type", "")
    if stated:
        return "v" if stated.startswith("v") else "epsilon"
    if "v_pred" in shapes:  # the marker that fine-tunes of SDXL carry
        return "v"
    return None if any(key.startswith(OPEN_CLIP) for key in shapes) else "epsilon"


def _count(shapes: Mapping[str, tuple], pattern: str) -> int:
    """One more than the largest number that the group of the pattern matches; 0 without a match."""
    found = (re.match(pattern, key) for key in shapes)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _unet_config(shapes: Mapping[str, tuple]) -> dict[str, Any]:
    def shape(key: str) -> tuple | None:
        return shapes.get(UNET + key)

    levels: list[dict] = [{"width": 0, "layers": 0, "depth": 0}]
    for index in range(1, _count(shapes, re.escape(UNET) + r"input_blocks\.(\d+)\.")):
        if shape(f"input_blocks.{index}.0.op.weight"):
            levels.append({"width": 0, "layers": 0, "depth": 0})
            continue
        level = levels[-1]
        level["width"] = shape(f"input_blocks.{index}.0.out_layers.3.weight")[0]
        level["layers"] += 1
        block = re.escape(f"{UNET}input_blocks.{index}.1.transformer_blocks.")
        level["depth"] = max(level["depth"], _count(shapes, block + r"(\d+)\."))
    widths = [level["width"] for level in levels]
    attention = [level["depth"] > 0 for level in levels]
    first = next(key for key in shapes if key.startswith(UNET) and key.endswith(".attn2.to_k.weight"))
    linear = (
        len(next(value for key, value in shapes.items() if key.startswith(UNET) and key.endswith("proj_in.weight")))
        == 2
    )
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": levels[0]["layers"],
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attention)],
        "transformer_layers_per_block": [max(level["depth"], 1) for level in levels],
        "cross_attention_dim": shapes[first][1],
        "use_linear_projection": linear,
        # diffusers calls the number of heads attention_head_dim: 8 at every level, or 64 channels a head.
        "attention_head_dim": [max(width // HEAD_WIDTH, 1) for width in widths] if linear else 8,
        "sample_size": 128 if shape("label_emb.0.0.weight") else 64,
    }
    middle = _count(shapes, re.escape(UNET) + r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if middle != config["transformer_layers_per_block"][-1]:
        if not attention[-1]:  # SD 1.x and 2.x: no attention in the lowest level, one block in the middle
            config["transformer_layers_per_block"][-1] = max(middle, 1)
        else:
            raise BaseError(
                f"a U-Net with {middle} blocks in the middle and {levels[-1]['depth']} in the lowest level is not known"
            )
    if embedding := shape("label_emb.0.0.weight"):
        pooled = shapes[XL_OPEN_CLIP + "text_projection"][1]
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": embedding[1],
            "addition_time_embed_dim": (embedding[1] - pooled) // 6,
        }
    return config


def _autoencoder_config(shapes: Mapping[str, tuple], large: bool) -> dict[str, Any]:
    levels = _count(shapes, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"{VAE}encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, re.escape(VAE) + r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"][1],
        "scaling_factor": 0.13025 if large else 0.18215,
        "force_upcast": large,
        "sample_size": 1024 if large else 512,
    }


def _text_configs(shapes: Mapping[str, tuple], name: str) -> tuple[dict, ...]:
    openai = [prefix for prefix in (CLIP, XL_CLIP) if f"{prefix}embeddings.position_embedding.weight" in shapes]
    configs = [_openai_config(shapes, prefix) for prefix in openai]
    openclip = [prefix for prefix in (OPEN_CLIP, XL_OPEN_CLIP) if f"{prefix}positional_embedding" in shapes]
    configs += [_openclip_config(shapes, prefix) for prefix in openclip]
    if not configs:
        raise BaseError(f"model.base: {name} has a text encoder of an unknown layout")
    return tuple(configs)


def _openai_config(shapes: Mapping[str, tuple], prefix: str) -> dict[str, Any]:
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        "num_hidden_layers": _count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _openclip_config(shapes: Mapping[str, tuple], prefix: str) -> dict[str, Any]:
    vocabulary, width = shapes[f"{prefix}token_embedding.weight"]
    layers = _count(shapes, re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    large = prefix == XL_OPEN_CLIP
    return {
        "architectures": ["CLIPTextModelWithProjection" if large else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": shapes.get(f"{prefix}text_projection", (0, width))[1],
        "intermediate_size": shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        "max_position_embeddings": shapes[f"{prefix}positional_embedding"][0],
        # Stable Diffusion 2 reads the layer before the last one; diffusers leaves the last one out.
        "num_hidden_layers": layers if large else layers - 1,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
