"""The sizes of UniDiffuser's U-ViT, read off its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import FeedFaceError
from ..state_dict import shape_of

#: Tokens before the text: time of the picture, time of the text, data type.
LEADING = 3
#: Attention heads by width. A state dict does not tell them; these are the published model's.
_HEADS = {1536: 24}
#: What it means that a U-ViT lacks a key.
_VARIANTS = {
    "text_embed.weight": "this is a U-ViT, but not UniDiffuser's: it reads no text",
    "clip_img_embed.weight": "this is a U-ViT, but not UniDiffuser's: it reads no CLIP image token",
    "pos_embed_token": "this is UniDiffuser v0: it has no data-type token",
    "token_embedding.weight": "this is UniDiffuser v0: it has no data-type token",
    "in_blocks.0.norm3.weight": "this U-ViT has pre-norm blocks, UniDiffuser v1's are post-norm",
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
        if self.depth % 2 or not 2 <= self.depth <= 256:
            text = f"a U-ViT with {self.depth} blocks around the middle one: expected an even number, 2 to 256"
            raise FeedFaceError(f"{text}; the file is incomplete or another variant")

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> UViTConfig:
        """Sizes read off weights with the released file's keys; raises :class:`FeedFaceError` where they are not told.

        ``settings`` are what the weights cannot tell: ``heads`` (unless the width is the published 1536), and
        ``text_tokens`` and ``grid`` when they are not 77 and a square.
        """
        settings = settings or {}
        positions = shape_of(tensors, "pos_embed", 3)[1]
        width, channels, patch, _ = shape_of(tensors, "patch_embed.proj.weight", 4)
        for key, meaning in _VARIANTS.items():
            if key not in tensors:
                raise FeedFaceError(f"{meaning} ({key} is not there). FeedFace needs UniDiffuser v1, uvit_v1.pth")
        heads = settings.get("heads", _HEADS.get(width))
        if heads is None:
            raise unknown_heads(f"a U-ViT of width {width}", '{"heads": N}')
        text_tokens = settings.get("text_tokens", 77)
        patches = positions - (LEADING - 1) - text_tokens - 1
        side = math.isqrt(max(patches, 0))
        grid = tuple(settings.get("grid", (side, side)))
        if math.prod(grid) != patches or patches < 1:
            raise FeedFaceError(
                f"pos_embed holds {positions} positions, which leaves {patches} for the picture after {text_tokens} "
                f"text tokens: not a grid of {grid[0]} x {grid[1]}"
            )
        return cls(
            width=width,
            heads=heads,
            depth=len({tuple(key.split(".")[:2]) for key in tensors if key.startswith(("in_blocks.", "out_blocks."))}),
            hidden=shape_of(tensors, "mid_block.mlp.fc1.weight", 2)[0],
            latent_channels=channels,
            patch=patch,
            grid=grid,
            text_width=shape_of(tensors, "text_embed.weight", 2)[1],
            text_tokens=text_tokens,
            clip_width=shape_of(tensors, "clip_img_embed.weight", 2)[1],
        )

    def settings(self) -> dict[str, Any]:
        """What :meth:`from_state_dict` cannot read off the weights."""
        return {"heads": self.heads, "text_tokens": self.text_tokens, "grid": list(self.grid)}


def unknown_heads(what: str, setting: str) -> FeedFaceError:
    return FeedFaceError(
        f"{what}: the number of attention heads cannot be read off the weights, give it as {setting} in a .json file "
        "of the same name beside them"
    )
