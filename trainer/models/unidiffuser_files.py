"""Reading UniDiffuser's released files, and the models of others that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from feedface_core.files import released
from feedface_core.hosts import uvit
from feedface_core.hosts.uvit_config import UViTConfig
from feedface_core.modules.encoder import check_tensors

from .diffusers_files import quiet
from .frozen_model import BaseError, Part
from .stable_diffusion import StableDiffusionBase

if TYPE_CHECKING:
    from trainer.config import ModelSettings

_UVIT_KEY = "in_blocks.0.attn.qkv.weight"


def is_unidiffuser(path: Path) -> bool:
    """Whether a path is a U-ViT's file, told by its keys; never an error."""
    path = path.expanduser()
    if not path.is_file():
        return False
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                return _UVIT_KEY in file.keys()  # noqa: SIM118
        except (SafetensorError, OSError):
            return False
    return path.suffix in (".pth", ".pt")


def read_uvit(path: Path) -> tuple[dict[str, Tensor], UViTConfig]:
    """Weights and sizes of a U-ViT, checked. Raises ``BaseError`` that says what the file is instead."""
    try:
        tensors, metadata = released.read_tensors(path)
        config = UViTConfig.from_state_dict(tensors, released.settings_for(path, tensors, metadata))
        own = {key: tensor for key, tensor in tensors.items() if not key.startswith("encode_prefix.")}
        expected = {key: tuple(t.shape) for key, t in uvit.UViT(config, device="meta").state_dict().items()}
        check_tensors(str(path), expected, own)
    except (ValueError, OSError) as error:
        text = str(error)
        raise BaseError(f"model.base: {text if str(path) in text else f'{path}: {text}'}") from error
    return tensors, config


def load_prefix(settings: ModelSettings, path: Path, tensors: dict[str, Tensor]) -> nn.Linear:
    """``encode_prefix``, from the file the settings name, the U-ViT's own, or the caption decoder beside it."""
    prefix = {key: tensor for key, tensor in tensors.items() if key.startswith("encode_prefix.")}
    if settings.caption_decoder is not None or not prefix:
        given = settings.caption_decoder
        beside = sorted(path.parent.glob("caption_decoder*"))
        if given is None and not beside:
            raise BaseError(
                f"model.caption_decoder: no caption_decoder.pth beside {path}; its encode_prefix is needed "
                "to read text. Give its path"
            )
        try:
            prefix = released.read_prefix(Path(given).expanduser() if given else beside[0])
        except (ValueError, OSError) as error:
            raise BaseError(f"model.caption_decoder: {error}") from error
    linear = uvit.text_prefix(prefix)
    linear.load_state_dict({key.removeprefix("encode_prefix."): tensor for key, tensor in prefix.items()})
    return linear


@quiet()
def load_image_encoder(settings: ModelSettings, width: int) -> nn.Module:
    """The CLIP vision model with its projection to ``width`` numbers."""
    from transformers import CLIPVisionModelWithProjection

    if settings.image_encoder is None:
        raise BaseError(
            "model.image_encoder: UniDiffuser denoises a CLIP image token with the picture; give the "
            "folder of CLIP ViT-B/32 (openai/clip-vit-base-patch32)"
        )
    try:
        encoder, info = CLIPVisionModelWithProjection.from_pretrained(
            settings.image_encoder, local_files_only=not settings.allow_hub, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseError(f"model.image_encoder: cannot load {settings.image_encoder}: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise BaseError(
            f"model.image_encoder: {settings.image_encoder} is no CLIPModel with its projection: "
            f"{len(missing)} weights are missing ({', '.join(missing[:3])})"
        )
    if encoder.config.projection_dim != width:
        raise BaseError(
            f"model.image_encoder: {settings.image_encoder} makes tokens {encoder.config.projection_dim} "
            f"wide, the U-ViT denoises tokens {width} wide; it was trained with CLIP ViT-B/32"
        )
    return encoder.float()


def load_stable_diffusion(settings: ModelSettings, parts: Sequence[Part]) -> StableDiffusionBase:
    """Autoencoder and text encoder of a Stable Diffusion 1.x, as far as ``parts`` names them."""
    if settings.stable_diffusion is None:
        raise BaseError(
            "model.stable_diffusion: UniDiffuser uses the autoencoder and text encoder of Stable Diffusion "
            "1.x; give a checkpoint or a diffusers folder"
        )
    changes = {"base": settings.stable_diffusion, "family": "auto", "prediction": "auto"}
    try:
        return StableDiffusionBase.load(settings.model_copy(update=changes), parts=parts)
    except BaseError as error:
        raise BaseError(str(error).replace("model.base", "model.stable_diffusion")) from error
