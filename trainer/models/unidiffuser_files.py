"""Reading UniDiffuser's released files, and the models of others that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from feedface_core.errors import FeedFaceError
from feedface_core.files import released
from feedface_core.modules.uvit import UViT

from ..config import ModelSettings
from ..errors import TrainerError
from .diffusers_files import load_clip_vision
from .frozen_model import Component
from .stable_diffusion import StableDiffusion

_UVIT_KEY = "in_blocks.0.attn.qkv.weight"


def is_unidiffuser(path: Path) -> bool:
    """Whether a path is a U-ViT's file, by its keys; never an error."""
    path = path.expanduser()
    if not path.is_file() or path.suffix != ".safetensors":
        return path.is_file() and path.suffix in (".pth", ".pt")
    try:
        with safe_open(str(path), framework="pt") as file:
            return _UVIT_KEY in file.keys()  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def load_uvit(path: Path) -> tuple[UViT, dict[str, Tensor]]:
    """The U-ViT, and the weights of ``encode_prefix`` where its file carries them. Raises ``TrainerError`` that says
    what the file is instead."""
    try:
        tensors, prefix, config = released.read_uvit(path)
    except (FeedFaceError, OSError) as error:
        raise TrainerError(f"model.base: {error}") from error
    host = UViT(config, device="meta")
    host.load_state_dict(tensors, assign=True)
    return host, prefix


def load_prefix(settings: ModelSettings, path: Path, prefix: Mapping[str, Tensor]) -> nn.Linear:
    """``encode_prefix``, from the file the settings name, the U-ViT's own, or the caption decoder beside it.

    Args:
        path: of the U-ViT.
        prefix: its weights in the U-ViT's own file, if it has them.
    """
    if settings.caption_decoder is not None or not prefix:
        named = [Path(settings.caption_decoder).expanduser()] if settings.caption_decoder else []
        found = named or sorted(path.parent.glob("caption_decoder*"))
        if not found:
            raise TrainerError(
                f"model.caption_decoder: no caption_decoder.pth beside {path}; its encode_prefix is needed to read "
                "text. Give its path"
            )
        try:
            prefix = released.read_prefix(found[0])
        except (FeedFaceError, OSError) as error:
            raise TrainerError(f"model.caption_decoder: {error}") from error
    weights = {key.removeprefix("encode_prefix."): tensor for key, tensor in prefix.items()}
    linear = nn.Linear(*reversed(weights["weight"].shape))
    linear.load_state_dict(weights)
    return linear


def load_image_encoder(settings: ModelSettings, width: int) -> nn.Module:
    """The CLIP vision model with its projection to ``width`` numbers."""
    if settings.image_encoder is None:
        raise TrainerError(
            "model.image_encoder: UniDiffuser denoises a CLIP image token with the picture; give the folder of CLIP "
            "ViT-B/32 (openai/clip-vit-base-patch32)"
        )
    cls, path = CLIPVisionModelWithProjection, settings.image_encoder
    encoder = load_clip_vision(cls, path, "model.image_encoder", settings.allow_hub)
    found = encoder.config.projection_dim
    if found != width:
        raise TrainerError(
            f"model.image_encoder: {path} makes tokens {found} wide, the U-ViT denoises tokens {width} wide; it was "
            "trained with CLIP ViT-B/32"
        )
    return encoder


def load_stable_diffusion(settings: ModelSettings, components: Sequence[Component]) -> StableDiffusion:
    """Autoencoder and text encoder of a Stable Diffusion 1.x, as far as ``components`` names them."""
    if settings.stable_diffusion is None:
        raise TrainerError(
            "model.stable_diffusion: UniDiffuser uses the autoencoder and text encoder of Stable Diffusion 1.x; give a "
            "checkpoint or a diffusers folder"
        )
    changes = {"base": settings.stable_diffusion, "family": "auto", "prediction": "auto"}
    try:
        return StableDiffusion.load(settings.model_copy(update=changes), components=components)
    except TrainerError as error:
        raise TrainerError(str(error).replace("model.base", "model.stable_diffusion")) from error
