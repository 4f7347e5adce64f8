"""U-ViT, the transformer of UniDiffuser v1.

"All are Worth Words: A ViT Backbone for Diffusion Models" (CVPR 2023) and "One Transformer Fits All Distributions in
Multi-Modal Diffusion at Scale" (ICML 2023). Picture latent, CLIP image token and text are one sequence of tokens, with
long skips between its halves. Layers carry the names of the released file, so its state dict loads as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import FeedFaceError
from .attention import Attention, scaled_dot_product_attention
from .uvit_config import LEADING, UViTConfig

#: Key of a block's ``transformer_options`` for (h, w) of its image tokens, where the sequence holds others too.
GRID_KEY = "picture_grid"


class SelfAttention(nn.Module):
    """Multi-head self-attention with one linear for q, k and v."""

    def __init__(self, width: int, heads: int, attention: Attention, operations, **factory):
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.qkv = operations.Linear(width, width * 3, bias=False, **factory)
        self.proj = operations.Linear(width, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, S, C) each, split into heads inside the attention
        return self.proj(self.attention(q, k, v, self.heads))


class Mlp(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, width: int, hidden: int, operations, **factory):
        super().__init__()
        self.fc1 = operations.Linear(width, hidden, **factory)
        self.fc2 = operations.Linear(hidden, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Post-norm block: ``x = norm2(x + attn(x)); x = norm3(x + mlp(x))``.

    On the way out, the long skip comes first: ``x = norm1(skip_linear([x, skip]))``.
    """

    def __init__(self, config: UViTConfig, skip: bool, attention: Attention, operations, **factory):
        super().__init__()
        width = config.width
        if skip:
            self.skip_linear = operations.Linear(2 * width, width, **factory)
            self.norm1 = operations.LayerNorm(width, **factory)
        self.norm2 = operations.LayerNorm(width, **factory)
        self.attn = SelfAttention(width, config.heads, attention, operations, **factory)
        self.norm3 = operations.LayerNorm(width, **factory)
        self.mlp = Mlp(width, config.hidden, operations, **factory)

    def forward(
        self, x: Tensor, skip: Tensor | None = None, transformer_options: Mapping[str, Any] | None = None
    ) -> Tensor:
        """``(B, S, C)`` tokens, those of the long skip, and what wrappers of the block read."""
        if skip is not None:
            x = self.norm1(self.skip_linear(torch.cat([x, skip], dim=-1)))  # (B, S, C)
        x = self.norm2(x + self.attn(x))  # (B, S, C)
        return self.norm3(x + self.mlp(x))  # (B, S, C)


def run_block(block: Block, x: Tensor, skip: Tensor | None, options: dict[str, Any]) -> Tensor:
    """``(B, S, C)`` through a block, hooks and wrappers included."""
    return block(x, skip, transformer_options=options)


