"""How pictures are drawn, in validation and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .settings import Section

Side = Annotated[int, Field(ge=64, le=8192, multiple_of=8)]
Scale = Annotated[float, Field(ge=-1000, le=1000)]


class SamplingSettings(Section):
    """How pictures are drawn."""

    steps: Annotated[int, Field(gt=0, le=1000)] = 20
    """Denoising steps."""
    size: Side | None = None
    """Side of the pictures in pixels; null takes data.resolution."""
    guidance: Literal["joint", "text_then_face", "face_then_text", "three_weights"] = "joint"
    """How unconditional, text and face predictions are combined."""
    text_scale: Scale = 5.0
    """Scale of the text; the one scale of joint."""
    face_scale: Scale = 5.0
    """Scale of the face; not used by joint."""
    both_scale: Scale = 5.0
    """Scale of text and face together, of three_weights only."""
    strength: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Factor of the branches' output."""
