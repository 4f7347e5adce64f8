"""The trainable part of FeedFace: the projection of the face tokens and one control branch for each site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..conditioning import Face, FaceControl, combine_references
from ..config import AdapterConfig
from .branch import Attention, ControlBranch, scaled_dot_product_attention


class FaceAdapter(nn.Module):
    """Projection and control branches of one adapter. The frozen encoder is not part of it.

    Args:
        config: what to build.
        operations, dtype, device, attention: as in :class:`ControlBranch`.
    """

    def __init__(
        self,
        config: AdapterConfig,
        *,
        operations=nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        attention: Attention = scaled_dot_product_attention,
    ):
        super().__init__()
        self.config = config
        factory = {"dtype": dtype, "device": device}
        self.projection = operations.Linear(config.encoder.width, config.context_width, bias=False, **factory)
        self.branches = nn.ModuleList(
            [
                ControlBranch(
                    site.width,
                    config.context_width,
                    site.heads,
                    site.head_dim,
                    config.depth,
                    config.self_attention,
                    operations=operations,
                    attention=attention,
                    **factory,
                )
                for site in config.sites
            ]
        )
        if config.null == "learned":
            self.null_tokens = nn.Parameter(torch.zeros(1, config.encoder.tokens, config.context_width, **factory))
        elif config.null == "zero_crop":
            self.register_buffer("null_hidden", torch.zeros(1, config.encoder.tokens, config.encoder.width, **factory))

    def project(self, hidden: Tensor) -> Tensor:
        """Encoder hidden states ``(B, L, E)`` → face tokens ``(B, L, context_width)``."""
        return self.projection(hidden)

    def null(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Face tokens ``(1, T, context_width)`` of a dropped face; only for adapters that do not switch it off."""
        if self.config.null == "learned":
            return self.null_tokens.to(device, dtype)
        if self.config.null == "zero_crop":
            return self.project(self.null_hidden.to(device, dtype))
        raise ValueError("this adapter drops a face by switching its branches off: there are no null tokens")

    def control(self, tokens: Tensor, bias: Tensor | None = None, **fields) -> FaceControl:
        """A control with keys and values for every site.

        Args:
            tokens: ``(F, L, context_width)`` face tokens, from :meth:`project` or :meth:`null`.
            bias: ``(F, 1, 1, L)`` of the attention logits, or None.
            fields: of :class:`FaceControl`.
        """
        kv = [branch.project_face(tokens) for branch in self.branches]
        return FaceControl(kv=kv, bias=None if bias is None else bias.to(tokens), **fields)

    def control_of(self, face: Face, device: torch.device | str, dtype: torch.dtype, **fields) -> FaceControl:
        """The control of one face, computed on a device in a floating-point type."""
        hidden, bias = combine_references(face.hidden, [len(face.hidden)], face.combination, face.weights)
        return self.control(self.project(hidden.to(device, dtype)), bias, face=face, **fields)

    def null_control(self, device: torch.device | str, dtype: torch.dtype, **fields) -> FaceControl | None:
        """The control of a dropped face; None for an adapter that switches its branches off instead."""
        return None if self.config.null == "off" else self.control(self.null(device, dtype), **fields)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