class PatchEmbed(nn.Module):
    """Picture latent ``(B, 4, H, W)`` → patches ``(B, h·w, C)``."""

    def __init__(self, config: UViTConfig, operations, **factory):
        super().__init__()
        self.proj = operations.Conv2d(
            config.latent_channels, config.width, kernel_size=config.patch, stride=config.patch, **factory
        )

    def forward(self, latent: Tensor) -> Tensor:
        return self.proj(latent).flatten(2).transpose(1, 2)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """``[cos(t·f), sin(t·f)]`` with frequencies f from 1 to 1/10000: ``(B,)`` → ``(B, width)`` in float32."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    rates = torch.exp(steps * (-math.log(10000.0) / half))  # (half,)
    angles = timesteps.float()[:, None] * rates  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return functional.pad(embedding, (0, width - 2 * half))


class UViT(nn.Module):
    """The joint noise prediction network ε(picture, CLIP image token, text; t_img, t_text) of UniDiffuser v1.

    Args:
        config: sizes.
        operations: where layers come from; ``torch.nn``, or ``comfy.ops`` for casting and offloading.
        attention: ``(q, k, v, heads) -> out`` on ``(B, S, C)``.
    """

    def __init__(
        self,
        config: UViTConfig,
        *,
        operations=nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: Attention = scaled_dot_product_attention,
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        factory = {"dtype": dtype, "device": device}
        width = config.width
        positions = LEADING - 1 + config.text_tokens + 1 + config.grid[0] * config.grid[1]
        self.patch_embed = PatchEmbed(config, operations, **factory)
        self.text_embed = operations.Linear(config.text_width, width, **factory)
        self.clip_img_embed = operations.Linear(config.clip_width, width, **factory)
        self.token_embedding = operations.Embedding(2, width, **factory)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width, **factory))
        self.pos_embed_token = nn.Parameter(torch.zeros(1, 1, width, **factory))

        def blocks(skip: bool) -> nn.ModuleList:
            return nn.ModuleList(
                Block(config, skip, attention, operations, **factory) for _ in range(config.depth // 2)
            )

        self.in_blocks = blocks(skip=False)
        self.mid_block = Block(config, False, attention, operations, **factory)
        self.out_blocks = blocks(skip=True)
        self.norm = operations.LayerNorm(width, **factory)
        self.decoder_pred = operations.Linear(width, config.patch**2 * config.latent_channels, **factory)
        self.clip_img_out = operations.Linear(width, config.clip_width, **factory)
        # Part of the file; a picture does not need it.
        self.text_out = operations.Linear(width, config.text_width, **factory)
        #: Runs a block as ``(block, x, skip, options)``; training puts gradient checkpointing here.
        self.run_block: Callable[..., Tensor] = run_block

    def positions(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Position embeddings ``(1, S, C)`` for (h, w) patches, bilinear between the trained ones."""
        table, data_type = self.pos_embed.to(like), self.pos_embed_token.to(like)
        if grid != self.config.grid:
            first = table.shape[1] - self.config.grid[0] * self.config.grid[1]
            patches = table[:, first:].unflatten(1, self.config.grid).movedim(-1, 1).float()  # (1, C, h0, w0)
            patches = functional.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
            table = torch.cat([table[:, :first], patches.flatten(2).transpose(1, 2).to(like)], dim=1)
        times = LEADING - 1
        return torch.cat([table[:, :times], data_type, table[:, times:]], dim=1)

    def forward(
        self,
        latent: Tensor,
        clip_img: Tensor,
        text: Tensor,
        t_img: Tensor,
        t_text: Tensor | None = None,
        data_type: Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            latent: ``(B, 4, H, W)`` noisy picture latent of any size.
            clip_img: ``(B, 1, clip_width)`` noisy CLIP image token.
            text: ``(B, text_tokens, text_width)`` text after ``encode_prefix``.
            t_img: ``(B,)`` timesteps of picture and CLIP token, 1…1000.
            t_text: ``(B,)``, 0 (the text is given) when left out; 1000 for a text of pure noise.
            data_type: ``(B,)`` integers, 1 when left out, as the released model samples.
            transformer_options: handed to every block.

        Returns:
            Predicted noise of the picture ``(B, 4, H, W)`` and of the CLIP token ``(B, 1, clip_width)``.

        Raises:
            FeedFaceError: for a text of another length or width.
        """
        config = self.config
        if text.shape[1:] != (config.text_tokens, config.text_width):
            raise FeedFaceError(
                f"U-ViT text must be (B, {config.text_tokens}, {config.text_width}), got {tuple(text.shape)}"
            )
        batch, _, height, width = latent.shape
        # An odd side is padded to whole patches, and cut back at the end.
        padding = (0, -width % config.patch, 0, -height % config.patch)
        if any(padding):
            latent = functional.pad(latent, padding, mode="replicate")
        grid = (latent.shape[2] // config.patch, latent.shape[3] // config.patch)
        t_text = torch.zeros_like(t_img) if t_text is None else t_text.to(t_img)
        data_type = torch.ones_like(t_img, dtype=torch.long) if data_type is None else data_type
        times = timestep_embedding(torch.stack([t_img, t_text], 1).flatten(), config.width)
        x = torch.cat(
            [
                times.view(batch, 2, config.width).to(latent.dtype),  # (B, 2, C)
                self.token_embedding(data_type.long()).unsqueeze(1).to(latent.dtype),  # (B, 1, C)
                self.text_embed(text),  # (B, 77, C)
                self.clip_img_embed(clip_img),  # (B, 1, C)
                self.patch_embed(latent),  # (B, h·w, C)
            ],
            dim=1,
        )
        x = x + self.positions(grid, x)  # (B, S, C)
        x = self._trunk(x, {**(transformer_options or {}), GRID_KEY: grid})
        return self._heads(x, grid, height, width)

    def _trunk(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        skips = []
        for block in self.in_blocks:
            x = self.run_block(block, x, None, options)  # (B, S, C)
            skips.append(x)
        x = self.run_block(self.mid_block, x, None, options)
        for block in self.out_blocks:
            x = self.run_block(block, x, skips.pop(), options)  # (B, S, C)
        return self.norm(x)

    def _heads(self, x: Tensor, grid: tuple[int, int], height: int, width: int) -> tuple[Tensor, Tensor]:
        patches = grid[0] * grid[1]
        side = self.config.patch
        clip = self.clip_img_out(x[:, -patches - 1 : -patches])  # (B, 1, clip_width)
        pixels = self.decoder_pred(x[:, -patches:])  # (B, h·w, p·p·4)
        pixels = pixels.unflatten(-1, (side, side, -1)).unflatten(1, grid)  # (B, h, w, p, p, 4)
        picture = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, 4, H, W)
        return picture[:, :, :height, :width], clip
