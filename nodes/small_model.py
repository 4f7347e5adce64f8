"""The small system that comes with the pack, as ordinary MODEL, CLIP and VAE.

``models/feedface_small`` is a diffusers folder: a U-Net with Stable Diffusion's layout, a two-layer CLIP text encoder
and a KL autoencoder with 16 channels. ComfyUI's own classes are built for these sizes; the U-Net is the ordinary
``UNetModel``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, TypeVar

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_base
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from pydantic import BaseModel, Field
from torch import Tensor

from ..feedface_core.errors import FeedFaceError, MissingFile, located, shorten
from ..feedface_core.files.json_file import read_json
from ..feedface_core.state_dict import check_tensors, read_state_dict
from .checks import checked
from .folders import SMALL_MODEL
from .types import make_schema
from .unidiffuser.model import make_patcher

_Size = Annotated[int, Field(ge=1, le=4096)]
_Few = Annotated[int, Field(ge=1, le=16)]
_Widths = Annotated[list[_Size], Field(min_length=1, max_length=16)]
_Token = Annotated[int, Field(ge=0)]


class UNetSizes(BaseModel, strict=True):
    """What is read of a diffusers ``UNet2DConditionModel``'s configuration."""

    in_channels: _Size
    out_channels: _Size
    block_out_channels: _Widths
    layers_per_block: _Few
    down_block_types: list[str]
    attention_head_dim: _Size
    cross_attention_dim: _Size
    use_linear_projection: bool = False


class TextSizes(BaseModel, strict=True):
    """What is read of a ``CLIPTextConfig``."""

    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Few
    num_attention_heads: _Few
    hidden_act: Literal["quick_gelu", "gelu"]
    max_position_embeddings: _Size
    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)]
    bos_token_id: _Token
    eos_token_id: _Token


class VaeSizes(BaseModel, strict=True):
    """What is read of a diffusers ``AutoencoderKL``'s configuration."""

    block_out_channels: _Widths
    layers_per_block: _Few
    latent_channels: _Size
    sample_size: _Size
    norm_num_groups: Literal[1, 2, 4, 8, 16, 32]


Sizes = TypeVar("Sizes", bound=BaseModel)


def find_folder() -> Path:
    """The folder of the small system: the pack's own, or ``models/feedface_small`` of ComfyUI.

    Raises :class:`MissingFile` that names the folders searched.
    """
    searched = [SMALL_MODEL, Path(folder_paths.models_dir) / SMALL_MODEL.name]
    for folder in searched:
        if (folder / "unet" / "config.json").is_file():
            return folder
    raise MissingFile(
        f"FeedFace Small Model: not found in {', '.join(map(str, searched))}. It comes with the pack's repository; "
        "`python -m examples.small_model.build` trains it"
    )


