"""The files of the published releases: UniDiffuser v1 and the FeedFace adapter for it.

They are plain PyTorch state dicts that say nothing about themselves. What the weights cannot tell (attention
heads, and the settings the adapter was made with) is kept here for the published sizes; for other sizes it
comes from a JSON file beside the weights or from safetensors metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import AdapterConfig, EncoderConfig, SiteConfig
from ..errors import FeedFaceError
from ..modules.encoder import fingerprint
from .atomic import AdapterFileError

#: Key of the safetensors metadata that holds the settings as JSON.
METADATA_KEY = "unidiffuser"
ADAPTER_SIGNATURE = "preprocess_module.project_layer.weight"
PREFIX_SIGNATURE = "encode_prefix.weight"
#: Branch heads by width: 64 of 24, where the frozen model has 24 of 64.
_BRANCH_HEADS = {1536: 64}
#: Attention heads of OpenAI's CLIP vision models by width.
_VISION_HEADS = {768: 12, 1024: 16}
_ENCODER = "preprocess_module.clip_model."
_OWN_ENCODER = "encoder.vision_model."
_KINDS = {
    "adapter": "the released FeedFace adapter (models/feedface)",
    "uvit": "UniDiffuser's U-ViT (models/diffusion_models, node FeedFace Load UniDiffuser)",
    "caption_decoder": "UniDiffuser's caption decoder (models/text_encoders, node FeedFace Load UniDiffuser)",
}


class UnreadableFile(FeedFaceError):
    """A weights file that is truncated, no weights file at all, or holds more than tensors."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a ``.safetensors`` or PyTorch file, without ever running code from it.

    Raises:
        FileNotFoundError: names the path.
        UnreadableFile: says what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix.lower() in (".safetensors", ".sft"):
        return _read_safetensors(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as mapped:  # files of the format before torch 1.6 cannot be mapped
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UnreadableFile(
                f"{path}: not a readable weights file. It is truncated, not a PyTorch file, or holds objects "
                f"other than tensors, which are refused ({_first_line(error)})"
            ) from mapped
    return plain_state(loaded, path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:
        raise UnreadableFile(
            f"{path}: not a readable safetensors file, perhaps truncated ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


def plain_state(loaded: Any, path: str | Path) -> dict[str, Tensor]:
    """A loaded object as a flat state dict, without the ``module.`` that data-parallel training adds to keys.

    Raises :class:`UnreadableFile` when it is something else.
    """
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise UnreadableFile(f"{path}: expected a state dict of tensors, found {type(loaded).__name__}")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise UnreadableFile(
            f"{path}: expected a state dict of tensors, but {', '.join(others[:3])} "
            f"{'is' if len(others) == 1 else 'are'} of another kind"
        )
    if all(key.startswith("module.") for key in loaded):
        return {key.removeprefix("module."): tensor for key, tensor in loaded.items()}
    return dict(loaded)


def settings_for(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the weights cannot tell: from the metadata, or ``NAME.json`` beside the file, or a ``config.json`` beside it
    that says of itself that it is for a model of the weights' width (``embed``).

    Keys: ``heads``, ``text_tokens``, ``grid`` of the U-ViT; ``branch_heads`` (or ``heads``), ``sites`` and
    ``vision`` (fields of ``CLIPVisionConfig``) of the adapter. Raises ``ValueError`` when a JSON file is not an
    object.
    """
    if metadata and METADATA_KEY in metadata:
        return json.loads(metadata[METADATA_KEY])
    path = Path(path)
    for candidate in (path.with_suffix(".json"), path.with_name("config.json")):
        if candidate.is_file() and (candidate.stem == path.stem or _embed(candidate) in _widths(tensors)):
            try:
                settings = json.loads(candidate.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"{candidate}: not readable as JSON ({error})") from error
            if not isinstance(settings, dict):
                raise ValueError(f"{candidate}: expected a JSON object, found {type(settings).__name__}")
            return settings
    return {}


def _embed(path: Path) -> int | None:
    """What a JSON file of any kind gives as ``embed``."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # somebody else's
    width = settings.get("embed") if isinstance(settings, dict) else None
    return width if isinstance(width, int) else None


def _widths(tensors: Mapping[str, Tensor]) -> set[int]:
    return {tensors[key].shape[at] for key, at in ((ADAPTER_SIGNATURE, 0), ("pos_embed", -1)) if key in tensors}


def kind(tensors: Mapping[str, Tensor]) -> str | None:
    """``adapter``, ``uvit``, ``caption_decoder``, or None for a file that is none of the released ones."""
    if ADAPTER_SIGNATURE in tensors:
        return "adapter"
    if "pos_embed" in tensors and "in_blocks.0.attn.qkv.weight" in tensors:
        return "uvit"
    return "caption_decoder" if PREFIX_SIGNATURE in tensors else None


def is_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the released FeedFace adapter."""
    return ADAPTER_SIGNATURE in tensors


def read_adapter(state: Any, path: str | Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The released adapter in this project's terms.

    Settings that its size does not tell come from the JSON file beside it.

    Returns:
        Config, tensors of the adapter and weights of the encoder by their plain Hugging Face names. See
        :func:`adapter_from`.

    Raises:
        AdapterFileError: names the file and says what it is, when it is not the adapter.
    """
    try:
        tensors = plain_state(state, path)
        if not is_adapter(tensors):
            raise ValueError(
                f"{_describe(tensors)}; the released FeedFace adapter has {ADAPTER_SIGNATURE}, which is not there"
            )
        config, renamed = adapter_from(tensors, settings_for(path, tensors))
    except ValueError as error:
        text = str(error)
        raise AdapterFileError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    encoder = {
        key.removeprefix(_OWN_ENCODER): renamed.pop(key) for key in list(renamed) if key.startswith(_OWN_ENCODER)
    }
    described = replace(config.encoder, fingerprint=fingerprint(config.encoder, encoder))
    return replace(config, encoder=described), renamed, encoder


def _describe(tensors: Mapping[str, Tensor]) -> str:
    found = kind(tensors)
    if found is not None:
        return f"this is {_KINDS[found]}"
    keys = sorted(tensors)
    return f"{len(keys)} tensors such as {', '.join(keys[:3])}"


def adapter_from(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The released adapter in this project's terms.

    Args:
        tensors: with the released keys.
        settings: see :func:`settings_for`.

    Returns:
        Its config, with the released settings (reads the block's output, strength 0.8, crops normalised to
        −1…1, at most five references), and its tensors under the keys of an adapter file.

    Raises:
        ValueError: for missing weights, or a size whose heads are not known.
    """
    settings = settings or {}
    renamed = {_rename(key): tensor for key, tensor in tensors.items()}
    count = len({key.split(".")[1] for key in renamed if key.startswith("branches.")})
    if count == 0:
        raise ValueError(
            "the released adapter's projection is there, but none of its blocks "
            "(blocks.0.zero_linear.…): the file is incomplete"
        )
    width = tensors[ADAPTER_SIGNATURE].shape[0]
    heads = int(settings.get("branch_heads", _BRANCH_HEADS.get(width, settings.get("heads", 0))))
    if heads < 1 or width % heads:
        raise ValueError(
            f"branches of width {width}: the number of attention heads cannot be read off the "
            'weights, give it as {"branch_heads": N} in a .json file of the same name beside the '
            "adapter"
        )
    names = settings.get("sites") or _site_names(count)
    if len(names) != count:
        raise ValueError(f"{count} branches in the file, but {len(names)} sites in its settings")
    config = AdapterConfig(
        host="unidiffuser",
        sites=tuple(SiteConfig(name, width, heads, width // heads) for name in names),
        context_width=width,
        encoder=_encoder_config(renamed, settings.get("vision")),
        tap="output",
        strength=0.8,
        max_references=5,
        combination="concat",
        null="off",
        title="FeedFace for UniDiffuser v1",
    )
    return config, renamed


def _rename(key: str) -> str:
    if key == ADAPTER_SIGNATURE:
        return "projection.weight"
    if key.startswith(_ENCODER):
        return _OWN_ENCODER + key.removeprefix(_ENCODER).removeprefix("vision_model.")
    if key.startswith("blocks."):
        return "branches." + key.removeprefix("blocks.")
    return key  # reported as surplus when the adapter is built


def _site_names(count: int) -> list[str]:
    """Every other block on both sides: ``in_blocks.0, 2, …`` and then ``out_blocks.0, 2, …``."""
    if count % 2:
        raise ValueError(
            f"{count} branches do not split evenly over both sides of the U-ViT: name the sites in "
            'a .json file of the same name beside the adapter, {"sites": ["in_blocks.0", …]}'
        )
    return [f"{side}.{2 * i}" for side in ("in_blocks", "out_blocks") for i in range(count // 2)]


def _encoder_config(renamed: Mapping[str, Tensor], vision: Mapping[str, Any] | None) -> EncoderConfig:
    """CLIP's vision transformer, sizes read off its weights, normalised with 0.5 as the release does."""

    def shape(name: str) -> torch.Size:
        try:
            return renamed[_OWN_ENCODER + name].shape
        except KeyError:
            raise ValueError(f"the face encoder inside the released adapter lacks {name}") from None

    width, _, patch, _ = shape("embeddings.patch_embedding.weight")
    side = math.isqrt(shape("embeddings.position_embedding.weight")[0] - 1)
    heads = (vision or {}).get("num_attention_heads", _VISION_HEADS.get(width))
    if heads is None:
        raise ValueError(
            f"a face encoder of width {width}: the number of attention heads cannot be read off "
            'the weights, give it as {"vision": {"num_attention_heads": N}} in a .json file of the '
            "same name beside the adapter"
        )
    layers = {key.split(".")[4] for key in renamed if key.startswith(f"{_OWN_ENCODER}encoder.layers.")}
    config = {
        "hidden_size": width,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": int(heads),
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return EncoderConfig(config=config, image_size=side * patch, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def read_prefix(path: str | Path) -> dict[str, Tensor]:
    """``encode_prefix.weight`` and ``.bias`` out of ``caption_decoder.pth`` or its conversion.

    Raises ``ValueError`` that names the file and what it is instead.
    """
    tensors, _ = read_tensors(path)
    prefix = {key: tensor for key, tensor in tensors.items() if key.startswith("encode_prefix.")}
    if sorted(prefix) != ["encode_prefix.bias", PREFIX_SIGNATURE]:
        raise ValueError(
            f"{path}: {_describe(tensors)}. UniDiffuser's caption decoder (caption_decoder.pth) has "
            f"{PREFIX_SIGNATURE} and encode_prefix.bias."
        )
    return prefix
