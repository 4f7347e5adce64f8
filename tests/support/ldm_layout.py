"""From the layout of diffusers to that of the original single-file checkpoints, for tests that need both."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.models.ldm_names import unet_to_ldm

OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def autoencoder_to_ldm(autoencoder: nn.Module) -> dict[str, Tensor]:
    """A diffusers AutoencoderKL's weights by their LDM names."""
    last = len(autoencoder.config.block_out_channels) - 1
    weights = {}
    for name, value in autoencoder.state_dict().items():
        if ".attentions.0.to_" in name and name.endswith("weight"):
            value = value[:, :, None, None]  # linears were 1 × 1 convolutions
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{last - int(match.group(1))}.", name)
        name = re.sub(r"(up\.\d+)\.resnets\.(\d+)", r"\1.block.\2", name)
        name = name.replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match.group(1)) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        for theirs, ours in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ):
            name = name.replace(f".{theirs}.", f".{ours}.")
        weights[name] = value
    return weights


def openai_text(encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIPTextModel's weights below ``text_model.``."""
    return {
        name.removeprefix("text_model."): value
        for name, value in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }


def openclip_text(encoder: nn.Module, extra_layers: int = 0) -> dict[str, Tensor]:
    """A CLIP text model's weights by OpenCLIP's names; ``extra_layers`` more that the host does not read."""
    own = openai_text(encoder)
    weights = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
        "logit_scale": torch.tensor(1.0),
        "text_projection": own["text_projection.weight"].T.contiguous()
        if "text_projection.weight" in own
        else torch.eye(own["final_layer_norm.weight"].shape[0]),
    }
    layers = encoder.config.num_hidden_layers
    for index in range(layers + extra_layers):
        old, new = f"encoder.layers.{min(index, layers - 1)}", f"transformer.resblocks.{index}"
        for leaf in ("weight", "bias"):
            parts = [own[f"{old}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            weights[f"{new}.attn.in_proj_{leaf}"] = torch.cat(parts)
            for theirs, ours in OPEN_CLIP.items():
                weights[f"{new}.{ours}.{leaf}"] = own[f"{old}.{theirs}.{leaf}"].clone()
    return weights


def folder_to_single_file(folder: Path, target: Path, family: str, metadata: dict | None = None) -> Path:
    """Write a diffusers folder as a single-file checkpoint of the same family."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first = CLIPTextModel.from_pretrained(folder / "text_encoder")
    parts = {
        "model.diffusion_model.": unet_to_ldm(UNet2DConditionModel.from_pretrained(folder / "unet")),
        "first_stage_model.": autoencoder_to_ldm(AutoencoderKL.from_pretrained(folder / "vae")),
    }
    if family == "sd1":
        parts["cond_stage_model.transformer.text_model."] = openai_text(first)
    elif family == "sd2":
        parts["cond_stage_model.model."] = openclip_text(first, extra_layers=1)
    else:
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        parts["conditioner.embedders.0.transformer.text_model."] = openai_text(first)
        parts["conditioner.embedders.1.model."] = openclip_text(second)
    weights = {prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.items()}
    save_file(weights, target, metadata=metadata)
    return target
