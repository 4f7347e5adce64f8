"""The frozen face encoder: a CLIP vision transformer of the transformers library, read at its penultimate layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import EncoderConfig
from ..errors import FeedFaceError
from ..state_dict import check_tensors

_PREFIX = "vision_model."  # in files; newer transformers leave it out of the module's own names


def plain_name(name: str) -> str:
    """The name of an encoder weight without the prefix that versions of transformers add or leave out."""
    return name.removeprefix(_PREFIX)


def plain_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their plain names, without the buffer that older versions of transformers put into files."""
    return {plain_name(name): tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def _vision_model(config: EncoderConfig) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    try:
        return CLIPVisionModel(CLIPVisionConfig(**{**config.config, "image_size": config.image_size}))
    except Exception as error:  # whatever transformers makes of fields that do not go together
        raise FeedFaceError(f"face encoder: transformers cannot build it from its config ({error})") from error


def check_encoder(config: EncoderConfig, tensors: Mapping[str, Tensor], what: str = "face encoder") -> None:
    """Raises :class:`FeedFaceError` unless these weights are those of the config; nothing is allocated."""
    with torch.device("meta"):
        expected = plain_weights(_vision_model(config).state_dict())
    layers = config.config.get("num_hidden_layers", 12)
    if not -layers - 1 <= config.layer <= layers:
        raise FeedFaceError(f"{what}: layer {config.layer} of an encoder with {layers} layers")
    check_tensors(what, {name: tuple(tensor.shape) for name, tensor in expected.items()}, plain_weights(tensors))


def build_encoder(
    config: EncoderConfig, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A ``transformers.CLIPVisionModel`` in evaluation mode.

    Args:
        config: with the fields of ``CLIPVisionConfig``.
        tensors: weights by their Hugging Face names, with or without the prefix ``vision_model.``; random
            initialisation when None.

    Raises:
        FeedFaceError: names the missing, surplus or misshapen weights.
    """
    # Not on the meta device: CLIPVisionModel has no constructor there that keeps its buffers.
    model = _vision_model(config)
    if tensors is not None:
        check_encoder(config, tensors)
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in model.state_dict()) else ""
        model.load_state_dict({prefix + name: t for name, t in plain_weights(tensors).items()}, strict=False)
    return model.to(dtype).eval().requires_grad_(False)


def preprocess(crops: Tensor, config: EncoderConfig) -> Tensor:
    """Face crops ``(N, H, W, 3)`` with values 0…1 → pixel values ``(N, 3, S, S)``, resized when they are not S × S.

    Raises:
        FeedFaceError: for another shape or type, or values that are not finite or not in 0…1.
    """
    if crops.ndim != 4 or crops.shape[-1] != 3 or crops.shape[0] == 0:
        raise FeedFaceError(f"face crops must be (N, H, W, 3) with N at least 1, got {tuple(crops.shape)}")
    if not crops.is_floating_point():
        raise FeedFaceError(f"face crops must be floats in 0…1, found {crops.dtype}; divide by 255")
    low, high = (float(value) for value in torch.aminmax(crops))
    if not (low >= -0.5 and high <= 1.5):  # a NaN anywhere makes both of them NaN, which fails
        raise FeedFaceError(f"face crops must have finite values in 0…1, found {low:.3g} to {high:.3g} (NaN?)")
    pixels = crops.movedim(-1, 1).float()  # (N, 3, H, W)
    size = (config.image_size, config.image_size)
    if tuple(pixels.shape[-2:]) != size:
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (config.image_mean, config.image_std))
    return (pixels.clamp(0, 1) - mean) / std


@torch.no_grad()
def encode_pixels(encoder: nn.Module, config: EncoderConfig, pixels: Tensor) -> Tensor:
    """Pixel values ``(N, 3, S, S)`` → hidden states ``(N, T, E)`` of ``config.layer``, before the post layer norm; of
    the class token alone where the config pools."""
    weight = next(encoder.parameters())
    states = encoder(pixel_values=pixels.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states
    return states[config.layer][:, :1] if config.pooling == "class" else states[config.layer]


def encode(encoder: nn.Module, config: EncoderConfig, crops: Tensor) -> Tensor:
    """Face crops ``(N, H, W, 3)`` with values 0…1 → hidden states ``(N, T, E)``."""
    return encode_pixels(encoder, config, preprocess(crops, config))


def fingerprint(config: EncoderConfig, tensors: Mapping[str, Tensor]) -> str:
    """Twelve hex digits that agree for two encoders exactly when an encoded face can go from one to the other.

    Reads the shapes and two small tensors in half precision, so it costs nothing and an fp16 copy agrees with its
    original. Raises :class:`FeedFaceError` for weights of another kind.
    """
    plain = plain_weights(tensors)
    shapes = sorted((name, list(tensor.shape)) for name, tensor in plain.items())
    described = [config.image_size, config.image_mean, config.image_std, config.layer, shapes]
    described += [] if config.pooling == "none" else [config.pooling]
    digest = hashlib.sha256(json.dumps(described).encode())
    for name in ("embeddings.class_embedding", "post_layernorm.weight"):
        if name not in plain:
            raise FeedFaceError(f"face encoder: not a CLIP vision transformer, it lacks {name}")
        digest.update(plain[name].detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:12]
