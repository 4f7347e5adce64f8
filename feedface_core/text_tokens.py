"""A face among the text's tokens: Face0 (SIGGRAPH Asia 2023, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .conditioning import Rows, of_stream
from .config import STREAMS
from .errors import FeedFaceError


def replace_last(states: Tensor, tokens: Tensor, strength: float = 1.0, offset: int = 0) -> Tensor:
    """Text states with face tokens in the place of their last ones.

    Args:
        states: ``(B, L, C)`` of the text.
        tokens: ``(1 or B, N, C)``, N + offset ≤ L.
        strength: 1 puts the tokens in the text's place, less leaves that share of the text, more goes beyond.
        offset: so many of the text's last tokens stay behind them.

    Returns:
        ``(B, L, C)``, a new tensor.

    Raises:
        FeedFaceError: tokens of another width, or more than the text has.
    """
    count, end = tokens.shape[1], states.shape[1] - offset
    if tokens.shape[2] != states.shape[2] or count > end:
        raise FeedFaceError(
            f"{count + offset} face tokens of width {tokens.shape[2]} cannot stand in a text of {states.shape[1]} "
            f"tokens of width {states.shape[2]}: the adapter was made for another text encoder"
        )
    first, text, last = states.split([end - count, count, offset], dim=1)
    tokens = tokens.to(states).expand_as(text)
    return torch.cat([first, tokens if strength == 1.0 else text.lerp(tokens, strength), last], dim=1)


def replace_rows(states: Tensor, rows: Rows | None) -> Tensor:
    """Text states ``(B, L, C)`` with the tokens of the controls that act on their rows, those of both streams; other
    rows as they are.

    Raises:
        FeedFaceError: as :func:`replace_last`.
    """
    for stream in STREAMS if rows else ():
        own = of_stream(rows, stream)
        if all(control is None or control.text_tokens is None for _, control in own):
            continue
        parts = states.split([count for count, _ in own])
        states = torch.cat(
            [
                part
                if control is None
                else replace_last(part, control.text_tokens, control.strength, control.text_offset)
                for part, (_, control) in zip(parts, own, strict=True)
            ]
        )
    return states
