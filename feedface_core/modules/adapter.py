"""The trainable part of FeedFace: the projection of the face tokens and one control branch for each site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..conditioning import Face, FaceControl, People, combine_references
from ..config import AdapterConfig
from .attention import Attention, scaled_dot_product_attention
from .branch import ControlBranch


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
        self.config, encoder, width = config, config.encoder, config.context_width
        factory = {"dtype": dtype, "device": device}
        options = {"operations": operations, "attention": attention, **factory}
        self.projection = operations.Linear(encoder.width, width, bias=False, **factory)
        self.branches = nn.ModuleList(
            ControlBranch(site.width, width, site.heads, site.head_dim, config.depth, config.self_attention, **options)
            for site in config.sites
        )
        if config.null == "learned":
            self.null_tokens = nn.Parameter(torch.zeros(1, encoder.tokens, width, **factory))
        elif config.null == "zero_crop":
            self.register_buffer("null_hidden", torch.zeros(1, encoder.tokens, encoder.width, **factory))

    def project(self, hidden: Tensor) -> Tensor:
        """Encoder hidden states ``(B, L, E)`` → face tokens ``(B, L, context_width)``."""
        return self.projection(hidden)

    def null(self, device: torch.device | str, dtype: torch.dtype) -> Tensor | None:
        """Face tokens ``(1, T, context_width)`` of a dropped face; None where it switches the branches off."""
        if self.config.null == "learned":
            return self.null_tokens.to(device, dtype)
        return self.project(self.null_hidden.to(device, dtype)) if self.config.null == "zero_crop" else None

    def control(self, tokens: Tensor, bias: Tensor | None = None, **fields) -> FaceControl:
        """A control with keys and values for every site.

        Args:
            tokens: ``(F, L, context_width)`` face tokens, from :meth:`project` or :meth:`null`.
            bias: ``(F, 1, 1, L)`` of the attention logits, or None.
            fields: of :class:`FaceControl`.
        """
        kv = [branch.project_face(tokens) for branch in self.branches]
        return FaceControl(kv=kv, bias=None if bias is None else bias.to(tokens), **fields)

    def control_of(self, face: Face | People, device: torch.device | str, dtype: torch.dtype, **fields) -> FaceControl:
        """The control of one face, or of several people, computed on a device in a floating-point type."""
        faces = face.faces if isinstance(face, People) else (face,)
        states, biases = [], []
        for one in faces:
            hidden, bias = combine_references(one.hidden, [len(one.hidden)], one.combination, one.weights)
            states.append(hidden)
            biases.append(hidden.new_zeros(1, 1, 1, hidden.shape[1]) if bias is None else bias)
        bias, lengths = torch.cat(biases, dim=-1), tuple(hidden.shape[1] for hidden in states)
        tokens = self.project(torch.cat(states, dim=1).to(device, dtype))
        return self.control(tokens, bias if bias.any() else None, face=face, lengths=lengths, **fields)

    def null_control(self, device: torch.device | str, dtype: torch.dtype, **fields) -> FaceControl | None:
        """The control of a dropped face; None for an adapter that switches its branches off instead."""
        tokens = self.null(device, dtype)
        return None if tokens is None else self.control(tokens, **fields)
