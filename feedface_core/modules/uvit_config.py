"""The sizes of UniDiffuser's U-ViT, read off its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FeedFaceError
from ..state_dict import describe

#: Tokens before the text: time of the picture, time of the text, data type.
LEADING = 3
#: Attention heads by width. A state dict does not tell them; these are the published model's.
_HEADS = {1536: 24}
#: Keys of every U-ViT; then of UniDiffuser's, of its version 1, and of post-norm blocks, with what their absence means.
_TRUNK = ("pos_embed", "patch_embed.proj.weight", "in_blocks.0.attn.qkv.weight", "mid_block.attn.qkv.weight",
          "mid_block.mlp.fc1.weight", "out_blocks.0.skip_linear.weight", "decoder_pred.weight")  # fmt: skip
_VARIANTS = {
    ("clip_img_embed.weight", "text_embed.weight"): "this is a U-ViT, but not UniDiffuser's: it has no text_embed and "
    "clip_img_embed",
    ("pos_embed_token", "token_embedding.weight"): "this is UniDiffuser v0: it has no data-type token (pos_embed_token "
    "and token_embedding)",
    ("in_blocks.0.norm3.weight",): "this U-ViT has pre-norm blocks (no norm3), UniDiffuser v1's are post-norm",
}


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
        if self.heads < 1 or self.width % self.heads:
            raise FeedFaceError(f"U-ViT width {self.width} cannot be split into {self.heads} attention heads")
        if self.depth < 2 or self.depth % 2:
            raise FeedFaceError(
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
            FeedFaceError: the keys are another model's, the number of heads is unknown or the position embeddings do
                not fit.
        """
        _check_keys(tensors)
        settings = settings or {}
        width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        heads = settings.get("heads", _HEADS.get(width))
        if heads is None:
            raise FeedFaceError(
                f"a U-ViT of width {width}: the number of attention heads cannot be read off the weights, give it as "
                '{"heads": N} in a .json file of the same name beside them'
            )
        text_tokens = settings.get("text_tokens", 77)
        positions = tensors["pos_embed"].shape[1] - (LEADING - 1) - text_tokens - 1
        side = math.isqrt(max(positions, 0))
        grid = tuple(settings.get("grid", (side, side)))
        if grid[0] * grid[1] != positions or positions < 1:
            raise FeedFaceError(
                f"pos_embed holds {tensors['pos_embed'].shape[1]} positions, which leaves {positions} for the picture "
                f"after {text_tokens} text tokens: not a grid of {grid[0]} x {grid[1]}"
            )
        return cls(
            width=width,
            heads=heads,
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


def _check_keys(tensors: Mapping[str, Tensor]) -> None:
    """Raises :class:`FeedFaceError`, saying what the keys look like instead."""
    missing = [key for key in _TRUNK if key not in tensors]
    if missing:
        raise FeedFaceError(f"{describe(tensors)}; a U-ViT has {missing[0]}, which is not there")
    for keys, text in _VARIANTS.items():
        if any(key not in tensors for key in keys):
            raise FeedFaceError(f"{text}. FeedFace needs UniDiffuser v1, the file uvit_v1.pth")
    inner, outer = _count(tensors, "in_blocks"), _count(tensors, "out_blocks")
    if inner != outer:
        raise FeedFaceError(
            f"{inner} blocks before the middle and {outer} after it, but a U-ViT has the same number on both sides: "
            "the file is incomplete or another variant"
        )
    dimensions = {"patch_embed.proj.weight": 4, "pos_embed": 3, "text_embed.weight": 2, "clip_img_embed.weight": 2}
    for key, expected in dimensions.items():
        if tensors[key].ndim != expected:
            raise FeedFaceError(f"{key} has the shape {tuple(tensors[key].shape)}, expected {expected} dimensions")
