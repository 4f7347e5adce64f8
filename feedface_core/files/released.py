"""The files of the published releases: UniDiffuser v1 and the FeedFace adapter for it.

They are plain PyTorch state dicts that say nothing about themselves. What the weights cannot tell (attention heads, and
the settings the adapter was made with) is kept here for the published sizes; for other sizes it comes from a JSON file
beside the weights or from safetensors metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from ..config import AdapterConfig, EncoderConfig, SiteConfig
from ..errors import FeedFaceError, problems
from ..modules.encoder import fingerprint
from ..modules.uvit import UViT
from ..modules.uvit_config import UViTConfig
from ..state_dict import check_tensors, describe, read_state_dict

#: Key of the safetensors metadata that holds the settings as JSON.
METADATA_KEY = "unidiffuser"
SIGNATURE = "preprocess_module.project_layer.weight"
PREFIX_SIGNATURE = "encode_prefix.weight"
#: Branch heads by width: 64 of 24, where the frozen model has 24 of 64.
_BRANCH_HEADS = {1536: 64}
#: Attention heads of OpenAI's CLIP vision models by width.
_VISION_HEADS = {768: 12, 1024: 16}
_ENCODER = "preprocess_module.clip_model."

_Count = Annotated[int, Field(ge=1, le=65536)]


class Settings(BaseModel):
    """What the weights cannot tell: of the U-ViT ``heads``, ``text_tokens`` and ``grid``; of the adapter
    ``branch_heads`` (or ``heads``), ``sites`` and ``vision`` (fields of ``CLIPVisionConfig``)."""

    heads: _Count | None = None
    text_tokens: _Count | None = None
    grid: tuple[_Count, _Count] | None = None
    branch_heads: _Count | None = None
    sites: list[str] | None = None
    vision: dict[str, Any] | None = None


def settings_for(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The :class:`Settings` that are known, from the metadata, or ``NAME.json`` beside the file, or a ``config.json``
    beside it that says of itself that it is for a model of the weights' width (``embed``).

    Raises:
        FeedFaceError: names the file and what cannot be used in it.
    """
    path = Path(path)
    if metadata and METADATA_KEY in metadata:
        return _parse(metadata[METADATA_KEY], f"{path}: metadata {METADATA_KEY!r}")
    widths = {tensors[key].shape[at] for key, at in ((SIGNATURE, 0), ("pos_embed", -1)) if key in tensors}
    for candidate in (path.with_suffix(".json"), path.with_name("config.json")):
        if candidate.is_file() and (candidate.stem == path.stem or _embed(candidate) in widths):
            try:
                return _parse(candidate.read_text(encoding="utf-8"), str(candidate))
            except (OSError, UnicodeDecodeError) as error:
                raise FeedFaceError(f"{candidate}: cannot be read ({error})") from error
    return {}


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        return Settings.model_validate_json(text).model_dump(exclude_none=True)
    except ValidationError as error:
        raise FeedFaceError(f"{name}: {problems(error)}") from None


