"""The trainable part of an adapter: for each stream the projection of the face tokens, and what injects them, control
branches (FeedFace) or nothing more where they stand among the text's tokens (Face0)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ..arithmetic import mean_tokens
from ..conditioning import Face, FaceControl, People, combine_references
from ..config import AdapterConfig, TextTokensConfig
from ..errors import FeedFaceError
from .attention import Attention, scaled_dot_product_attention
from .branch import ControlBranch


class TextTokenProjection(nn.Sequential):
    """A vector for a face → its text tokens, through an MLP (Face0, section 3)."""

    def __init__(self, encoder_width: int, context_width: int, config: TextTokensConfig, operations, **factory):
        widths = [encoder_width, *[config.width] * (config.layers - 1), config.count * context_width]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [operations.Linear(width, following, **factory), nn.GELU()]
        super().__init__(*layers[:-1])
        self.context_width = context_width

    def forward(self, hidden: Tensor) -> Tensor:
        """``(B, 1, E)`` → ``(B, N, context_width)``."""
        return super().forward(hidden).unflatten(-1, (-1, self.context_width)).flatten(1, 2)


class FaceAdapter(nn.Module):
    """Projection and control branches of one adapter, and its second stream. The frozen encoder is not part of it.

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
        options = {"operations": operations, "attention": attention}
        parts = (config.depth, config.self_attention, config.mlp, config.rank)
        if config.text_tokens:
            self.projection = TextTokenProjection(encoder.width, width, config.text_tokens, operations, **factory)
        else:
            self.projection = operations.Linear(encoder.width, width, bias=False, **factory)
        self.branches = nn.ModuleList(
            ControlBranch(site.width, width, site.heads, site.head_dim, *parts, **options, **factory)
            for site in config.sites
        )
        if config.null == "learned":
            tokens = config.text_tokens.count if config.text_tokens else encoder.tokens
            self.null_tokens = nn.Parameter(torch.zeros(1, tokens, width, **factory))
        elif config.null == "zero_crop":
            self.register_buffer("null_hidden", torch.zeros(1, encoder.tokens, encoder.width, **factory))
        self.background = config.background and FaceAdapter(config.background, **options, **factory)

    @property
    def streams(self) -> tuple[FaceAdapter, ...]:
        """Of the face, and of the background where there is one."""
        return (self,) if self.background is None else (self, self.background)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    def project(self, hidden: Tensor) -> Tensor:
        """Encoder hidden states ``(B, L, E)`` → face tokens ``(B, L, context_width)``; ``(B, 1, E)`` → ``(B, N,
        context_width)`` for text tokens."""
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
        if self.config.text_tokens:
            return FaceControl(text_tokens=tokens, text_offset=self.config.text_tokens.offset, **fields)
        kv = [branch.project_face(tokens) for branch in self.branches]
        return FaceControl(kv=kv, bias=None if bias is None else bias.to(tokens), **fields)

    def control_of(self, face: Face | People, device: torch.device | str, dtype: torch.dtype, **fields) -> FaceControl:
        """The control of one face, or of several people, computed on a device in a floating-point type."""
        if self.config.text_tokens:
            if isinstance(face, People):
                raise FeedFaceError(
                    "this adapter puts one face into the text's tokens, which know no regions of the picture; for "
                    "several people give each prompt its own face (FeedFace Set Face with a mask)"
                )
            return self.control(self.project(mean_tokens(face).to(device, dtype)), face=face, **fields)
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
        """The control of a dropped face, and a dropped background; None for an adapter that adds nothing instead."""
        tokens = self.null(device, dtype)
        background = self.background and self.background.null_control(device, dtype, **fields)
        if tokens is None:
            return background and FaceControl(background=background)
        return self.control(tokens, background=background, **fields)
