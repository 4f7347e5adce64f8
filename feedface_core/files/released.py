"""The files of the published releases: UniDiffuser v1 and the FeedFace adapter for it.

They are plain PyTorch state dicts that say nothing about themselves. What the weights cannot tell (attention heads, and
the settings the adapter was made with) is kept here for the published sizes; for other sizes it comes from a JSON file
beside the weights or from safetensors metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from torch import Tensor

from ..config import AdapterConfig, EncoderConfig, SiteConfig
from ..errors import FeedFaceError, located, problems, typed
from ..modules.encoder import fingerprint, plain_weights
from ..modules.uvit import UViT
from ..modules.uvit_config import UViTConfig, unknown_heads
from ..state_dict import check_tensors, describe, read_state_dict, shape_of
from .json_file import read_json

#: Key of the safetensors metadata that holds the settings as JSON.
METADATA_KEY = "unidiffuser"
SIGNATURE = "preprocess_module.project_layer.weight"
PREFIX_SIGNATURE = "encode_prefix.weight"
#: Branch heads by width: 64 of 24, where the frozen model has 24 of 64.
_BRANCH_HEADS = {1536: 64}
#: Attention heads of OpenAI's CLIP vision models by width.
_VISION_HEADS = {768: 12, 1024: 16}
#: Where the weights have the model's width.
_WIDTHS = {SIGNATURE: slice(1), "pos_embed": slice(-1, None)}
_ENCODER = "preprocess_module.clip_model."

_Count = Annotated[int, Field(ge=1, le=65536)]


class _Vision(BaseModel, strict=True):
    num_attention_heads: _Count | None = None


class Settings(BaseModel, strict=True):
    """What the weights cannot tell: of the U-ViT ``heads``, ``text_tokens`` and ``grid``; of the adapter
    ``branch_heads`` (or ``heads``), ``sites`` and the encoder's heads. Other fields are left alone."""

    heads: _Count | None = None
    text_tokens: _Count | None = None
    grid: tuple[_Count, _Count] | None = None
    branch_heads: _Count | None = None
    sites: Annotated[list[str], Field(min_length=1, max_length=4096)] | None = None
    vision: _Vision | None = None


class _Claim(BaseModel, strict=True):
    embed: int


