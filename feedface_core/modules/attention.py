"""Attention whose keys and values may come from elsewhere, and may be computed ahead of time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from ..conditioning import KeysValues

Attention = Callable[..., Tensor]


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention on ``(B, N, heads · D)``; the signature is that of ComfyUI's ``optimized_attention``.

    ``mask`` is added to the logits and broadcasts to ``(B, heads, N, L)``.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, D)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class LowRank(nn.Module):
    """A linear whose matrix is a product of two, of rank at most ``rank`` (Hu et al. 2022, arXiv:2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, operations, **factory):
        super().__init__()
        self.down = operations.Linear(inputs, rank, bias=False, **factory)
        self.up = operations.Linear(rank, outputs, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def make_linear(inputs: int, outputs: int, rank: int | None, operations, bias: bool = False, **factory) -> nn.Module:
    """A linear, of low rank unless ``rank`` is None."""
    if rank is None:
        return operations.Linear(inputs, outputs, bias=bias, **factory)
    return LowRank(inputs, outputs, rank, bias, operations, **factory)


class CrossAttention(nn.Module):
    """Attention of ``(B, N, width)`` to keys and values of another sequence, or of its own.

    Args:
        width, context_width: of the tokens that ask and of those that are asked.
        heads, head_dim: inner width is their product.
        attention: ``(q, k, v, heads) -> out`` on ``(B, N, heads · D)``.
        operations: where ``Linear`` comes from; ``torch.nn``, or ``comfy.ops`` for casting and offloading.
        rank: of the four projections; None for full ones.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        head_dim: int,
        attention: Attention,
        operations,
        rank: int | None = None,
        **factory,
    ):
        super().__init__()
        self.heads, self.attention, inner = heads, attention, heads * head_dim
        self.to_q = make_linear(width, inner, rank, operations, **factory)
        self.to_k = make_linear(context_width, inner, rank, operations, **factory)
        self.to_v = make_linear(context_width, inner, rank, operations, **factory)
        self.to_out = nn.ModuleList([make_linear(inner, width, rank, operations, bias=True, **factory)])

    def project(self, context: Tensor) -> KeysValues:
        """``(B, L, context_width)`` → keys and values, each ``(B, L, heads · head_dim)``."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, kv: KeysValues, bias: Tensor | None = None) -> Tensor:
        q = self.to_q(x)  # (B, N, heads · head_dim)
        k, v = (t.expand(q.shape[0], -1, -1) for t in kv)  # one face for all rows is not copied
        if bias is None:
            return self.to_out[0](self.attention(q, k, v, self.heads))
        # Accelerated attention functions differ in the masks they take; torch's own takes any.
        return self.to_out[0](scaled_dot_product_attention(q, k, v, self.heads, bias.to(q.dtype)))