def _embed(path: Path) -> int | None:
    """What a JSON file of any kind gives as ``embed``."""
    try:
        width = json.loads(path.read_text(encoding="utf-8"))["embed"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # somebody else's
    return width if isinstance(width, int) else None


def read_adapter(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The released adapter in this project's terms.

    Args:
        tensors: with the released keys.
        settings: see :func:`settings_for`.

    Returns:
        Its config, with the released settings (reads the block's output, strength 0.8, crops normalised to −1…1, at
        most five references), its tensors under the keys of an adapter file, and the encoder's by their plain Hugging
        Face names.

    Raises:
        FeedFaceError: for missing weights, or a size whose heads are not known.
    """
    settings = settings or {}
    encoder = {
        key.removeprefix(_ENCODER).removeprefix("vision_model."): tensor
        for key, tensor in tensors.items()
        if key.startswith(_ENCODER) and not key.endswith("position_ids")
    }
    renamed = {_rename(key): tensor for key, tensor in tensors.items() if not key.startswith(_ENCODER)}
    branches = {key.split(".")[1] for key in renamed if key.startswith("branches.")}
    if not branches:
        raise FeedFaceError(
            "the released adapter's projection is there, but none of its blocks (blocks.0.zero_linear.…): the file is "
            "incomplete"
        )
    width = _shape(tensors, SIGNATURE, 2)[0]
    heads = settings.get("branch_heads", _BRANCH_HEADS.get(width, settings.get("heads", 0)))
    if heads < 1 or width % heads:
        raise _unknown_heads(f"branches of width {width}", '{"branch_heads": N}')
    names = settings.get("sites") or _site_names(len(branches))
    if len(names) != len(branches):
        raise FeedFaceError(f"{len(branches)} branches in the file, but {len(names)} sites in its settings")
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
    return config, renamed, encoder


def _rename(key: str) -> str:
    if key == SIGNATURE:
        return "projection.weight"
    # A key of another kind is reported as surplus when the adapter is built.
    return "branches." + key.removeprefix("blocks.") if key.startswith("blocks.") else key


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise FeedFaceError(f"the released adapter's file lacks {name}")
    if tensors[name].ndim != dimensions:
        raise FeedFaceError(f"{name} has the shape {tuple(tensors[name].shape)}, expected {dimensions} dimensions")
    return tuple(tensors[name].shape)


def _unknown_heads(what: str, setting: str) -> FeedFaceError:
    return FeedFaceError(
        f"{what}: the number of attention heads cannot be read off the weights, give it as {setting} in a .json file "
        "of the same name beside the adapter"
    )


def _site_names(count: int) -> list[str]:
    """Every other block on both sides: ``in_blocks.0, 2, …`` and then ``out_blocks.0, 2, …``."""
    if count % 2:
        raise FeedFaceError(
            f"{count} branches do not split evenly over both sides of the U-ViT: name the sites in a .json file of the "
            'same name beside the adapter, {"sites": ["in_blocks.0", …]}'
        )
    return [f"{side}.{2 * i}" for side in ("in_blocks", "out_blocks") for i in range(count // 2)]


def _encoder_config(encoder: Mapping[str, Tensor], vision: Mapping[str, Any]) -> EncoderConfig:
    """CLIP's vision transformer, sizes read off its weights, normalised with 0.5 as the release does."""
    width, _, patch, _ = _shape(encoder, "embeddings.patch_embedding.weight", 4)
    size = math.isqrt(_shape(encoder, "embeddings.position_embedding.weight", 2)[0] - 1) * patch
    heads = vision.get("num_attention_heads", _VISION_HEADS.get(width))
    if heads is None:
        raise _unknown_heads(f"a face encoder of width {width}", '{"vision": {"num_attention_heads": N}}')
    config = {
        "hidden_size": width,
        "intermediate_size": _shape(encoder, "encoder.layers.0.mlp.fc1.weight", 2)[0],
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

    Raises:
        FileNotFoundError, FeedFaceError: names the file and what it is instead.
    """
    tensors, metadata = read_state_dict(path)
    if "pos_embed" not in tensors:
        raise FeedFaceError(f"{path}: {describe(tensors)}; a U-ViT has pos_embed, which is not there")
    prefix = {key: tensors.pop(key) for key in list(tensors) if key.startswith("encode_prefix.")}
    try:
        config = UViTConfig.from_state_dict(tensors, settings_for(path, tensors, metadata))
        expected = {name: tuple(tensor.shape) for name, tensor in UViT(config, device="meta").state_dict().items()}
        check_tensors("UniDiffuser's U-ViT", expected, tensors)
    except FeedFaceError as error:
        text = str(error)
        raise FeedFaceError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return tensors, prefix, config


def read_prefix(path: str | Path) -> dict[str, Tensor]:
    """``encode_prefix.weight`` and ``.bias`` out of ``caption_decoder.pth`` or its conversion.

    Raises :class:`FeedFaceError` that names the file and what it is instead.
    """
    tensors, _ = read_state_dict(path)
    prefix = {key: tensor for key, tensor in tensors.items() if key.startswith("encode_prefix.")}
    if sorted(prefix) != ["encode_prefix.bias", PREFIX_SIGNATURE] or prefix[PREFIX_SIGNATURE].ndim != 2:
        raise FeedFaceError(
            f"{path}: {describe(tensors)}. UniDiffuser's caption decoder (caption_decoder.pth) has {PREFIX_SIGNATURE} "
            "and encode_prefix.bias."
        )
    return prefix
