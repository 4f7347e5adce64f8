"""Weights as they lie on disk: read without ever running code from a file, and told apart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import FeedFaceError, MissingFile, listing, located, shorten

#: What a file is, by what starts one of its keys: a short name, and what to tell people.
SIGNATURES = {
    "preprocess_module.project_layer.weight": ("released_adapter", "the released FeedFace adapter (models/feedface)"),
    "in_blocks.0.attn.qkv.weight": ("uvit", "UniDiffuser's U-ViT (models/diffusion_models, FeedFace Load UniDiffuser)"),
    "encode_prefix.weight": (
        "caption_decoder",
        "UniDiffuser's caption decoder (models/text_encoders, FeedFace Load UniDiffuser)",
    ),
    "projection.weight": ("adapter", "a FeedFace adapter (models/feedface)"),
    "face.hidden": ("face", "a saved face (models/feedface/faces; use FeedFace Load Face)"),
    "model.diffusion_model.": ("checkpoint", "a full checkpoint (put it in models/checkpoints)"),
    "lora_unet_": ("lora", "a LoRA (models/loras)"),
    "image_proj": ("ip_adapter", "an IP-Adapter or InstantID file"),
    "vision_model.": ("clip_vision", "a CLIP vision encoder (models/clip_vision)"),
}


def identify(tensors: Mapping[str, Any]) -> str | None:
    """The short name of what keys belong to, or None."""
    matches = (name for start, (name, _) in SIGNATURES.items() if any(key.startswith(start) for key in tensors))
    return next(matches, None)


def describe(tensors: Mapping[str, Any]) -> str:
    """What keys belong to, for people: ``this is …``."""
    if found := identify(tensors):
        return f"this is {dict(SIGNATURES.values())[found]}"
    return f"it holds {len(tensors)} tensors such as {listing(sorted(tensors))}" if tensors else "it holds no tensors"


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a weight that sizes are read off. Raises :class:`FeedFaceError` unless it is there and not empty."""
    if name not in tensors:
        raise FeedFaceError(f"{describe(tensors)}; it lacks {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise FeedFaceError(f"{name} has the shape {shorten(shape)}, expected {dimensions} dimensions, none of them 0")
    return shape


def read_state_dict(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a ``.safetensors`` or PyTorch file.

    Raises:
        MissingFile: names the path.
        FeedFaceError: a file that is truncated, of another kind, or holds more than tensors.
    """
    with located(path):
        if not os.path.isfile(path):
            raise MissingFile("no such file")
        if Path(path).suffix.lower() in (".safetensors", ".sft"):
            return _read_safetensors(path)
        return _plain(_unpickle(path)), {}


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # the library and torch raise many types for what is broken
        raise FeedFaceError(
            f"cannot be read as safetensors ({shorten(error)}): it is truncated or of another kind "
            f"({os.path.getsize(path)} bytes). Download or export it again."
        ) from error


def _unpickle(path: str | os.PathLike) -> Any:
    for mmap in (True, False):  # files of the format before torch 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # torch raises many types
            cause = error
    raise FeedFaceError(
        "not a readable weights file: it is truncated, not a PyTorch file, or holds code, which is never run "
        f"({shorten(cause)})"
    ) from cause


def _plain(loaded: Any) -> dict[str, Tensor]:
    """A loaded object as a flat state dict, without the ``module.`` that data-parallel training adds to keys."""
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise FeedFaceError(f"expected a state dict of tensors, found {shorten(loaded)}")
    others = [key for key, value in loaded.items() if not (isinstance(key, str) and _is_stored(value))]
    if others:
        raise FeedFaceError(f"expected a state dict of tensors, of another type: {listing(others)}")
    prefix = "module." if all(key.startswith("module.") for key in loaded) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in loaded.items()}


def _is_stored(value: Any) -> bool:
    """Whether every number of a tensor is in the file: a stride of 0 makes a few bytes a tensor of any size."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.half() if tensor.itemsize == 1 else tensor).all())  # torch lacks it for 8 bits


def check_tensors(what: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Names, shapes and values of weights.

    Args:
        what: they belong to, for the message.
        expected: names and shapes.

    Raises:
        FeedFaceError: lists the first missing, surplus and misshapen weights, those that are no floating-point numbers,
            and those that hold NaN or infinity.
    """
    common = sorted(expected.keys() & found.keys())
    shapes = [name for name in common if tuple(found[name].shape) != expected[name]]
    listed = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": sorted(found.keys() - expected.keys()),
        "of another shape": [f"{name} is {(*found[name].shape,)}, expected {expected[name]}" for name in shapes],
        "no floating-point numbers": [name for name in common if not found[name].is_floating_point()],
    }
    if not any(listed.values()):
        listed["with NaN or infinite values"] = [name for name in common if not _is_finite(found[name])]
    text = [f"{len(names)} {label}: {listing(names)}" for label, names in listed.items() if names]
    if text:
        raise FeedFaceError(f"{what}: weights do not fit the config ({'; '.join(text)})")
