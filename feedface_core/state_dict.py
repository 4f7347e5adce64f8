"""Weights as they lie on disk: read without ever running code from a file, and told apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FeedFaceError

#: What a file is, by a key that it has or that starts one of its keys: a short name, and what to tell people.
SIGNATURES = (
    ("preprocess_module.project_layer.weight", "released_adapter", "the released FeedFace adapter (models/feedface)"),
    ("in_blocks.0.attn.qkv.weight", "uvit", "UniDiffuser's U-ViT (models/diffusion_models, FeedFace Load UniDiffuser)"),
    (
        "encode_prefix.weight",
        "caption_decoder",
        "UniDiffuser's caption decoder (models/text_encoders, FeedFace Load UniDiffuser)",
    ),
    ("projection.weight", "adapter", "a FeedFace adapter (models/feedface)"),
    ("face.hidden", "face", "a saved face (models/feedface/faces; use FeedFace Load Face)"),
    ("model.diffusion_model.", "checkpoint", "a full checkpoint (put it in models/checkpoints)"),
    ("lora_unet_", "lora", "a LoRA (models/loras)"),
    ("image_proj", "ip_adapter", "an IP-Adapter or InstantID file"),
    ("vision_model.", "clip_vision", "a CLIP vision encoder (models/clip_vision)"),
)


def identify(tensors: Mapping[str, Any]) -> str | None:
    """The short name of what keys belong to, or None."""
    for signature, name, _ in SIGNATURES:
        if signature in tensors or (signature.endswith((".", "_", "j")) and _starts(tensors, signature)):
            return name
    return None


def describe(tensors: Mapping[str, Any]) -> str:
    """What keys belong to, for people: ``this is …``."""
    found = identify(tensors)
    for _, name, text in SIGNATURES:
        if name == found:
            return f"this is {text}"
    names = ", ".join(sorted(tensors)[:3])
    return f"it holds {len(tensors)} tensors such as {names}" if tensors else "it holds no tensors"


def _starts(tensors: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a ``.safetensors`` or PyTorch file.

    Raises:
        FileNotFoundError: names the path.
        FeedFaceError: a file that is truncated, of another kind, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix.lower() in (".safetensors", ".sft"):
        try:
            with safe_open(str(path), framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise FeedFaceError(
                f"{path} cannot be read as safetensors ({_first_line(error)}): it is truncated or of another kind "
                f"({path.stat().st_size} bytes). Download or export it again."
            ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as mapped:  # files of the format before torch 1.6 cannot be mapped; torch raises many kinds
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FeedFaceError(
                f"{path} is not a readable weights file: it is truncated, not a PyTorch file, or holds code, which is "
                f"never run ({_first_line(error)})"
            ) from mapped
    return _flat(loaded, path), {}


def _flat(loaded: Any, path: Path) -> dict[str, Tensor]:
    """A loaded object as a flat state dict, without the ``module.`` that data-parallel training adds to keys."""
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise FeedFaceError(f"{path}: expected a state dict of tensors, found {type(loaded).__name__}")
    others = [str(key) for key, value in loaded.items() if not (isinstance(value, Tensor) and isinstance(key, str))]
    if others:
        verb = "is" if len(others) == 1 else "are"
        raise FeedFaceError(
            f"{path}: expected a state dict of tensors, but {', '.join(others[:3])} {verb} of another kind"
        )
    prefix = "module." if all(key.startswith("module.") for key in loaded) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in loaded.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:160]


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
        "of another shape": [f"{name} is {tuple(found[name].shape)}, expected {expected[name]}" for name in shapes],
        "no floating-point numbers": [name for name in common if not found[name].is_floating_point()],
    }
    if not any(listed.values()):
        listed["with NaN or infinite values"] = [name for name in common if not torch.isfinite(found[name]).all()]
    text = [
        f"{len(names)} {label}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for label, names in listed.items()
        if names
    ]
    if text:
        raise FeedFaceError(f"{what}: weights do not fit the config ({'; '.join(text)})")
