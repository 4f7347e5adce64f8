"""The frozen face encoder: a CLIP vision transformer of the transformers library, read at its penultimate layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import EncoderConfig

_PREFIX = "vision_model."  # in files; newer transformers leave it out of the module's own names


def build_encoder(
    config: EncoderConfig, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A ``transformers.CLIPVisionModel`` in evaluation mode.

    Args:
        config: with the fields of ``CLIPVisionConfig``.
        tensors: weights by their Hugging Face names, with or without the prefix ``vision_model.``; random
            initialisation when None.

    Raises:
        ValueError: names the missing, surplus or misshapen weights.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    # Built before the weights are read: CLIPVisionModel has no meta-device constructor that keeps its buffers.
    model = CLIPVisionModel(CLIPVisionConfig(**{**config.config, "image_size": config.image_size}))
    if tensors is not None:
        own = model.state_dict()
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in own) else ""
        given = {
            prefix + plain_name(name): tensor for name, tensor in tensors.items() if not name.endswith("position_ids")
        }
        check_tensors(
            "face encoder",
            {name: tuple(t.shape) for name, t in own.items() if not name.endswith("position_ids")},
            given,
        )
        model.load_state_dict(given, strict=False)
    return model.to(dtype).eval().requires_grad_(False)


def plain_name(name: str) -> str:
    """The name of an encoder weight without the prefix that versions of transformers add or leave out."""
    return name.removeprefix(_PREFIX)


def check_tensors(what: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` that lists the first missing, surplus and misshapen weights."""
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(given[name].shape)}, expected {expected[name]}"
        for name in sorted(expected.keys() & given.keys())
        if tuple(given[name].shape) != expected[name]
    ]
    problems = [
        f"{len(names)} {label}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for label, names in (("missing", missing), ("surplus", surplus), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(f"{what}: weights do not fit the config ({'; '.join(problems)})")


def preprocess(crops: Tensor, config: EncoderConfig) -> Tensor:
    """Face crops ``(N, H, W, 3)`` with values 0…1 → pixel values ``(N, 3, S, S)``, resized when they are not S × S.

    Raises:
        ValueError: for another shape or values that are not finite.
    """
    if crops.ndim != 4 or crops.shape[-1] != 3 or crops.shape[0] == 0:
        raise ValueError(f"face crops must be (N, H, W, 3) with N at least 1, got {tuple(crops.shape)}")
    if not torch.isfinite(crops).all():
        raise ValueError("face crops hold NaN or infinite values")
    pixels = crops.movedim(-1, 1).float()  # (N, 3, H, W)
    size = (config.image_size, config.image_size)
    if tuple(pixels.shape[-2:]) != size:
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    mean = torch.tensor(config.image_mean, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(config.image_std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.clamp(0, 1) - mean) / std


@torch.no_grad()
def encode_pixels(encoder: nn.Module, config: EncoderConfig, pixels: Tensor) -> Tensor:
    """Pixel values ``(N, 3, S, S)`` → hidden states ``(N, T, E)`` of ``config.layer``, before the post layer norm."""
    weight = next(encoder.parameters())
    states = encoder(pixel_values=pixels.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states
    return states[config.layer]


def encode(encoder: nn.Module, config: EncoderConfig, crops: Tensor) -> Tensor:
    """Face crops ``(N, H, W, 3)`` with values 0…1 → hidden states ``(N, T, E)``."""
    return encode_pixels(encoder, config, preprocess(crops, config))


def fingerprint(config: EncoderConfig, tensors: Mapping[str, Tensor]) -> str:
    """Twelve hex digits that agree for two encoders exactly when an encoded face can go from one to the other.

    Reads the shapes and one small tensor in half precision, so it costs nothing and an fp16 copy agrees with its
    original.
    """
    plain = {plain_name(name): tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    digest = hashlib.sha256(
        json.dumps(
            [
                config.image_size,
                config.image_mean,
                config.image_std,
                config.layer,
                sorted((name, list(t.shape)) for name, t in plain.items()),
            ]
        ).encode()
    )
    for name in ("embeddings.class_embedding", "post_layernorm.weight"):
        digest.update(plain[name].detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()[:12]
