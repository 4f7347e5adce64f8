"""Sizes of UniDiffuser's U-ViT, read off its weights, and how to tell it from other files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FeedFaceError

#: Tokens before the text: time of the picture, time of the text, data type.
LEADING = 3
#: Attention heads by width. A state dict does not tell them; these are the published model's.
_HEADS = {1536: 24}


class NotUniDiffuser(FeedFaceError):
    """A state dict that is not UniDiffuser v1's U-ViT; the message says what it is instead."""


@dataclass(frozen=True)
class UViTConfig:
    """Sizes of a U-ViT.

    Args:
        width: channels C of a token.
        heads: attention heads.
        depth: blocks without the middle one, half of them on each side of it.
        hidden: width of the MLPs.
        latent_channels, patch: the picture latent and the side of its patches.
        grid: (h, w) patches of the training size, which the position embeddings were made for.
        text_width, text_tokens: the text after ``encode_prefix``.
        clip_width: the CLIP image token.
    """

    width: int = 1536
    heads: int = 24
    depth: int = 30
    hidden: int = 6144
    latent_channels: int = 4
    patch: int = 2
    grid: tuple[int, int] = (32, 32)
    text_width: int = 64
    text_tokens: int = 77
    clip_width: int = 512

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"U-ViT width {self.width} cannot be split into {self.heads} attention heads")
        if self.depth < 2 or self.depth % 2:
            raise ValueError(
                f"U-ViT depth {self.depth} must be even and at least 2: half of it comes before the middle block"
            )

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> UViTConfig:
        """Sizes read off the weights.

        Args:
            tensors: the released file's keys.
            settings: what the weights cannot tell: ``heads`` (unless the width is the published 1536), and
                ``text_tokens`` and ``grid`` when they are not 77 and a square.

        Raises:
            NotUniDiffuser: when the keys are another model's.
            ValueError: when the number of heads is unknown or the position embeddings do not fit.
        """
        check_signature(tensors)
        settings = settings or {}
        width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        heads = settings.get("heads", _HEADS.get(width))
        if heads is None:
            raise ValueError(
                f"a U-ViT of width {width}: the number of attention heads cannot be read off "
                'the weights, give it as {"heads": N} in a .json file of the same name '
                "beside them"
            )
        text_tokens = int(settings.get("text_tokens", 77))
        positions = tensors["pos_embed"].shape[1] - (LEADING - 1) - text_tokens - 1
        side = math.isqrt(max(positions, 0))
        grid = tuple(settings.get("grid", (side, side)))
        if grid[0] * grid[1] != positions or positions < 1:
            raise ValueError(
                f"pos_embed holds {tensors['pos_embed'].shape[1]} positions, which leaves "
                f"{positions} for the picture after {text_tokens} text tokens: not a grid of "
                f"{grid[0]} x {grid[1]}"
            )
        return cls(
            width=width,
            heads=int(heads),
            depth=2 * _count(tensors, "in_blocks"),
            hidden=tensors["mid_block.mlp.fc1.weight"].shape[0],
            latent_channels=channels,
            patch=patch,
            grid=grid,
            text_width=tensors["text_embed.weight"].shape[1],
            text_tokens=text_tokens,
            clip_width=tensors["clip_img_embed.weight"].shape[1],
        )

    def settings(self) -> dict[str, Any]:
        """What :meth:`from_state_dict` cannot read off the weights."""
        return {"heads": self.heads, "text_tokens": self.text_tokens, "grid": list(self.grid)}


def _count(tensors: Mapping[str, Tensor], side: str) -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{side}.")})


def check_signature(tensors: Mapping[str, Tensor]) -> None:
    """Raises :class:`NotUniDiffuser`, saying what the keys look like instead."""
    trunk = (
        "pos_embed",
        "patch_embed.proj.weight",
        "in_blocks.0.attn.qkv.weight",
        "mid_block.attn.qkv.weight",
        "out_blocks.0.skip_linear.weight",
        "decoder_pred.weight",
    )
    missing = [key for key in trunk if key not in tensors]
    if missing:
        raise NotUniDiffuser(f"{_guess(tensors)}; a U-ViT has {missing[0]}, which is not there")
    if "clip_img_embed.weight" not in tensors or "text_embed.weight" not in tensors:
        raise NotUniDiffuser(
            "this is a U-ViT, but not UniDiffuser's: it has no text_embed and "
            "clip_img_embed. The file needed is uvit_v1.pth"
        )
    if "pos_embed_token" not in tensors or "token_embedding.weight" not in tensors:
        raise NotUniDiffuser(
            "this is UniDiffuser v0: it has no data-type token (pos_embed_token and "
            "token_embedding). FeedFace needs version 1, the file uvit_v1.pth"
        )
    inner, outer = _count(tensors, "in_blocks"), _count(tensors, "out_blocks")
    if inner != outer:
        raise NotUniDiffuser(
            f"{inner} blocks before the middle and {outer} after it, but a U-ViT has the "
            "same number on both sides: the file is incomplete or another variant"
        )
    if "in_blocks.0.norm3.weight" not in tensors:
        raise NotUniDiffuser(
            "this U-ViT has pre-norm blocks (no norm3), UniDiffuser v1's are post-norm. The file needed is uvit_v1.pth"
        )


def _guess(tensors: Mapping[str, Tensor]) -> str:
    signs = (
        ("preprocess_module.project_layer.weight", "this is the released FeedFace adapter (models/feedface)"),
        ("encode_prefix.weight", "this is UniDiffuser's caption decoder (models/text_encoders)"),
        ("model.diffusion_model.input_blocks.0.0.weight", "this is a Stable Diffusion checkpoint (models/checkpoints)"),
        ("first_stage_model.encoder.conv_in.weight", "this is an autoencoder (models/vae)"),
        ("encoder.conv_in.weight", "this is an autoencoder (models/vae)"),
    )
    for key, text in signs:
        if key in tensors:
            return text
    keys = sorted(tensors)
    return f"not a U-ViT: {len(keys)} weights{f', the first {keys[0]}' if keys else ''}"
