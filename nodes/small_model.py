"""The small system that comes with the pack, as ordinary MODEL, CLIP and VAE.

``models/feedface_small`` is a diffusers folder: a U-Net with Stable Diffusion's layout, a two-layer CLIP text encoder
and a KL autoencoder with 16 channels. ComfyUI's own classes are built for these sizes; the U-Net is the ordinary
``UNetModel``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..feedface_core.errors import FeedFaceError
from .folders import SMALL_MODEL
from .types import make_schema


def find_folder() -> Path:
    """The folder of the small system: the pack's own, or ``models/feedface_small`` of ComfyUI.

    Raises:
        FileNotFoundError: names the folders that were searched.
    """
    searched = [SMALL_MODEL, Path(folder_paths.models_dir) / SMALL_MODEL.name]
    for folder in searched:
        if (folder / "unet" / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"FeedFace Small Model: not found in {', '.join(map(str, searched))}. It comes with the pack's repository; "
        "`python -m examples.small_model.build` trains it"
    )


def read_part(folder: Path, part: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and weights of one part of a diffusers folder.

    Raises:
        FileNotFoundError: there are no weights.
    """
    weights = sorted((folder / part).glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"FeedFace Small Model: no .safetensors in {folder / part}")
    return json.loads((folder / part / "config.json").read_text()), comfy.utils.load_torch_file(
        str(weights[0]), safe_load=True
    )


# --------------------------------------------------------------------------- model


class SmallLatent(comfy.latent_formats.LatentFormat):
    """16 channels, with the factor of the autoencoder's configuration."""

    latent_channels = 16
    scale_factor = 0.18215


class SmallModelConfig(comfy.supported_models_base.BASE):
    """A velocity-predicting U-Net; more than four latent channels do not make it an inpainting model."""

    unet_extra_config = {}
    latent_format = SmallLatent

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False


def unet_config(config: dict) -> dict:
    """ComfyUI's description of a diffusers ``UNet2DConditionModel`` with convolutional projections."""
    widths = config["block_out_channels"]
    blocks = config["layers_per_block"]
    depths = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * len(widths),
        "num_heads": config["attention_head_dim"],
        "num_head_channels": -1,
        "transformer_depth": [d for d in depths for _ in range(blocks)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [d for d in depths for _ in range(blocks + 1)],
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "legacy": False,
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }


def load_model(folder: Path) -> comfy.model_patcher.ModelPatcher:
    """The U-Net as MODEL.

    Raises:
        FeedFaceError: the weights do not fit the configuration.
    """
    config, weights = read_part(folder, "unet")
    described = unet_config(config)
    names = comfy.utils.unet_to_diffusers(described)
    renamed = {names[key]: weight for key, weight in weights.items() if key in names}
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    model_config = SmallModelConfig(described)
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(renamed), supported_dtypes=model_config.supported_inference_dtypes
    )
    cast = comfy.model_management.unet_manual_cast(dtype, load_device, model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(dtype, cast)
    model = model_config.get_model(renamed, "").to(offload_device)
    wanted = {name: weight.shape for name, weight in model.diffusion_model.state_dict().items()}
    missing = [name for name, shape in wanted.items() if name not in renamed or renamed[name].shape != shape]
    if missing or len(weights) != len(wanted):
        raise FeedFaceError(
            f"FeedFace Small Model: {folder / 'unet'} does not fit its configuration: {len(missing)} weights missing "
            f"or of another size ({', '.join(missing[:3])}), {len(weights)} in the file, {len(wanted)} expected"
        )
    model.diffusion_model.load_state_dict(renamed)
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


# --------------------------------------------------------------------------- text


def load_clip(folder: Path) -> comfy.sd.CLIP:
    """The text encoder and tokenizer as CLIP."""
    config, weights = read_part(folder, "text_encoder")
    length = config["max_position_embeddings"]
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["eos_token_id"]}

    class SmallTextModel(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=length,
                textmodel_json_config=dict(config),
                special_tokens=special,
                return_projected_pooled=False,
                model_options=model_options or {},
            )
            # ComfyUI's text model has CLIP's vocabulary fixed; this one is smaller
            table = self.operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
            self.transformer.set_input_embeddings(table)

    class SmallTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                tokenizer_path=str(folder / "tokenizer"),
                max_length=length,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                tokenizer_data=tokenizer_data or {},
            )

    target = SimpleNamespace(
        params={"clip_model": SmallTextModel},
        clip=comfy.sd1_clip.SD1ClipModel,
        tokenizer=lambda **options: comfy.sd1_clip.SD1Tokenizer(tokenizer=SmallTokenizer, **options),
    )
    clip = comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights))
    named = {key if key.startswith("text_model.") else f"text_model.{key}": weight for key, weight in weights.items()}
    # ComfyUI's text model has a projection that this one lacks; what is not loaded would be saved uninitialised.
    named["text_projection.weight"] = torch.eye(config["hidden_size"])
    missing, _ = clip.load_sd(named)
    missing = [name for name in missing if "text_model." in name]
    if missing:
        raise FeedFaceError(
            f"FeedFace Small Model: {folder / 'text_encoder'} lacks {len(missing)} weights: {', '.join(missing[:3])}"
        )
    return clip


# --------------------------------------------------------------------------- autoencoder


def load_vae(folder: Path) -> comfy.sd.VAE:
    """The autoencoder as VAE."""
    config, weights = read_part(folder, "vae")
    widths = config["block_out_channels"]
    described = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": described, "embed_dim": config["latent_channels"]}})
    vae.latent_channels = config["latent_channels"]
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):  # ComfyUI's has 32 groups fixed
            module.num_groups = config["norm_num_groups"]
    return vae


class SmallModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            "FeedFaceSmallModel",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            search_aliases=["feedface", "demo model", "tiny model", "feedface small"],
        )

    @classmethod
    def validate_inputs(cls) -> bool | str:
        try:
            find_folder()
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls) -> io.NodeOutput:
        folder = find_folder()
        return io.NodeOutput(load_model(folder), load_clip(folder), load_vae(folder))

    @classmethod
    def fingerprint_inputs(cls) -> list[float]:
        """Trained again, it is loaded again."""
        return [os.path.getmtime(path) for path in sorted(find_folder().glob("*/*.safetensors"))]


NODES = [SmallModel]
