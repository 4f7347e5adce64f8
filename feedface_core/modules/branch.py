"""The control branch: a small trainable transformer beside a frozen block.

FeedFace (ICLR 2024 Tiny Papers): self-attention, cross-attention to the face tokens, MLP, and a zero-initialised
linear whose output is added to the frozen block's. Layers carry the names of the released adapter, which are those of
Stable Diffusion's transformer block in diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..conditioning import KeysValues
from .attention import Attention, CrossAttention, LowRank, make_linear, scaled_dot_product_attention


class GEGLU(nn.Module):
    """``a * gelu(b)`` with ``a, b`` the two halves of one linear (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int, operations, **factory):
        super().__init__()
        self.proj = operations.Linear(width, inner * 2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU MLP with four times the width inside."""

    def __init__(self, width: int, operations, **factory):
        super().__init__()
        geglu = GEGLU(width, width * 4, operations, **factory)
        # The middle entry keeps the released file's key ``net.2``.
        self.net = nn.Sequential(geglu, nn.Identity(), operations.Linear(width * 4, width, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BranchBlock(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention to the face, MLP, each with a residual; the first and
    the last are optional."""

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_dim: int,
        self_attention: bool,
        attention: Attention,
        operations,
        mlp: bool = True,
        rank: int | None = None,
        **factory,
    ):
        super().__init__()
        self.self_attention, self.mlp = self_attention, mlp
        if self_attention:
            self.norm1 = operations.LayerNorm(width, **factory)
            self.attn1 = CrossAttention(width, width, heads, head_dim, attention, operations, rank, **factory)
        self.norm2 = operations.LayerNorm(width, **factory)
        self.attn2 = CrossAttention(width, context_width, heads, head_dim, attention, operations, rank, **factory)
        if mlp:
            self.norm3 = operations.LayerNorm(width, **factory)
            self.ff = FeedForward(width, operations, **factory)

    def forward(self, x: Tensor, face_kv: KeysValues, bias: Tensor | None = None) -> Tensor:
        if self.self_attention:
            normed = self.norm1(x)
            x = x + self.attn1(normed, self.attn1.project(normed))  # (B, N, W)
        x = x + self.attn2(self.norm2(x), face_kv, bias)  # (B, N, W)
        return x + self.ff(self.norm3(x)) if self.mlp else x  # (B, N, W)


class ControlBranch(nn.Module):
    """``zero_linear(block_n(… block_1(x, face)))``: what one site adds to the frozen block's output.

    Args:
        width: channels of the site's tokens.
        context_width: width of the projected face tokens.
        heads, head_dim: attention heads of every attention layer in the branch.
        depth: transformer blocks in the branch.
        self_attention: False leaves the self-attention out, which is close to half of a branch's operations at 512
            pixels.
        mlp: False leaves the MLP out; without both, a branch is one attention to the face.
        rank: of the attention's projections and of the last linear; None for full ones.
        operations: where ``Linear`` and ``LayerNorm`` come from; ``torch.nn``, or ``comfy.ops`` for casting and
            offloading.
        attention: see :class:`CrossAttention`.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_dim: int,
        depth: int = 1,
        self_attention: bool = True,
        mlp: bool = True,
        rank: int | None = None,
        *,
        operations=nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: Attention = scaled_dot_product_attention,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        sizes = (width, context_width, heads, head_dim, self_attention, attention, operations)
        self.blocks = nn.ModuleList(BranchBlock(*sizes, mlp=mlp, rank=rank, **factory) for _ in range(depth))
        self.zero_linear = last = make_linear(width, width, rank, operations, **factory)
        # A fresh branch adds exactly nothing.
        nn.init.zeros_((last.up if isinstance(last, LowRank) else last).weight)

    def project_face(self, tokens: Tensor) -> list[KeysValues]:
        """Face tokens ``(B, L, context_width)`` → keys and values for each block; they do not change over a run."""
        return [block.attn2.project(tokens) for block in self.blocks]

    def forward(self, x: Tensor, face_kv: Sequence[KeysValues], bias: Tensor | None = None) -> Tensor:
        """
        Args:
            x: ``(B, N, width)`` tokens of the site.
            face_kv: from :meth:`project_face`, of batch B or 1.
            bias: ``(B or 1, 1, 1, L)`` added to the logits of the attention to the face; log of a reference's weight.

        Returns:
            ``(B, N, width)`` to add to the frozen block's output.
        """
        for block, kv in zip(self.blocks, face_kv, strict=True):
            x = block(x, kv, bias)
        return self.zero_linear(x)