def settings_for(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The :class:`Settings` that are known, from the metadata, or ``NAME.json`` beside the file, or a ``config.json``
    beside it that says of itself that it is for a model of the weights' width (``embed``).

    Raises :class:`FeedFaceError` that names the file and what cannot be used in it.
    """
    if METADATA_KEY in (metadata or {}):
        with located(f"metadata {METADATA_KEY!r}"):
            return typed(TypeAdapter(Settings), metadata[METADATA_KEY]).model_dump(exclude_none=True)
    own, shared = Path(path).with_suffix(".json"), Path(path).with_name("config.json")
    widths = [size for key, at in _WIDTHS.items() if key in tensors for size in tensors[key].shape[at]]
    if own.is_file() or _claims(shared, widths):
        return read_json(own if own.is_file() else shared, Settings).model_dump(exclude_none=True)
    return {}


def _claims(path: Path, widths: list[int]) -> bool:
    try:
        return read_json(path, _Claim).embed in widths
    except FeedFaceError:
        return False  # none there, or somebody else's


def read_adapter(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The released adapter in this project's terms, from tensors with the released keys and :func:`settings_for`.

    Returns its config, with the released settings (reads the block's output, strength 0.8, crops normalised to −1…1, at
    most five references), its tensors under the keys of an adapter file, and the encoder's by their plain Hugging Face
    names. Raises :class:`FeedFaceError` for missing weights, or a size whose heads are not known.
    """
    settings = settings or {}
    width = shape_of(tensors, SIGNATURE, 2)[0]
    encoder = plain_weights({key.removeprefix(_ENCODER): t for key, t in tensors.items() if key.startswith(_ENCODER)})
    # A key of another kind is reported as surplus when the adapter is built.
    renamed = {
        re.sub(r"^blocks\.", "branches.", key.replace(SIGNATURE, "projection.weight")): tensor
        for key, tensor in tensors.items()
        if not key.startswith(_ENCODER)
    }
    branches = len({key.split(".")[1] for key in renamed if key.startswith("branches.")})
    if not branches:
        raise FeedFaceError("incomplete: the adapter's projection is there, but none of its blocks (blocks.0.…)")
    heads = settings.get("branch_heads", _BRANCH_HEADS.get(width, settings.get("heads", 0)))
    if heads < 1 or width % heads:
        raise unknown_heads(f"branches of width {width}", '{"branch_heads": N}')
    names = settings.get("sites") or _site_names(branches)
    if len(names) != branches:
        raise FeedFaceError(f"{branches} branches in the file, but {len(names)} sites in its settings")
    try:
        vision = _encoder_config(encoder, settings.get("vision") or {})
        config = AdapterConfig(
            host="unidiffuser",
            sites=tuple(SiteConfig(name, width, heads, width // heads) for name in names),
            context_width=width,
            encoder=replace(vision, fingerprint=fingerprint(vision, encoder)),
            tap="output",
            strength=0.8,
            title="FeedFace for UniDiffuser v1",
        )
    except ValidationError as error:
        raise FeedFaceError(f"sizes that no released adapter has ({problems(error)})") from None
    return config, renamed, encoder


def _site_names(count: int) -> list[str]:
    """Every other block on both sides: ``in_blocks.0, 2, …`` and then ``out_blocks.0, 2, …``."""
    if count % 2:
        raise FeedFaceError(
            f"{count} branches do not split evenly over both sides of the U-ViT: name the sites, "
            '{"sites": ["in_blocks.0", …]}, in a .json file of the same name beside the adapter'
        )
    return [f"{side}.{2 * i}" for side in ("in_blocks", "out_blocks") for i in range(count // 2)]


def _encoder_config(encoder: Mapping[str, Tensor], vision: Mapping[str, Any]) -> EncoderConfig:
    """CLIP's vision transformer, sizes read off its weights, normalised with 0.5 as the release does."""
    width, _, patch, _ = shape_of(encoder, "embeddings.patch_embedding.weight", 4)
    size = math.isqrt(shape_of(encoder, "embeddings.position_embedding.weight", 2)[0] - 1) * patch
    heads = vision.get("num_attention_heads", _VISION_HEADS.get(width))
    if heads is None:
        raise unknown_heads(f"a face encoder of width {width}", '{"vision": {"num_attention_heads": N}}')
    config = {
        "hidden_size": width,
        "intermediate_size": shape_of(encoder, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": len({key.split(".")[2] for key in encoder if key.startswith("encoder.layers.")}),
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return EncoderConfig(config=config, image_size=size, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def read_uvit(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], UViTConfig]:
    """UniDiffuser's U-ViT, checked: its weights, those of ``encode_prefix`` where its file carries them, its sizes.

    Raises :class:`FeedFaceError` that names the file and what it is instead.
    """
    tensors, metadata = read_state_dict(path)
    with located(path):
        config = UViTConfig.from_state_dict(tensors, settings_for(path, tensors, metadata))
        prefix = {key: tensors.pop(key) for key in list(tensors) if key.startswith("encode_prefix.")}
        expected = {name: tuple(tensor.shape) for name, tensor in UViT(config, device="meta").state_dict().items()}
        check_tensors("UniDiffuser's U-ViT", expected, tensors)
        return tensors, _check_prefix(prefix) if prefix else {}, config


def read_prefix(path: str | Path) -> dict[str, Tensor]:
    """``encode_prefix.weight`` and ``.bias`` out of ``caption_decoder.pth`` or its conversion.

    Raises :class:`FeedFaceError` that names the file and what it is instead.
    """
    tensors, _ = read_state_dict(path)
    with located(path):
        if PREFIX_SIGNATURE not in tensors:
            raise FeedFaceError(f"{describe(tensors)}; UniDiffuser's caption_decoder.pth has {PREFIX_SIGNATURE}")
        return _check_prefix({key: tensor for key, tensor in tensors.items() if key.startswith("encode_prefix.")})


def _check_prefix(prefix: dict[str, Tensor]) -> dict[str, Tensor]:
    shape = shape_of(prefix, PREFIX_SIGNATURE, 2)
    check_tensors("encode_prefix", {PREFIX_SIGNATURE: shape, "encode_prefix.bias": shape[:1]}, prefix)
    return prefix
