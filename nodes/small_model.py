"""The small system that comes with the pack, as ordinary MODEL, CLIP and VAE.

``models/feedface_small`` is a diffusers folder: a U-Net with Stable Diffusion's layout, a two-layer CLIP text encoder
and a KL autoencoder with 16 channels. ComfyUI's own classes are built for these sizes; the U-Net is the ordinary
``UNetModel``.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.diffusers_convert import convert_vae_state_dict
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy_api.latest import io
from torch import Tensor

from ..feedface_core.errors import FeedFaceError, MissingFile, shorten
from ..feedface_core.files.json_file import read_json
from ..feedface_core.state_dict import check_tensors, read_state_dict
from .checks import checked
from .folders import SMALL_MODEL
from .types import make_schema
from .unidiffuser.model import make_patcher

#: What the configurations must say of the system: the sizes that this file builds.
_UNET = {
    "in_channels": 16, "out_channels": 16, "block_out_channels": [128, 128], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2, "attention_head_dim": 4, "cross_attention_dim": 128,
    "use_linear_projection": False,
}  # fmt: skip
_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_act": "quick_gelu", "max_position_embeddings": 32,
}  # fmt: skip
_VAE = {
    "block_out_channels": [32, 64, 96, 128], "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 8,
    "scaling_factor": 0.18215,
}  # fmt: skip
#: The same in the words of ComfyUI's ``UNetModel`` and ``AutoencoderKL``.
_UNET_MODEL = {
    "image_size": 32, "in_channels": 16, "out_channels": 16, "model_channels": 128, "channel_mult": [1, 1],
    "num_res_blocks": [1, 1], "num_heads": 4, "num_head_channels": -1, "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 128,
    "use_spatial_transformer": True, "legacy": False, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False,
}  # fmt: skip
_AUTOENCODER = {
    "double_z": True, "z_channels": 16, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 3, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def find_folder() -> Path:
    """The folder of the small system: the pack's own, or ``models/feedface_small`` of ComfyUI.

    Raises :class:`MissingFile` that names the folders searched.
    """
    searched = [SMALL_MODEL, Path(folder_paths.models_dir) / SMALL_MODEL.name]
    for folder in searched:
        if (folder / "unet" / "config.json").is_file():
            return folder
    raise MissingFile(
        f"not found in {', '.join(map(str, searched))}. It comes with the pack's repository; "
        "`python -m examples.small_model.build` trains it"
    )


def read_component(folder: Path, sizes: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of one component of a diffusers folder. Raises :class:`FeedFaceError` for one of other sizes."""
    config = read_json(folder / "config.json", dict[str, Any])
    for name, value in sizes.items():
        found = config.get(name)
        if type(found) is not type(value) or found != value:
            raise FeedFaceError(f"{folder / 'config.json'}: {name} is {shorten(found)}, the small model's is {value}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise MissingFile(f"{folder}: no .safetensors there")
    return read_state_dict(weights[0])[0]


def check_weights(folder: Path, model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises :class:`FeedFaceError` unless the weights are those of the model."""
    check_tensors(str(folder), {name: tuple(weight.shape) for name, weight in model.state_dict().items()}, weights)


class SmallLatent(comfy.latent_formats.LatentFormat):
    latent_channels = 16
    scale_factor = 0.18215  # of the autoencoder's configuration


class SmallModelConfig(comfy.supported_models_base.BASE):
    """A velocity-predicting U-Net; more than four latent channels do not make it an inpainting model."""

    unet_extra_config = {}
    latent_format = SmallLatent

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False


def load_model(folder: Path) -> ModelPatcher:
    """The U-Net as MODEL. Raises :class:`FeedFaceError` for weights that do not fit."""
    folder = folder / "unet"
    weights = read_component(folder, _UNET)
    names = comfy.utils.unet_to_diffusers(_UNET_MODEL)
    renamed = {names.get(name, name): weight for name, weight in weights.items()}
    check_weights(folder, SmallModelConfig(_UNET_MODEL).get_model({}).diffusion_model, renamed)
    return make_patcher(SmallModelConfig(_UNET_MODEL), renamed)


def load_clip(folder: Path) -> comfy.sd.CLIP:
    """The text encoder and tokenizer as CLIP. Raises :class:`FeedFaceError` that names the folder that is broken."""
    weights = read_component(folder / "text_encoder", _TEXT)
    named = {key if key.startswith("text_model.") else f"text_model.{key}": weight for key, weight in weights.items()}
    length, width = _TEXT["max_position_embeddings"], _TEXT["hidden_size"]
    make_tokenizer = functools.partial(
        SDTokenizer, tokenizer_path=str(folder / "tokenizer"), max_length=length, embedding_size=width
    )
    try:
        tokenizer = make_tokenizer().tokenizer
        start, end, count = tokenizer.bos_token_id, tokenizer.eos_token_id, max(tokenizer.get_vocab().values()) + 1
    except Exception as error:  # transformers raises many types for broken files
        raise FeedFaceError(f"{folder / 'tokenizer'}: cannot be read as CLIP's tokenizer ({shorten(error)})") from error

    def make_text_model(device="cpu", dtype=None, model_options=None) -> SDClipModel:
        model = SDClipModel(
            device=device,
            dtype=dtype,
            max_length=length,
            textmodel_json_config={**_TEXT, "eos_token_id": end},
            special_tokens={"start": start, "end": end, "pad": end},
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        # ComfyUI's text model has CLIP's vocabulary fixed; this one is smaller.
        model.transformer.set_input_embeddings(model.operations.Embedding(count, width, dtype=dtype, device=device))
        return model

    # ComfyUI's text model has a projection that this one lacks; what is not loaded would be saved uninitialised.
    named["text_projection.weight"] = torch.eye(width)
    check_weights(folder / "text_encoder", make_text_model().transformer, named)
    target = SimpleNamespace(
        params={"clip_model": make_text_model},
        clip=SD1ClipModel,
        tokenizer=functools.partial(SD1Tokenizer, tokenizer=make_tokenizer),
    )
    clip = comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights))
    clip.load_sd(named)
    return clip


def load_vae(folder: Path) -> comfy.sd.VAE:
    """The autoencoder as VAE. Raises :class:`FeedFaceError` for weights that do not fit."""
    folder = folder / "vae"
    weights = convert_vae_state_dict(read_component(folder, _VAE))
    params = {"ddconfig": _AUTOENCODER, "embed_dim": 16}
    check_weights(folder, AutoencoderKL(**params), weights)
    vae = comfy.sd.VAE(sd=weights, config={"params": params})
    vae.latent_channels = 16
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = 8  # ComfyUI's has 32 fixed
    return vae


class SmallModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceSmallModel",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            search_aliases=["feedface", "demo model", "tiny model", "feedface small", "portrait", "try feedface"],
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        folder = find_folder()
        return io.NodeOutput(load_model(folder), load_clip(folder), load_vae(folder))

    @classmethod
    def fingerprint_inputs(cls) -> list[float]:
        """Trained again, it is loaded again."""
        return [os.path.getmtime(path) for path in sorted(find_folder().glob("*/*.safetensors"))]


NODES = [SmallModel]
