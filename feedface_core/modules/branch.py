"""The control branch: a small trainable transformer beside a frozen block.

FeedFace (ICLR 2024 Tiny Papers): self-attention, cross-attention to the face tokens, MLP, and a
zero-initialised linear whose output is added to the frozen block's. Layers carry the names of the released
adapter, which are those of Stable Diffusion's transformer block in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

FaceKV = tuple[Tensor, Tensor]
Attention = Callable[..., Tensor]


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention on ``(B, N, heads * D)`` tensors; the signature is ComfyUI's ``optimized_attention``.

    ``mask`` is added to the logits and broadcasts to ``(B, heads, N, L)``.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, D)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def zero_init(layer: nn.Module) -> nn.Module:
    """Sets every parameter of the layer to zero, so that a fresh branch adds exactly nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GEGLU(nn.Module):
    """``a * gelu(b)`` with ``a, b`` the two halves of one linear (Shazeer 2020)."""

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
        # The middle entry keeps the released file's key ``net.2``.
        self.net = nn.ModuleList(
            [
                GEGLU(width, width * 4, operations, **factory),
                nn.Identity(),
                operations.Linear(width * 4, width, **factory),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class AttentionLayer(nn.Module):
    """Attention whose keys and values may come from elsewhere, and may be computed ahead of time."""

    def __init__(
        self, width: int, source_width: int, heads: int, head_dim: int, attention: Attention, operations, **factory
    ):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.attention = attention
        self.to_q = operations.Linear(width, inner, bias=False, **factory)
        self.to_k = operations.Linear(source_width, inner, bias=False, **factory)
        self.to_v = operations.Linear(source_width, inner, bias=False, **factory)
        self.to_out = nn.ModuleList([operations.Linear(inner, width, **factory)])

    def project(self, source: Tensor) -> FaceKV:
        """``(B, L, source_width)`` → keys and values, each ``(B, L, heads * head_dim)``."""
        return self.to_k(source), self.to_v(source)

    def forward(self, x: Tensor, kv: FaceKV, bias: Tensor | None = None) -> Tensor:
        q = self.to_q(x)  # (B, N, heads * head_dim)
        k, v = (t.expand(q.shape[0], -1, -1) for t in kv)  # one face for all rows is not copied
        if bias is None:
            out = self.attention(q, k, v, self.heads)
        else:  # accelerated attention functions differ in the masks they take; torch's own takes any
            out = scaled_dot_product_attention(q, k, v, self.heads, bias.to(q.dtype))
        return self.to_out[0](out)


class BranchBlock(nn.Module):
    """Pre-norm transformer block: self-attention (optional), cross-attention to the face, MLP, each with a residual."""

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_dim: int,
        self_attention: bool,
        attention: Attention,
        operations,
        **factory,
    ):
        super().__init__()
        self.self_attention = self_attention
        if self_attention:
            self.norm1 = operations.LayerNorm(width, **factory)
            self.attn1 = AttentionLayer(width, width, heads, head_dim, attention, operations, **factory)
        self.norm2 = operations.LayerNorm(width, **factory)
        self.attn2 = AttentionLayer(width, context_width, heads, head_dim, attention, operations, **factory)
        self.norm3 = operations.LayerNorm(width, **factory)
        self.ff = FeedForward(width, operations, **factory)

    def forward(self, x: Tensor, face_kv: FaceKV, bias: Tensor | None = None) -> Tensor:
        if self.self_attention:
            normed = self.norm1(x)
            x = x + self.attn1(normed, self.attn1.project(normed))  # (B, N, W)
        x = x + self.attn2(self.norm2(x), face_kv, bias)  # (B, N, W)
        return x + self.ff(self.norm3(x))  # (B, N, W)


class ControlBranch(nn.Module):
    """``zero_linear(block_n(… block_1(x, face)))``: what one site adds to the frozen block's output.

    Args:
        width: channels of the site's tokens.
        context_width: width of the projected face tokens.
        heads, head_dim: attention heads of every attention layer in the branch.
        depth: transformer blocks in the branch.
        self_attention: False leaves the self-attention out, which is close to half of a branch's operations at
            512 pixels.
        operations: where ``Linear`` and ``LayerNorm`` come from; ``torch.nn``, or ``comfy.ops`` for casting and
            offloading.
        attention: a function ``(q, k, v, heads) -> out`` on ``(B, N, heads * D)``.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_dim: int,
        depth: int = 1,
        self_attention: bool = True,
        *,
        operations=nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: Attention = scaled_dot_product_attention,
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.blocks = nn.ModuleList(
            [
                BranchBlock(width, context_width, heads, head_dim, self_attention, attention, operations, **factory)
                for _ in range(depth)
            ]
        )
        self.zero_linear = zero_init(operations.Linear(width, width, bias=False, **factory))

    def project_face(self, tokens: Tensor) -> list[FaceKV]:
        """Face tokens ``(B, L, context_width)`` → keys and values for each block; they do not change over a run."""
        return [block.attn2.project(tokens) for block in self.blocks]

    def forward(self, x: Tensor, face_kv: Sequence[FaceKV], bias: Tensor | None = None) -> Tensor:
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
