"""UniDiffuser's U-ViT as a host.

Sites are the blocks: ``in_blocks.i``, ``mid_block`` and ``out_blocks.i``; a branch works on the picture tokens, which
are the last h·w of the sequence.
"""

from __future__ import annotations

from torch import nn

from ..config import SiteConfig
from .site import Site


def list_sites(model: nn.Module) -> list[Site]:
    """Sites of a U-ViT from input to output; an empty list for any other module."""
    if not all(hasattr(model, name) for name in ("in_blocks", "mid_block", "out_blocks", "pos_embed_token")):
        return []
    sides = [[f"{side}.{i}" for i in range(len(getattr(model, side)))] for side in ("in_blocks", "out_blocks")]
    width, heads = model.config.width, model.config.heads
    return [Site(name, name, width, heads, width // heads) for name in (*sides[0], "mid_block", *sides[1])]


def family(model: nn.Module) -> str:
    """``unidiffuser``, of any size."""
    return "unidiffuser"


def default_sites(model: nn.Module) -> tuple[SiteConfig, ...]:
    """Every other block on both sides, the last of an even number left out: 0, 2, …, 12 of 15, as published.

    Branches get heads of width 24 where the width allows, the released adapter's 64 of 24 at width 1536.
    """
    width = model.config.width
    head_dim = 24 if width % 24 == 0 else width // model.config.heads
    indices = range(0, max(len(model.in_blocks) - 1, 1), 2)
    names = [f"{side}.{i}" for side in ("in_blocks", "out_blocks") for i in indices]
    return tuple(SiteConfig(name, width, width // head_dim, head_dim) for name in names)