def read_component(folder: Path, kind: type[Sizes]) -> tuple[Sizes, dict[str, Tensor]]:
    """Sizes and weights of one component of a diffusers folder. Raises :class:`FeedFaceError` that names the file."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise MissingFile(f"{folder}: no .safetensors there")
    return read_json(folder / "config.json", kind), read_state_dict(weights[0])[0]


def check_component(folder: Path, build: Callable[[], torch.nn.Module], weights: dict[str, Tensor]) -> None:
    """Raises :class:`FeedFaceError` unless the weights are those of the module built; nothing is allocated."""
    with located(folder):
        try:
            with torch.device("meta"):
                expected = {name: tuple(weight.shape) for name, weight in build().state_dict().items()}
        except Exception as error:  # whatever ComfyUI makes of sizes that do not go together
            raise FeedFaceError(f"config.json describes nothing that can be built ({shorten(error)})") from error
        check_tensors("weights", expected, weights)


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


def unet_config(sizes: UNetSizes) -> dict:
    """ComfyUI's description of a diffusers ``UNet2DConditionModel`` with convolutional projections."""
    widths, blocks = sizes.block_out_channels, sizes.layers_per_block
    depths = [int("CrossAttn" in name) for name in sizes.down_block_types]
    return {
        "image_size": 32,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * len(widths),
        "num_heads": sizes.attention_head_dim,
        "num_head_channels": -1,
        "transformer_depth": [depth for depth in depths for _ in range(blocks)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in depths for _ in range(blocks + 1)],
        "context_dim": sizes.cross_attention_dim,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_linear_in_transformer": sizes.use_linear_projection,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }


def load_model(folder: Path) -> ModelPatcher:
    """The U-Net as MODEL. Raises :class:`FeedFaceError` for weights that do not fit the configuration."""
    sizes, weights = read_component(folder / "unet", UNetSizes)
    described = unet_config(sizes)
    if len(sizes.down_block_types) != len(sizes.block_out_channels):
        raise FeedFaceError(f"{folder / 'unet'}: down_block_types and block_out_channels differ in length")
    names = comfy.utils.unet_to_diffusers(described)
    renamed = {names.get(name, name): weight for name, weight in weights.items()}
    check_component(folder / "unet", lambda: SmallModelConfig(described).get_model({}).diffusion_model, renamed)
    return make_patcher(SmallModelConfig(described), renamed)


def load_clip(folder: Path) -> comfy.sd.CLIP:
    """The text encoder and tokenizer as CLIP. Raises :class:`FeedFaceError` that names the folder that is broken."""
    sizes, weights = read_component(folder / "text_encoder", TextSizes)
    length = sizes.max_position_embeddings
    special = {"start": sizes.bos_token_id, "end": sizes.eos_token_id, "pad": sizes.eos_token_id}

    class SmallTextModel(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=length,
                textmodel_json_config=sizes.model_dump(),
                special_tokens=special,
                return_projected_pooled=False,
                model_options=model_options or {},
            )
            # ComfyUI's text model has CLIP's vocabulary fixed; this one is smaller
            table = self.operations.Embedding(sizes.vocab_size, sizes.hidden_size, dtype=dtype, device=device)
            self.transformer.set_input_embeddings(table)

    class SmallTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                tokenizer_path=str(folder / "tokenizer"),
                max_length=length,
                embedding_directory=embedding_directory,
                embedding_size=sizes.hidden_size,
                tokenizer_data=tokenizer_data or {},
            )

    named = {key if key.startswith("text_model.") else f"text_model.{key}": weight for key, weight in weights.items()}
    # ComfyUI's text model has a projection that this one lacks; what is not loaded would be saved uninitialised.
    named["text_projection.weight"] = torch.eye(sizes.hidden_size)
    check_component(folder / "text_encoder", lambda: SmallTextModel(device="meta").transformer, named)
    try:
        largest = max(*special.values(), *SmallTokenizer().tokenizer.get_vocab().values())
    except Exception as error:  # whatever transformers makes of broken files
        raise FeedFaceError(f"{folder / 'tokenizer'}: cannot be read as CLIP's tokenizer ({shorten(error)})") from error
    if largest >= sizes.vocab_size:
        raise FeedFaceError(f"{folder}: token {largest} of a text encoder that knows {sizes.vocab_size}")
    target = SimpleNamespace(
        params={"clip_model": SmallTextModel},
        clip=comfy.sd1_clip.SD1ClipModel,
        tokenizer=lambda **options: comfy.sd1_clip.SD1Tokenizer(tokenizer=SmallTokenizer, **options),
    )
    clip = comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights))
    clip.load_sd(named)
    return clip


def load_vae(folder: Path) -> comfy.sd.VAE:
    """The autoencoder as VAE. Raises :class:`FeedFaceError` for weights that do not fit the configuration."""
    sizes, weights = read_component(folder / "vae", VaeSizes)
    widths = sizes.block_out_channels
    described = {
        "double_z": True,
        "z_channels": sizes.latent_channels,
        "resolution": sizes.sample_size,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": sizes.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": described, "embed_dim": sizes.latent_channels}
    weights = comfy.diffusers_convert.convert_vae_state_dict(weights)
    check_component(folder / "vae", lambda: AutoencoderKL(**params), weights)
    vae = comfy.sd.VAE(sd=weights, config={"params": params})
    vae.latent_channels = sizes.latent_channels
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):  # ComfyUI's has 32 groups fixed
            module.num_groups = sizes.norm_num_groups
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
        except MissingFile as error:
            return str(error)
        return True

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
